"""What a smaller model costs and what it gives: quality against labels or the original, latency, memory, size."""

from onnx_kfe.evaluation._benchmark import Timing, benchmark, file_size
from onnx_kfe.evaluation._fidelity import HeadQuality, HeadSpec, Rate
from onnx_kfe.evaluation._quality import Accuracy, Batch, Quality, evaluate

__all__ = [
    "Accuracy",
    "Batch",
    "HeadQuality",
    "HeadSpec",
    "Quality",
    "Rate",
    "Timing",
    "benchmark",
    "evaluate",
    "file_size",
]
