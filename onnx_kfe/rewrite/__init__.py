"""Rewriting: plan in, smaller graph out."""

from onnx_kfe.rewrite._absorb import AbsorbPass
from onnx_kfe.rewrite._apply import (
    add_losses,
    apply_plan,
    removed_chain,
    sketch_plan,
    solve_chain,
    solve_plan,
    write_chains,
)
from onnx_kfe.rewrite._channels import ChannelPass
from onnx_kfe.rewrite._factorize import Chain, FactorizePass
from onnx_kfe.rewrite._merge import Merge, MergePass, is_smaller
from onnx_kfe.rewrite._narrow import Narrowed, narrow
from onnx_kfe.rewrite._remove import RemovePass
from onnx_kfe.rewrite._reweigh import ReweighPass, Weights
from onnx_kfe.rewrite._rotate import Rotated, rotate

__all__ = [
    "AbsorbPass",
    "Chain",
    "ChannelPass",
    "FactorizePass",
    "Merge",
    "MergePass",
    "Narrowed",
    "RemovePass",
    "ReweighPass",
    "Rotated",
    "Weights",
    "add_losses",
    "apply_plan",
    "is_smaller",
    "narrow",
    "removed_chain",
    "rotate",
    "sketch_plan",
    "solve_chain",
    "solve_plan",
    "write_chains",
]
