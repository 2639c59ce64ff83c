"""Training: an ONNX model as a torch module, the trained weights back in the same graph, and a loop in between.

Torch is imported where it is used: `_run.py` and what belongs to it are imported by those who train.
"""

from onnx_kfe.recovery.training._augment import image_input
from onnx_kfe.recovery.training._intermediate import find_intermediate
from onnx_kfe.recovery.training._module import to_torch, write_back
from onnx_kfe.recovery.training._schedule import SCHEDULES
from onnx_kfe.recovery.training._settings import OPTIMIZERS, PRECISIONS, Epoch, Settings, learning_rate_of

__all__ = [
    "OPTIMIZERS",
    "PRECISIONS",
    "SCHEDULES",
    "Epoch",
    "Settings",
    "find_intermediate",
    "image_input",
    "learning_rate_of",
    "to_torch",
    "write_back",
]
