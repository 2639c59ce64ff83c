"""What a smaller model costs and what it gives: quality against labels or the original, latency, memory, size."""

from onnx_kfe.evaluation._benchmark import Timing, benchmark, file_size
from onnx_kfe.evaluation._drop import METRICS, RATES, Drop, default_metric, measured_drop
from onnx_kfe.evaluation._fidelity import Comparison, HeadQuality, HeadSpec, Rate, compare
from onnx_kfe.evaluation._quality import Accuracy, Batch, Quality, evaluate
from onnx_kfe.evaluation._race import race

__all__ = [
    "METRICS",
    "RATES",
    "Accuracy",
    "Batch",
    "Comparison",
    "Drop",
    "HeadQuality",
    "HeadSpec",
    "Quality",
    "Rate",
    "Timing",
    "benchmark",
    "compare",
    "default_metric",
    "evaluate",
    "file_size",
    "measured_drop",
    "race",
]
