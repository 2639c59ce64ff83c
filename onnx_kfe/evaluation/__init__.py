"""What a smaller model costs and what it gives: quality against labels or the original, latency, memory, size."""

from onnx_kfe.evaluation._benchmark import Timing, benchmark, file_size
from onnx_kfe.evaluation._drop import METRICS, Metric, default_metric, find_metric, measured_drop
from onnx_kfe.evaluation._fidelity import Comparison, HeadQuality, HeadSpec, Rate, compare
from onnx_kfe.evaluation._quality import Accuracy, Batch, Quality, evaluate
from onnx_kfe.evaluation._race import race
from onnx_kfe.evaluation._scorers import Drop, Score

__all__ = [
    "METRICS",
    "Accuracy",
    "Batch",
    "Comparison",
    "Drop",
    "HeadQuality",
    "HeadSpec",
    "Metric",
    "Quality",
    "Rate",
    "Score",
    "Timing",
    "benchmark",
    "compare",
    "default_metric",
    "evaluate",
    "file_size",
    "find_metric",
    "measured_drop",
    "race",
]
