"""Merge linear nodes that follow each other directly, where one node is cheaper than the two.

The last factor of one layer often meets the first factor of the next with nothing between them, as in the linear
bottlenecks of MobileNetV2. The value and output projections of attention are not merged across ``softmax(P) @ V``: each
head would need a ``d x d`` product of its own in place of ``d x d/heads`` and ``d/heads x d``, which is dearer unless
there is a single head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError, PreconditionError

from onnx_kfe.kfe import Array
from onnx_kfe.rewrite._editor import Editor, unclear_names
from onnx_kfe.rewrite._pair import Pair, find_pair, is_linear, weight_shape

__all__ = ["Merge", "MergePass", "is_smaller"]


@dataclass(frozen=True)
class Merge:
    """Two linear nodes that one can replace, for the caller to decide whether it shall.

    Attributes:
        first: The node in front.
        second: The node that reads it.
        first_shape: Shape ``[out, in, *kernel]`` of the weight of the first, however the node stores it.
        second_shape: The same of the second.
        merged_shape: The same of the node in their place.
        stride: Positions that the first computes for each one of the second, borders aside.
        kept: Elements of the weights that stay, because other nodes read them too.
    """

    first: ir.Node
    second: ir.Node
    first_shape: tuple[int, ...]
    second_shape: tuple[int, ...]
    merged_shape: tuple[int, ...]
    stride: int = 1
    kept: int = 0

    @property
    def macs(self) -> tuple[int, int]:
        """Multiply-accumulates for each output position: of the two, of the one."""
        apart = self.stride * math.prod(self.first_shape) + math.prod(self.second_shape)
        return apart, math.prod(self.merged_shape)

    @property
    def parameters(self) -> tuple[int, int]:
        """Elements of the weights: before, after."""
        return math.prod(self.first_shape) + math.prod(self.second_shape), math.prod(self.merged_shape) + self.kept


def is_smaller(merge: Merge) -> bool:
    """Whether merging costs neither more multiply-accumulates nor more parameters, and fewer of at least one."""
    changes = [after - before for before, after in (merge.macs, merge.parameters)]
    return max(changes) <= 0 and min(changes) < 0


class MergePass(InPlacePass):
    """Replace pairs of linear nodes by one, their product in float64, until no pair is left that is cheaper as one.

    Both are Conv, Gemm or MatMul with constant weights, and what the first computes is read by the second alone; a
    constant vector that is added between two MatMuls goes behind the product. Pairs are tried front to back, each once,
    so a longer chain ends where no pair of it is worth merging, which need not be its cheapest form.

    Args:
        cheaper: Whether to merge a pair, by whatever cost the caller has in mind.

    Attributes:
        declined: Why linear nodes were not merged with the node in front of them, by node name.
    """

    def __init__(self, cheaper: Callable[[Merge], bool] = is_smaller) -> None:
        super().__init__()
        self.cheaper = cheaper
        self.declined: dict[str, str] = {}

    def requires(self, model: ir.Model) -> None:
        """Every node has a name of its own, as in a normalised model."""
        if unclear := unclear_names(model.graph):
            raise PreconditionError(f"not the name of a single node: '{unclear[0]}'")

    def call(self, model: ir.Model) -> PassResult:
        """Merge the pairs."""
        self.declined = {}
        editor, modified = Editor(model.graph), False
        for node in list(model.graph):  # in topological order: a pair is met at its second node
            while is_linear(node) and (merged := self._merge(node, editor)) is not None:
                node, modified = merged, True
        return PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        """Every node that was declined is in the graph."""
        if gone := sorted(set(self.declined) - {node.name for node in model.graph}):
            raise PostconditionError(f"node {gone[0]} was declined, and is gone")

    def _merge(self, second: ir.Node, editor: Editor) -> ir.Node | None:
        """The node in place of this one and the one in front of it; None where they stay."""
        pair = find_pair(second)
        if pair is None:
            return None
        reason = pair.obstacle()
        if reason is None and not self.cheaper(merge := _describe(pair)):
            shapes = merge.first_shape, merge.second_shape, merge.merged_shape
            reason = "not cheaper: {} and {} would be {}".format(*("x".join(map(str, shape)) for shape in shapes))
        if reason is not None:
            self.declined[second.name or ""] = reason
            return None
        self.declined.pop(pair.first.name or "", None)
        return _write(pair, editor)


def _describe(pair: Pair) -> Merge:
    first, second = weight_shape(pair.first), weight_shape(pair.second)
    kernel = first[2:] if pair.spatial is pair.first else second[2:]
    stride = math.prod(pair.second.attributes.get_ints("strides", ()))
    kept = 0
    for node, shape in ((pair.first, first), (pair.second, second)):
        assert node.inputs[1] is not None
        if any(use.node not in pair.nodes for use in node.inputs[1].uses()):
            kept += math.prod(shape)
    return Merge(pair.first, pair.second, first, second, (second[0], first[1], *kernel), stride, kept)


def _write(pair: Pair, editor: Editor) -> ir.Node:
    """Put one node in the place of a pair, and drop what nothing else reads."""
    first, second = pair.first, pair.second
    old = [value for node in pair.nodes for value in node.inputs if value is not None and value.is_initializer()]
    constant, output = second.inputs[1], second.outputs[0]
    assert constant is not None
    assert constant.dtype is not None
    stem = constant.name or f"{second.name}/weight"
    weight, bias = _product(pair)
    if second.op_type != "Conv" and not second.attributes.get_int("transB", 0):
        weight = weight.T
    inputs = [first.inputs[0], editor.constant(f"{stem}/merged", weight, constant.dtype)]
    if bias is not None and second.op_type != "MatMul":
        inputs.append(editor.constant(f"{stem}/bias", bias, constant.dtype))
    node = ir.Node("", second.op_type, inputs, _attributes(pair), name=editor.unique(f"{second.name}/merged"))
    nodes = [node]
    if bias is not None and second.op_type == "MatMul" and not editor.absorb(output, bias, "merged"):
        # the product's shape is inferred once the graph is whole
        node.outputs[0].name, node.outputs[0].type = editor.unique(f"{node.name}_output"), output.type
        inputs = [node.outputs[0], editor.constant(f"{stem}/bias", bias, constant.dtype)]
        nodes.append(ir.Node("", "Add", inputs, name=editor.unique(f"{second.name}/bias_add")))
    ir.convenience.replace_nodes_and_values(editor.graph, second, pair.nodes, nodes, second.outputs, nodes[-1].outputs)
    for value in old:
        editor.drop_unused(value)
    return node


def _attributes(pair: Pair) -> list[ir.Attr]:
    if pair.second.op_type == "Conv":
        assert pair.spatial is not None
        return list(pair.spatial.attributes.values())
    return [pair.second.attributes[key] for key in ("transB",) if key in pair.second.attributes]


def _product(pair: Pair) -> tuple[Array, Array | None]:
    """Weight ``[out, in, *kernel]`` and bias ``[out]`` of the two in one, None where neither has a bias."""
    (first, second), (between, behind) = pair.weights(), pair.biases()
    taps_first = (np.ascontiguousarray(np.moveaxis(weight, (0, 1), (-2, -1))) for weight in (second, first))
    weight = np.moveaxis(np.matmul(*taps_first), (-2, -1), (0, 1))
    if between is None and behind is None:
        return weight, None
    bias = np.zeros(len(second)) if behind is None else np.broadcast_to(behind, (len(second),))
    if between is not None:
        bias = bias + second.reshape(*second.shape[:2], -1).sum(-1) @ np.broadcast_to(between, (len(first),))
    return weight, bias
