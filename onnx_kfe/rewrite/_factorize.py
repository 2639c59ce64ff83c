"""Replace layers by the chains that a plan chose for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError, PreconditionError

from onnx_kfe.graph import Layer
from onnx_kfe.kfe import Array
from onnx_kfe.planning import Stage

__all__ = ["Chain", "FactorizePass"]

_GEOMETRY = ("kernel_shape", "strides", "pads", "dilations", "auto_pad")


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
        for name, chain in self.chains.items():
            _replace(model.graph, nodes[name], chain)
        return PassResult(model, modified=bool(self.chains))

    def ensures(self, model: ir.Model) -> None:
        """None of the layers is left."""
        left = [node.name for node in model.graph if node.name in self.chains]
        if left:
            raise PostconditionError(f"node {left[0]} was not replaced")


def _replace(graph: ir.Graph, node: ir.Node, chain: Chain) -> None:
    value = node.inputs[0]
    assert value is not None
    writer = _write_convolution if node.op_type == "Conv" else _write_linear
    nodes: list[ir.Node] = []
    for place, stage in enumerate(chain.stages):
        last = place == len(chain.stages) - 1
        bias = chain.bias if last and np.any(chain.bias) else None
        new = writer(graph, node, value, stage, f"{chain.form}_{place}", bias)
        if not last:
            _describe(new[-1].outputs[0], node, stage)
        nodes += new
        value = new[-1].outputs[0]
    inputs = list(node.inputs[1:])
    if node.op_type == "MatMul" and np.any(chain.bias) and not _absorb_into_add(graph, node, chain):
        addend = _initializer(graph, f"{node.name}/bias", chain.bias, _dtype(node))
        nodes.append(ir.Node("", "Add", [value, addend], name=f"{node.name}/bias_add"))
        value = nodes[-1].outputs[0]
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, node.outputs, [value])
    for old in inputs:
        if old is not None and old.is_initializer() and not old.uses() and not old.is_graph_output():
            graph.initializers.pop(old.name or "")


def _write_convolution(
    graph: ir.Graph, node: ir.Node, value: ir.Value, stage: Stage, suffix: str, bias: Array | None
) -> list[ir.Node]:
    groups, out, inside = stage.weight.shape[:3]
    spatial_axes = len(node.inputs[1].shape) - 2  # type: ignore[union-attr, arg-type]
    kernel = stage.weight.shape[3:] if stage.spatial else (1,) * spatial_axes
    weight = stage.weight.reshape(groups * out, inside, *kernel)
    attributes = [ir.AttrInt64("group", groups), ir.AttrInt64s("kernel_shape", list(kernel))]
    if stage.spatial:
        attributes += [a for key, a in node.attributes.items() if key in _GEOMETRY and key != "kernel_shape"]
    inputs = [value, _initializer(graph, f"{_stem(node)}/{suffix}", weight, _dtype(node))]
    if bias is not None:
        inputs.append(_initializer(graph, f"{_stem(node)}/bias", bias, _dtype(node)))
    return [ir.Node("", "Conv", inputs, attributes, name=f"{node.name}/{suffix}")]


def _write_linear(
    graph: ir.Graph, node: ir.Node, value: ir.Value, stage: Stage, suffix: str, bias: Array | None
) -> list[ir.Node]:
    """Gemm stays Gemm, its weight in the orientation it had; MatMul stays MatMul, its bias an Add by the caller."""
    matrix = stage.weight[0]
    flipped = node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int() == 1
    weight = _initializer(graph, f"{_stem(node)}/{suffix}", matrix if flipped else matrix.T, _dtype(node))
    name = f"{node.name}/{suffix}"
    if node.op_type == "MatMul":
        return [ir.Node("", "MatMul", [value, weight], name=name)]
    inputs = [value, weight]
    if bias is not None:
        inputs.append(_initializer(graph, f"{_stem(node)}/bias", bias, _dtype(node)))
    return [ir.Node("", "Gemm", inputs, [ir.AttrInt64("transB", int(flipped))], name=name)]


def _absorb_into_add(graph: ir.Graph, node: ir.Node, chain: Chain) -> bool:
    """Move the bias of a MatMul into the constant that the next node adds, where it adds one a feature."""
    output = node.outputs[0]
    uses = list(output.uses())
    if len(uses) != 1 or uses[0].node.op_type != "Add" or output.is_graph_output():
        return False
    add, place = uses[0].node, uses[0].idx
    addend = add.inputs[1 - place]
    if addend is None or addend.const_value is None or not addend.is_initializer():
        return False
    if tuple(addend.const_value.shape) != chain.bias.shape:
        return False
    moved = addend.const_value.numpy().astype(np.float64) + chain.bias
    add.replace_input_with(1 - place, _initializer(graph, f"{addend.name}/kfe", moved, _dtype(node)))
    if not addend.uses() and not addend.is_graph_output():
        graph.initializers.pop(addend.name or "")
    return True


def _initializer(graph: ir.Graph, name: str, array: Array, dtype: ir.DataType) -> ir.Value:
    unique, count = name, 1
    while unique in graph.initializers:
        count += 1
        unique = f"{name}_{count}"
    tensor = ir.tensor(np.ascontiguousarray(array, dtype.numpy()), dtype=dtype, name=unique)
    value = ir.Value(name=unique, type=ir.TensorType(dtype), shape=ir.Shape(array.shape), const_value=tensor)
    graph.register_initializer(value)
    return value


def _describe(value: ir.Value, node: ir.Node, stage: Stage) -> None:
    """Name and type the value between two stages; its shape is inferred once the graph is whole."""
    producer = value.producer()
    value.name = f"{producer.name if producer is not None else node.name}_output"
    value.type = node.outputs[0].type


def _dtype(node: ir.Node) -> ir.DataType:
    weight = node.inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    return weight.const_value.dtype


def _stem(node: ir.Node) -> str:
    weight = node.inputs[1]
    return (weight.name if weight is not None else None) or f"{node.name}/weight"
