"""Fused operators of ONNX Runtime, written in operators of ONNX, so that the layers they hide can be seen."""

from onnx_kfe.graph.fusions import _activations, _attention, _linear, _normalization
from onnx_kfe.graph.fusions._expand import expand_fusions, is_fusion, reason_kept
from onnx_kfe.graph.fusions._registry import FUSIONS

__all__ = ["FUSIONS", "expand_fusions", "is_fusion", "reason_kept"]

# Imported for the decompositions they register.
del _activations, _attention, _linear, _normalization
