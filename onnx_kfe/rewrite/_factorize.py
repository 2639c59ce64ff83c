"""Replace layers by the chains that a plan chose for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError, PreconditionError

from onnx_kfe.graph import Layer
from onnx_kfe.kfe import Array
from onnx_kfe.planning import Stage
from onnx_kfe.rewrite._constants import Constants

__all__ = ["Chain", "FactorizePass"]

_GEOMETRY = ("strides", "pads", "dilations", "auto_pad")


@dataclass(frozen=True)
class Chain:
    """What a layer becomes.

    Attributes:
        layer: The layer, a node of the graph to be rewritten.
        form: Name of the form, for the names of new initializers.
        stages: Weights in order.
        bias: Bias ``[out]`` of the last stage, which gets none where this is zero.
    """

    layer: Layer
    form: str
    stages: list[Stage]
    bias: Array


class FactorizePass(InPlacePass):
    """Write each chain in place of its layer: standard operators, the model's own dtype, names from the layer's.

    The spatial stage carries kernel, strides, pads and dilations; the bias goes on the last stage, so that an
    activation behind the layer still fuses with it. The initializers of the layer stay where another node reads them.

    Args:
        chains: What becomes of which layer, by layer name.
    """

    def __init__(self, chains: Mapping[str, Chain]) -> None:
        super().__init__()
        self.chains = dict(chains)

    def requires(self, model: ir.Model) -> None:
        """Every layer named is a node of the graph."""
        names = {node.name for node in model.graph}
        if missing := sorted(set(self.chains) - names):
            raise PreconditionError(f"no node named {missing[0]}")

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the nodes."""
        nodes = {node.name: node for node in model.graph if node.name in self.chains}
        constants = Constants(model.graph)
        for name, chain in self.chains.items():
            _Writer(model.graph, nodes[name], chain, constants).replace()
        return PassResult(model, modified=bool(self.chains))

    def ensures(self, model: ir.Model) -> None:
        """None of the layers is left."""
        left = [node.name for node in model.graph if node.name in self.chains]
        if left:
            raise PostconditionError(f"node {left[0]} was not replaced")


class _Writer:
    """Writes the chain of one layer."""

    def __init__(self, graph: ir.Graph, node: ir.Node, chain: Chain, constants: Constants) -> None:
        weight = node.inputs[1]
        assert weight is not None
        assert weight.const_value is not None
        self.graph, self.node, self.chain, self.constants = graph, node, chain, constants
        self.dtype = weight.const_value.dtype
        self.stem = weight.name or f"{node.name}/weight"

    def replace(self) -> None:
        """Put the chain in the layer's place, and drop what nothing else reads."""
        node, bias = self.node, self.chain.bias
        old = [value for value in node.inputs[1:] if value is not None and value.is_initializer()]
        value = node.inputs[0]
        assert value is not None
        write = self._convolution if node.op_type == "Conv" else self._product
        nodes: list[ir.Node] = []
        for place, stage in enumerate(self.chain.stages):
            last = place == len(self.chain.stages) - 1
            inputs = [value, self._constant(f"{self.chain.form}_{place}", self._layout(stage))]
            if last and node.op_type != "MatMul" and np.any(bias):
                inputs.append(self._constant("bias", bias))
            nodes.append(write(inputs, stage, self.constants.unique(f"{node.name}/{self.chain.form}_{place}")))
            value = nodes[-1].outputs[0]
            if not last:  # its shape is inferred once the graph is whole
                value.name, value.type = self.constants.unique(f"{nodes[-1].name}_output"), node.outputs[0].type
        if node.op_type == "MatMul" and np.any(bias) and not self._absorbed_by_add():
            inputs = [value, self._constant("bias", bias)]
            nodes.append(ir.Node("", "Add", inputs, name=self.constants.unique(f"{node.name}/bias_add")))
            value = nodes[-1].outputs[0]
        ir.convenience.replace_nodes_and_values(self.graph, node, [node], nodes, node.outputs, [value])
        for constant in old:
            self.constants.drop_unused(constant)

    def _layout(self, stage: Stage) -> Array:
        """The weight as the node stores it: Gemm in the orientation it had."""
        if self.node.op_type != "Conv":
            return stage.weight[0] if self._transposed() else stage.weight[0].T
        groups, out, inside = stage.weight.shape[:3]
        kernel = stage.weight.shape[3:] if stage.spatial else (1,) * (self.node.inputs[1].shape.rank() - 2)  # type: ignore[union-attr]
        return stage.weight.reshape(groups * out, inside, *kernel)

    def _transposed(self) -> bool:
        return self.node.attributes.get_int("transB", 0) == 1

    def _convolution(self, inputs: Sequence[ir.Value], stage: Stage, name: str) -> ir.Node:
        kernel = inputs[1].shape.numpy()[2:]  # type: ignore[union-attr]
        attributes = [ir.AttrInt64("group", len(stage.weight)), ir.AttrInt64s("kernel_shape", kernel)]
        if stage.spatial:
            attributes += [self.node.attributes[key] for key in _GEOMETRY if key in self.node.attributes]
        return ir.Node("", "Conv", inputs, attributes, name=name)

    def _product(self, inputs: Sequence[ir.Value], stage: Stage, name: str) -> ir.Node:
        transposed = [ir.AttrInt64("transB", 1)] if self._transposed() else []
        return ir.Node("", self.node.op_type, inputs, transposed, name=name)

    def _absorbed_by_add(self) -> bool:
        """Move the bias of a MatMul into the constant that the next node adds, where it adds one a feature."""
        output = self.node.outputs[0]
        uses = list(output.uses())
        if len(uses) != 1 or uses[0].node.op_type != "Add" or output.is_graph_output():
            return False
        add, place = uses[0].node, 1 - uses[0].idx
        addend = add.inputs[place]
        if addend is None or not addend.is_initializer() or addend.const_value is None:
            return False
        if addend.const_value.shape != self.chain.bias.shape:
            return False
        moved = addend.const_value.numpy().astype(np.float64) + self.chain.bias
        add.replace_input_with(place, self.constants.add(f"{addend.name}/kfe", moved, self.dtype))
        self.constants.drop_unused(addend)
        return True

    def _constant(self, name: str, array: Array) -> ir.Value:
        return self.constants.add(f"{self.stem}/{name}", array, self.dtype)
