"""Training: an ONNX model as a torch module, and the trained weights back in the same graph."""

from onnx_kfe.recovery.training._module import to_torch, write_back

__all__ = ["to_torch", "write_back"]
