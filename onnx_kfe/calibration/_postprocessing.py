"""Post-processing behind the heads: operators that only say which values are the largest, or pick boxes."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

__all__ = ["chosen_by", "is_suppressed"]

_READS = {"NonMaxSuppression": (0, 1), "ArgMax": (0,), "ArgMin": (0,), "TopK": (0,)}
"""By operator that chooses: the inputs that it chooses by."""


def chosen_by(graph: ir.Graph) -> list[tuple[ir.Value, ir.Node]]:
    """The values that outputs are chosen by, each with the node that reads it, in graph order.

    Looked for behind integer outputs and those that NonMaxSuppression picks. A Transpose that leaves the samples in
    front is no part of the value.
    """
    found: set[ir.Node] = set()
    for output in graph.outputs:
        if is_suppressed(output) or (output.dtype is not None and output.dtype.is_integer()):
            found |= {node for node in _above(output) if node.op_type in _READS}
    values: dict[ir.Value, ir.Node] = {}
    for node in graph:
        if node in found:
            for index in _READS[node.op_type]:
                if (value := node.inputs[index]) is not None:
                    values.setdefault(_untransposed(value) if node.op_type == "NonMaxSuppression" else value, node)
    return list(values.items())


def is_suppressed(output: ir.Value) -> bool:
    """Whether an output is what NonMaxSuppression left: as many rows as boxes were found, in no order of samples."""
    return any(node.op_type == "NonMaxSuppression" for node in _above(output))


def _above(output: ir.Value) -> Iterator[ir.Node]:
    """The nodes that compute a value, up to the first that choose."""
    seen: set[ir.Node] = set()
    open_values = [output]
    while open_values:
        node = open_values.pop().producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if node.op_type not in _READS:
            open_values += [value for value in node.inputs if value is not None]


def _untransposed(value: ir.Value) -> ir.Value:
    while (node := value.producer()) is not None and node.op_type == "Transpose" and node.inputs[0] is not None:
        permutation = node.attributes.get_ints("perm", ())
        if not permutation or permutation[0] != 0:
            break
        value = node.inputs[0]
    return value
