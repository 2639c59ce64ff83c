"""Where rules register."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from onnx_kfe.graph.groups._flow import Axes, Flow

__all__ = ["RULES", "Rule", "rule"]

Rule = Callable[[Flow, ir.Node], Sequence[Axes]]
"""`(flow, node) -> the coordinates of its outputs`; it ties coordinates, freezes them, and notes sites."""

RULES: dict[str, Rule] = {}


def rule(*op_types: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of operators of the ONNX domain; see `Rule`."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(op_types, function))
        return function

    return register
