"""Rewriting: plan in, smaller graph out."""

from onnx_kfe.rewrite._apply import apply_plan
from onnx_kfe.rewrite._factorize import Chain, FactorizePass

__all__ = ["Chain", "FactorizePass", "apply_plan"]
