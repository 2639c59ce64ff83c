"""Rewriting: plan in, smaller graph out."""

from onnx_kfe.rewrite._apply import apply_plan, sketch_plan, solve_plan, write_chains
from onnx_kfe.rewrite._factorize import Chain, FactorizePass

__all__ = ["Chain", "FactorizePass", "apply_plan", "sketch_plan", "solve_plan", "write_chains"]
