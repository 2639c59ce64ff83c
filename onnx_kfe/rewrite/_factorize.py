"""Replace layers by the chains that a plan chose for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError, PreconditionError

from onnx_kfe.graph import Layer, weight_place
from onnx_kfe.kfe import Array
from onnx_kfe.planning import Stage
from onnx_kfe.rewrite._editor import Editor

__all__ = ["Chain", "FactorizePass"]

_CHANNELS = 1  # the axis of them in what a convolution reads


@dataclass(frozen=True)
class Chain:
    """What a layer becomes.

    Attributes:
        layer: The layer, a node of the graph to be rewritten, as are its twins.
        form: Name of the form, for the names of new initializers.
        stages: Weights in order.
        bias: Bias ``[out]`` of the last stage, which gets none where this is zero.
    """

    layer: Layer
    form: str
    stages: list[Stage]
    bias: Array

    def at(self, use: Layer) -> Chain:
        """The chain at a node that shares the weight: a bias of its own moves as that of the layer does."""
        own, given = (np.zeros(len(self.bias)) if bias is None else bias for bias in (use.bias(), self.layer.bias()))
        alike = use is self.layer or np.array_equal(own, given)
        return replace(self, layer=use, bias=self.bias if alike else own + (self.bias - given))


class FactorizePass(InPlacePass):
    """Write each chain in place of its layer: standard operators, the model's own dtype, names from the layer's.

    The factors of ``W @ x`` stay on the left.

    A stage has kernel, strides, pads and dilations of the axes that it carries; the bias goes on the last stage, so
    that an activation behind the layer still fuses with it. Nodes that share a weight share those of its chain. The
    initializers of the layer stay where another node reads them.

    Args:
        chains: What becomes of which layer, by layer name.
    """

    def __init__(self, chains: Mapping[str, Chain]) -> None:
        super().__init__()
        self.chains = dict(chains)
        self._replaced = {*self.chains, *(use.name for chain in chains.values() for use in chain.layer.uses)}

    def requires(self, model: ir.Model) -> None:
        """Every layer named is a node of the graph."""
        names = {node.name for node in model.graph}
        if missing := sorted(self._replaced - names):
            raise PreconditionError(f"no node named {missing[0]}")

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the nodes."""
        nodes = {node.name: node for node in model.graph if node.name in self._replaced}
        editor = Editor(model.graph)
        for chain in self.chains.values():
            for use in chain.layer.uses:
                _Writer(editor, nodes[use.name], chain.at(use)).replace()
        return PassResult(model, modified=bool(self.chains))

    def ensures(self, model: ir.Model) -> None:
        """None of the layers is left."""
        left = [node.name for node in model.graph if node.name in self._replaced]
        if left:
            raise PostconditionError(f"node {left[0]} was not replaced")


