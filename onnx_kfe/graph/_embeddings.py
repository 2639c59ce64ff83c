"""Tables of embeddings: constants that are looked up, which hold parameters and compute nothing."""

from __future__ import annotations

import onnx_ir as ir

from onnx_kfe.graph._layers import Layer

__all__ = ["find_embeddings"]

_REASON = "a table of embeddings, looked up"


def find_embeddings(model: ir.Model) -> list[Layer]:
    """Every Gather of rows of a constant matrix at places that the graph computes or is given, in graph order.

    Args:
        model: A normalised model.

    Returns:
        Layers that cannot be pruned, with no geometry: a look-up multiplies nothing.
    """
    found = []
    for node in model.graph.all_nodes():
        if node.op_type != "Gather" or node.domain != "" or node.attributes.get_int("axis", 0) != 0:
            continue
        table, places = node.inputs
        if table is None or table.const_value is None or places is None or places.const_value is not None:
            continue
        if len(table.const_value.shape) == 2 and table.const_value.dtype.is_floating_point():
            ends = (places.name or "", node.outputs[0].name or "")
            found.append(Layer(node.name or "", "Gather", *ends, geometry=None, reason=_REASON, node=node))
    return found
