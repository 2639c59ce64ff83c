"""Intermediate values that a student is to share with its teacher (FitNets, Romero et al., ICLR 2015)."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from onnx_kfe.errors import UsageError
from onnx_kfe.graph import computed_values

__all__ = ["AUTO", "find_intermediate"]

AUTO = "auto"
"""In the place of names: what comes out of residual sums."""

_ACTIVATIONS = {"Relu", "Clip", "LeakyRelu", "PRelu", "Gelu", "Sigmoid", "HardSwish", "Elu", "Selu", "Mish", "Tanh"}
_SHOWN = 5


def find_intermediate(student: ir.Model, teacher: ir.Model, names: Sequence[str]) -> list[str]:
    """Names of the values that both are to compute alike.

    Args:
        student: The smaller model.
        teacher: The original.
        names: Names that both graphs have, or `AUTO`: what comes out of the sums of two computed values, behind the
            activation where there is one.

    Raises:
        UsageError: A value is missing in one of them, or there are no such sums.
    """
    common = [name for name in computed_values(student) if name in computed_values(teacher)]
    if list(names) == [AUTO]:
        found = [name for name in common if _is_behind_sum(computed_values(teacher)[name])]
        if not found:
            raise UsageError(f"--intermediate {AUTO}: the models have no residual sums in common; name the values")
        return found
    for name in names:
        if name not in common:
            known = name in computed_values(teacher)
            where = "is no value that both models compute" if known else "is none of the teacher's"
            some = ", ".join(f"'{each}'" for each in common[:: max(len(common) // _SHOWN, 1)][:_SHOWN])
            raise UsageError(f"--intermediate '{name}' {where}; some that both have: {some}")
    return list(names)


def _is_behind_sum(value: ir.Value) -> bool:
    """Whether this is a residual sum, or the activation that alone reads one."""
    node = value.producer()
    if node is not None and node.op_type in _ACTIVATIONS:
        source = node.inputs[0]
        return source is not None and _is_sum(source.producer())
    readers = {use.node.op_type for use in value.uses()}
    return _is_sum(node) and not (readers and readers <= _ACTIVATIONS)


def _is_sum(node: ir.Node | None) -> bool:
    return (
        node is not None
        and node.op_type == "Add"
        and all(value is not None and not _is_constant(value) for value in node.inputs)
    )


def _is_constant(value: ir.Value) -> bool:
    node = value.producer()
    return value.is_initializer() or (node is not None and node.op_type == "Constant")
