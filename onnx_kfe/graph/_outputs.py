"""Values of a graph that are made outputs, to be looked at."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

__all__ = ["computed_values", "with_outputs"]


def computed_values(model: ir.Model) -> dict[str, ir.Value]:
    """The values that nodes of a model compute, by name."""
    return {value.name: value for node in model.graph for value in node.outputs if value.name}


def with_outputs(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """A copy of a model that gives these values too, behind its own outputs."""
    extended = model.clone()
    values = computed_values(extended)
    extended.graph.outputs.extend(values[name] for name in names if not values[name].is_graph_output())
    for name in names:
        values[name].dtype = values[name].dtype or ir.DataType.FLOAT
    return extended
