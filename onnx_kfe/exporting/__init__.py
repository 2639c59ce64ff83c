"""Exporting: a torch module to ONNX by torch's own exporter, compared with torch before it is called done."""

from onnx_kfe.exporting._export import export, export_factory
from onnx_kfe.exporting._factory import ModuleInput, parse_dynamic, parse_input_shape
from onnx_kfe.exporting._torch import import_torch, quiet, reason

__all__ = [
    "ModuleInput",
    "export",
    "export_factory",
    "import_torch",
    "parse_dynamic",
    "parse_input_shape",
    "quiet",
    "reason",
]
