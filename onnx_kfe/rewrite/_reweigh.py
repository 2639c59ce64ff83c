"""Give layers other weights and biases of the shapes that they have: nodes and names stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PreconditionError

from onnx_kfe.kfe import Array
from onnx_kfe.rewrite._editor import Editor

__all__ = ["ReweighPass", "Weights"]


class Weights(NamedTuple):
    """What a layer computes with.

    Attributes:
        weight: ``[groups, out/groups, in/groups, *kernel]``.
        bias: ``[out]``; of a MatMul what is added to it beside what the graph adds.
    """

    weight: Array
    bias: Array


class ReweighPass(InPlacePass):
    """Write weights and biases into linear nodes, in the model's own type.

    A layer gets a bias where it had none and that is not zero; that of a MatMul goes to the Add behind it, or to a new
    one. Constants that other nodes read too are copied, once for all that get the same.

    Args:
        weights: By layer name.
    """

    def __init__(self, weights: Mapping[str, Weights]) -> None:
        super().__init__()
        self.weights = dict(weights)

    def requires(self, model: ir.Model) -> None:
        """Every layer named is a node of the graph."""
        names = {node.name for node in model.graph}
        if missing := sorted(set(self.weights) - names):
            raise PreconditionError(f"no node named {missing[0]}")

    def call(self, model: ir.Model) -> PassResult:
        """Write them."""
        editor = Editor(model.graph)
        for node in [node for node in model.graph if node.name in self.weights]:
            _write(editor, node, self.weights[node.name or ""])
        return PassResult(model, modified=bool(self.weights))


def _write(editor: Editor, node: ir.Node, new: Weights) -> None:
    matrix = new.weight.reshape(-1, *new.weight.shape[2:])
    if node.op_type != "Conv" and not node.attributes.get_int("transB", 0):
        matrix = matrix.T
    for scale in ("alpha", "beta"):  # which the weights and biases of a layer include
        node.attributes.pop(scale, None)
    weight = node.inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    dtype, name = weight.const_value.dtype, f"{weight.name}/bias"
    editor.put(node, 1, matrix)
    if node.op_type == "MatMul":
        if np.any(new.bias) and not editor.absorb(node.outputs[0], new.bias, "kfe"):
            _add(editor, node, editor.constant(name, new.bias, dtype))
    elif len(node.inputs) > 2 and node.inputs[2] is not None:
        editor.put(node, 2, new.bias)
    elif np.any(new.bias):
        node.resize_inputs(3)
        node.replace_input_with(2, editor.constant(name, new.bias, dtype))


def _add(editor: Editor, node: ir.Node, bias: ir.Value) -> None:
    """Add a bias to what a node gives; a graph output keeps its name."""
    output, uses = node.outputs[0], list(node.outputs[0].uses())
    addition = ir.Node("", "Add", [output, bias], name=editor.unique(f"{node.name}/bias_add"))
    total = addition.outputs[0]
    total.type, total.shape, total.name = output.type, output.shape, editor.unique(f"{output.name}/biased")
    editor.graph.insert_after(node, addition)
    for user, place in uses:
        user.replace_input_with(place, total)
    if output.is_graph_output():
        outputs = editor.graph.outputs
        outputs[outputs.index(output)] = total
        output.name, total.name = total.name, output.name
