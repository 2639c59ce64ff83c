"""Absorb reorderings of channels in the constants of the nodes around them.

A Gather of channels computes nothing, but takes its values out of the blocked layout in which convolutions run on a CPU
and leaves the next convolution to bring them back. Most can go: the convolution in front computes its channels in
another order, or those behind read them in another order, and what is in between acts on each channel alike.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError, PreconditionError

from onnx_kfe.rewrite._editor import Editor, unclear_names
from onnx_kfe.rewrite._reorder import find_edits

__all__ = ["AbsorbPass"]


class AbsorbPass(InPlacePass):
    """Remove Gathers that put all channels into a constant order, where the nodes around them can take it over exactly.

    In front, the order moves through nodes that treat all channels alike, and constants for each channel, to the rows
    of a convolution or the indices of another Gather; all on the way is read only once. Behind, it moves through such
    nodes to the columns of all convolutions, or the indices of all Gathers, that read it. A grouped convolution takes
    an order that keeps its groups together; where that exchanges groups, so must what is on its other side. Constants
    that other nodes read too are copied, but not weights: convolutions that share one take the same order, or none
    does. A Gather that leaves all channels in place just goes.

    Args:
        owned: Which Gathers may go. Constants of any node may be reordered.

    Attributes:
        declined: Why Gathers that may go were left, by node name.
    """

    def __init__(self, owned: Callable[[ir.Node], bool]) -> None:
        super().__init__()
        self.owned = owned
        self.declined: dict[str, str] = {}

    def requires(self, model: ir.Model) -> None:
        """Every node has a name of its own; shapes are inferred, or a Gather whose channels are not known stays."""
        if unclear := unclear_names(model.graph):
            raise PreconditionError(f"not the name of a single node: '{unclear[0]}'")

    def call(self, model: ir.Model) -> PassResult:
        """Remove Gathers until none is left that can go: one may take over what makes it fit."""
        self.declined, modified = {}, False
        editor = Editor(model.graph)
        gathers = [node for node in model.graph if node.op_type == "Gather" and not node.domain and self.owned(node)]
        while absorbed := {gather for gather in gathers if self._absorb(gather, editor)}:
            gathers, modified = [gather for gather in gathers if gather not in absorbed], True
        return PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        """Every Gather that was declined is in the graph."""
        if gone := sorted(set(self.declined) - {node.name for node in model.graph}):
            raise PostconditionError(f"node {gone[0]} was declined, and is gone")

    def _absorb(self, gather: ir.Node, editor: Editor) -> bool:
        """Whether a Gather went."""
        name, edits = gather.name or "", find_edits(gather, editor.graph)
        if isinstance(edits, str):
            self.declined[name] = edits
            return False
        self.declined.pop(name, None)
        for edit in edits:
            editor.put(edit.node, edit.place, edit.array, "/reordered")
        _remove(gather, editor)
        return True


def _remove(gather: ir.Node, editor: Editor) -> None:
    """Have what is in front of a Gather stand for what is behind it."""
    value, indices = gather.inputs
    output = gather.outputs[0]
    assert value is not None
    assert indices is not None
    if output.is_graph_output():
        value.name, output.name, value.shape = output.name, value.name, output.shape
    output.replace_all_uses_with(value, replace_graph_outputs=True)
    editor.graph.remove(gather, safe=True)
    editor.drop_unused(indices)
