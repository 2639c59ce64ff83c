"""Make a trained ONNX model smaller and measurably faster, from the .onnx file and some inputs alone.

::

    import onnx_kfe as kfe

    statistics = kfe.collect("model.onnx", "calibration/")
    plan = kfe.plan("model.onnx", statistics, kfe.Macs(0.6))
    result = kfe.prune("model.onnx", statistics, plan)
    result.save("small.onnx")
"""

__version__ = "0.1.0"

from onnx_kfe import _blas  # noqa: F401 - before NumPy is loaded
from onnx_kfe.calibration import ImageOptions, Statistics, merge
from onnx_kfe.errors import BudgetError, KfeError, UsageError
from onnx_kfe.exporting import export
from onnx_kfe.pipeline import benchmark, collect, evaluate, finetune, frontier, inspect, plan, prune
from onnx_kfe.planning import Latency, Macs, Milliseconds, Params, Plan
from onnx_kfe.recovery.training import to_torch, write_back
from onnx_kfe.result import Result

__all__ = [
    "BudgetError",
    "ImageOptions",
    "KfeError",
    "Latency",
    "Macs",
    "Milliseconds",
    "Params",
    "Plan",
    "Result",
    "Statistics",
    "UsageError",
    "benchmark",
    "collect",
    "evaluate",
    "export",
    "finetune",
    "frontier",
    "inspect",
    "merge",
    "plan",
    "prune",
    "to_torch",
    "write_back",
]
