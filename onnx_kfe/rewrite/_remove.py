"""Remove residual branches whose last layer a plan replaced by its mean output."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError, PreconditionError

from onnx_kfe.graph import find_junction, initializer_array, only_feeding, weight_place
from onnx_kfe.kfe import Array
from onnx_kfe.rewrite._editor import Editor

__all__ = ["RemovePass"]


class RemovePass(InPlacePass):
    """Put a constant in the place of each branch: of its last layer, and of all nodes that only feed that layer.

    The residual sum adds the constant instead: ``[1, out, 1, 1]`` (with as many axes as the value) for a convolution,
    ``[out, 1]`` for ``W @ x``, ``[out]`` otherwise, the bias that an Add gave to a MatMul included. Where it is zero,
    the sum vanishes too, and its readers read the other operand. Initializers stay where another node reads them.

    Args:
        removals: Mean output ``[out]`` by name of the last layer of a branch, as found by `find_branches`.
        keep_sums: Add a constant of zero as well, so that all sums keep their names.
    """

    def __init__(self, removals: Mapping[str, Array], *, keep_sums: bool = False) -> None:
        super().__init__()
        self.removals = dict(removals)
        self.keep_sums = keep_sums

    def requires(self, model: ir.Model) -> None:
        """Every layer named is a node that goes straight into a residual sum, each into one of its own."""
        nodes = {node.name: node for node in model.graph}
        sums: dict[ir.Node, str] = {}
        for name in self.removals:
            if name not in nodes:
                raise PreconditionError(f"no node named {name}")
            if (junction := find_junction(nodes[name])) is None:
                raise PreconditionError(f"node {name} is not the end of a residual branch")
            if (other := sums.setdefault(junction.addition, name)) != name:
                raise PreconditionError(f"nodes {other} and {name} are all that is added by {junction.addition.name}")

    def call(self, model: ir.Model) -> PassResult:
        """Remove the branches, those within others first."""
        editor = Editor(model.graph)
        for node in [node for node in model.graph if node.name in self.removals]:
            _remove(editor, node, self.removals[node.name or ""], self.keep_sums)
        return PassResult(model, modified=bool(self.removals))

    def ensures(self, model: ir.Model) -> None:
        """None of the layers is left."""
        left = [node.name for node in model.graph if node.name in self.removals]
        if left:
            raise PostconditionError(f"node {left[0]} was not removed")


def _remove(editor: Editor, node: ir.Node, mean: Array, keep_sum: bool) -> None:
    place = weight_place(node)
    junction, weight = find_junction(node), node.inputs[place]
    assert junction is not None
    assert weight is not None
    assert weight.const_value is not None
    addition = junction.addition
    dying = only_feeding(junction.branch)
    constant = mean if junction.bias is None else mean + initializer_array(junction.bias).reshape(-1)
    if keep_sum or np.any(constant):
        shape = (1, -1, *(1,) * (len(weight.const_value.shape) - 2)) if "Conv" in node.op_type else (-1, 1)[: 2 - place]
        added = editor.constant(f"{weight.name or node.name}/mean", constant.reshape(shape), weight.const_value.dtype)
        addition.replace_input_with(addition.inputs.index(junction.branch), added)
    else:
        addition.outputs[0].replace_all_uses_with(junction.other)
        dying.add(addition)
    _discard(editor, dying)


def _discard(editor: Editor, nodes: set[ir.Node]) -> None:
    """Take nodes, those of bodies among them, out of the graph with the initializers that only they read."""
    read = {value for node in nodes for value in node.inputs if value is not None and value.is_initializer()}
    for node in nodes:
        for place in range(len(node.inputs)):
            node.replace_input_with(place, None)
    editor.graph.remove([node for node in nodes if node.graph is editor.graph])
    for value in read:
        editor.drop_unused(value)
