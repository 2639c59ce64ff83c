"""Recovery: what a compressed model lost, taken back without labels and without training."""

from onnx_kfe.recovery._refit import refit, refusal, settled_layers

__all__ = ["refit", "refusal", "settled_layers"]
