"""The heads of a model as evaluation and training read them: outputs, or values in front of post-processing."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from onnx_kfe import calibration
from onnx_kfe.errors import UsageError
from onnx_kfe.evaluation import HeadSpec
from onnx_kfe.graph import computed_values, normalize, with_outputs

__all__ = ["giving", "head_specs", "trainable"]


def head_specs(heads: Sequence[calibration.Head], *, scaled: bool = False) -> list[HeadSpec]:
    """How the evaluation reads the heads of a model; their scales are known where statistics were collected."""
    return [
        HeadSpec(
            head.output, head.kind, head.probabilities, head.axis,
            head.scale if scaled else None, head.weight if scaled else 1.0, head.mask,
        )
        for head in heads
    ]  # fmt: skip


def trainable(heads: Sequence[calibration.Head]) -> Sequence[calibration.Head]:
    """The heads, if a model can be trained to give them.

    Raises:
        UsageError: One of them is inside the graph.
    """
    if inside := [head.output for head in heads if head.read_by]:
        raise UsageError(
            f"training compares outputs, and {', '.join(inside)} are inside the model, in front of post-processing: "
            "train a model that ends there"
        )
    return heads


def giving(model: ir.Model, heads: Sequence[HeadSpec]) -> ir.Model:
    """A model that gives its heads, those inside the graph too; normalised where only that has values of such names.

    A model that has no such values stays as it is: `evaluate` says which head it lacks.
    """
    outputs = [value.name for value in model.graph.outputs]
    inside = [head.name for head in heads if head.name not in outputs]
    if not inside:
        return model
    for candidate in (model, normalize(model)):
        if computed_values(candidate).keys() >= set(inside):
            return with_outputs(candidate, inside)
    return model