class _Writer:
    """Writes the chain of one layer."""

    def __init__(self, editor: Editor, node: ir.Node, chain: Chain) -> None:
        self.place = weight_place(node)
        weight = node.inputs[self.place]
        assert weight is not None
        assert weight.const_value is not None
        self.editor, self.node, self.chain = editor, node, chain
        self.dtype = weight.const_value.dtype
        self.stem = weight.name or f"{node.name}/weight"

    def replace(self) -> None:
        """Put the chain in the layer's place, and drop what nothing else reads."""
        node = self.node
        old = [value for value in node.inputs if value is not None and value.is_initializer()]
        value = node.inputs[1 - self.place]
        assert value is not None
        write = self._convolution if self._dimensions() else self._product
        bias, biased = self._bias()
        added = bias if self.place else bias[:, None]
        nodes: list[ir.Node] = []
        for place, stage in enumerate(self.chain.stages):
            inputs = [value, self._weight(stage, f"{self.chain.form}_{place}")]
            if place == biased and node.op_type != "MatMul" and np.any(bias):
                inputs.append(self._constant("bias", bias))
            nodes.append(write(inputs, stage, self.editor.unique(f"{node.name}/{self.chain.form}_{place}")))
            value = nodes[-1].outputs[0]
            if place < len(self.chain.stages) - 1:  # its shape is inferred once the graph is whole
                value.name, value.type = self.editor.unique(f"{nodes[-1].name}_output"), node.outputs[0].type
        if node.op_type == "MatMul" and np.any(bias) and not self.editor.absorb(node.outputs[0], added, "kfe"):
            inputs = [value, self._constant("bias", added)]
            nodes.append(ir.Node("", "Add", inputs, name=self.editor.unique(f"{node.name}/bias_add")))
            value = nodes[-1].outputs[0]
        ir.convenience.replace_nodes_and_values(self.editor.graph, node, [node], nodes, node.outputs, [value])
        for constant in old:
            self.editor.drop_unused(constant)

    def _bias(self) -> tuple[Array, int]:
        """The bias and the stage that takes it: the last one, or the one before where that reorders."""
        *_, last = self.chain.stages
        place = len(self.chain.stages) - 1
        if not last.reorders:
            return self.chain.bias, place
        bias = np.empty_like(self.chain.bias)
        bias[last.weight.astype(int)] = self.chain.bias
        return bias, place - 1

    def _constant(self, suffix: str, array: Array, dtype: ir.DataType | None = None) -> ir.Value:
        return self.editor.constant(f"{self.stem}/{suffix}", array, dtype or self.dtype)

    def _weight(self, stage: Stage, name: str) -> ir.Value:
        """The weight as the node stores it: Gemm in the orientation it had."""
        if stage.reorders:
            return self._constant(name, stage.weight, ir.DataType.INT64)
        if not self._dimensions():
            return self._constant(name, stage.weight[0] if self._transposed() or not self.place else stage.weight[0].T)
        groups, out, inside = stage.weight.shape[:3]
        carried = iter(stage.weight.shape[3:])
        kernel = [next(carried) if axis in stage.axes else 1 for axis in range(self._dimensions())]
        weight = stage.weight.reshape(groups, out, inside, *kernel)
        if self._operator(stage) == "ConvTranspose":
            weight = weight.swapaxes(1, 2)
        return self._constant(name, weight.reshape(-1, *weight.shape[2:]))

    def _dimensions(self) -> int:
        """Spatial dimensions of a convolution, 0 of a product."""
        shape = self.node.inputs[1].shape  # type: ignore[union-attr]
        assert shape is not None
        return shape.rank() - 2 if self.node.op_type in ("Conv", "ConvTranspose") else 0

    def _operator(self, stage: Stage) -> str:
        """Where nothing is carried, a ConvTranspose is a convolution too."""
        return self.node.op_type if stage.axes else "Conv"

    def _transposed(self) -> bool:
        return self.node.attributes.get_int("transB", 0) == 1

    def _convolution(self, inputs: Sequence[ir.Value], stage: Stage, name: str) -> ir.Node:
        if stage.reorders:
            return ir.Node("", "Gather", inputs, [ir.AttrInt64("axis", _CHANNELS)], name=name)
        kernel = inputs[1].shape.numpy()[2:]  # type: ignore[union-attr]
        attributes = [ir.AttrInt64("group", len(stage.weight)), ir.AttrInt64s("kernel_shape", kernel)]
        if stage.axes:
            attributes += self._carried(stage.axes)
        return ir.Node("", self._operator(stage), inputs, attributes, name=name)

    def _carried(self, axes: Sequence[int]) -> Iterator[ir.Attr]:
        """Strides, pads and dilations of the axes that a stage carries, nothing of the others."""
        dimensions = self._dimensions()
        for name, nothing in (("strides", 1), ("dilations", 1), ("pads", 0), ("output_padding", 0)):
            if name in self.node.attributes:
                values = self.node.attributes[name].as_ints()
                own = [value if place % dimensions in axes else nothing for place, value in enumerate(values)]
                yield ir.AttrInt64s(name, own)
        if "auto_pad" in self.node.attributes:
            yield self.node.attributes["auto_pad"]

    def _product(self, inputs: Sequence[ir.Value], stage: Stage, name: str) -> ir.Node:
        transposed = [ir.AttrInt64("transB", 1)] if self._transposed() else []
        operands = inputs if self.place else inputs[::-1]
        return ir.Node("", self.node.op_type, operands, transposed, name=name)
