"""The layers of a model: every linear node, its geometry, its cost, and why it cannot be pruned if it cannot."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_kfe.graph._bodies import bodies
from onnx_kfe.graph._shapes import concrete_shapes, nominal_input_shapes
from onnx_kfe.graph._shared import tied
from onnx_kfe.graph.fusions import reason_kept

__all__ = ["Geometry", "Layer", "count_macs", "count_parameters", "find_layers", "initializer_array", "weight_place"]

_CONVOLUTIONS = ("Conv", "ConvTranspose")
_LINEAR = (*_CONVOLUTIONS, "Gemm", "MatMul")
_RECURRENT = ("LSTM", "GRU", "RNN")
_LARGEST_PATCH = 12_288  # whose covariance takes 1.2 GB in double precision, several times while it is decomposed
_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Geometry:
    """The shape of a linear layer, all that its cost depends on.

    Attributes:
        in_channels: Input channels (features), over all groups.
        out_channels: Output channels (features), over all groups.
        kernel: Spatial extent of the kernel; empty for Gemm and MatMul.
        strides: One stride for each spatial axis.
        groups: Groups of a convolution; 1 otherwise.
        output_size: Spatial extent of the output; empty for Gemm and MatMul.
        input_size: Spatial extent of the input.
        repeats: How often the layer runs for one sample: leading axes but the batch.
        transposed: Whether it is a ConvTranspose: each position of the input writes a patch of the output.
    """

    in_channels: int
    out_channels: int
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    groups: int = 1
    output_size: tuple[int, ...] = ()
    input_size: tuple[int, ...] = ()
    repeats: int = 1
    transposed: bool = False

    @property
    def positions(self) -> int:
        """Positions T of one sample where the weight is applied: of the output, of a ConvTranspose of the input."""
        return self.repeats * math.prod(self.input_size if self.transposed else self.output_size)

    @property
    def taps(self) -> int:
        """Positions of the kernel, 1 for Gemm and MatMul."""
        return math.prod(self.kernel)

    @property
    def patch_size(self) -> int:
        """Length i of what one group reads at a position: its input channels, times taps unless transposed."""
        return self.in_channels // self.groups * (1 if self.transposed else self.taps)

    @property
    def cotangent_size(self) -> int:
        """Length o of what one group writes at a position: its output channels, times taps where transposed."""
        return self.out_channels // self.groups * (self.taps if self.transposed else 1)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one sample."""
        return self.positions * self.weight_parameters

    @property
    def weight_parameters(self) -> int:
        """Elements of the weight, without bias."""
        return self.groups * self.cotangent_size * self.patch_size

    @property
    def adjoint(self) -> Geometry:
        """Of the layer that passes gradients back: what is read becomes what is written."""
        return replace(
            self, in_channels=self.out_channels, out_channels=self.in_channels, output_size=self.input_size,
            input_size=self.output_size, transposed=not self.transposed,
        )  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """A linear node of the graph.

    Attributes:
        name: Node name, unique in a normalised graph.
        op_type: Conv, ConvTranspose, Gemm or MatMul, the recurrent operator whose weight it is, or a fused operator
            that is in the way of some.
        input: Name of the value that the layer reads.
        output: Name of the value that the layer writes.
        geometry: Shape and cost; None when the shapes could not be inferred.
        reason: Why the layer cannot be pruned; None when it can.
        node: The node itself.
        twins: Other nodes with the same weight that are pruned with this one.
    """

    name: str
    op_type: str
    input: str
    output: str
    geometry: Geometry | None
    reason: str | None
    node: ir.Node = field(compare=False, repr=False)
    twins: tuple[Layer, ...] = field(default=(), repr=False)

    @property
    def uses(self) -> tuple[Layer, ...]:
        """All nodes that are pruned as one, because they share the weight: this one and its twins."""
        return (self, *self.twins)

    @property
    def prunable(self) -> bool:
        """Whether the layer can be replaced by a smaller form."""
        return self.reason is None

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one sample; 0 when unknown."""
        return self.geometry.macs if self.geometry else 0

    @property
    def parameters(self) -> int:
        """Elements of weight and bias that are constants of this layer; of a recurrent one those of its weight."""
        if self.op_type in _RECURRENT:
            return self.geometry.weight_parameters if self.geometry else 0
        return sum(
            math.prod(v.shape.numpy()) for v in self.node.inputs if v is not None and v.is_initializer() and v.shape
        )

    @property
    def left(self) -> bool:
        """Whether it is ``W @ x``: its features are the last axis but one of what it reads and writes."""
        return weight_place(self.node) == 0

    @property
    def transposed(self) -> bool:
        """Whether it is a ConvTranspose."""
        return self.op_type == "ConvTranspose"

    @property
    def weight_value(self) -> ir.Value | None:
        """The operand that is the weight, constant or not."""
        return self.node.inputs[weight_place(self.node)]

    def weight(self) -> Array:
        """The weight as ``[groups, out/groups, in/groups, *kernel]``, float64, whatever the node stores."""
        array = initializer_array(self.weight_value)
        if (self.op_type == "MatMul" and not self.left) or (
            self.op_type == "Gemm" and not _int(self.node, "transB", 0)
        ):
            array = array.T
        if self.op_type == "Gemm":
            array = array * _float(self.node, "alpha", 1.0)
        groups = self.geometry.groups if self.geometry else 1
        array = array.reshape(groups, array.shape[0] // groups, *array.shape[1:])
        return array.swapaxes(1, 2) if self.transposed else array

    def bias(self) -> Array | None:
        """The bias ``[out]`` in float64, None where the node has none."""
        if len(self.node.inputs) < 3 or self.node.inputs[2] is None:
            return None
        array = initializer_array(self.node.inputs[2]).reshape(-1)
        if self.op_type == "Gemm":
            array = array * _float(self.node, "beta", 1.0)
        out = self.geometry.out_channels if self.geometry else array.size
        return np.broadcast_to(array, (out,)).copy()


def weight_place(node: ir.Node) -> int:
    """Which input of a linear node is its weight: the first of a MatMul whose only constant is there."""
    left, right = node.inputs[:2]
    constant = left is not None and left.const_value is not None
    return 0 if node.op_type == "MatMul" and constant and (right is None or right.const_value is None) else 1


def initializer_array(value: ir.Value | None) -> Array:
    """A constant value as a float64 array."""
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy().astype(np.float64)


def find_layers(model: ir.Model, input_shapes: Mapping[str, Sequence[int]] | None = None) -> list[Layer]:
    """Every linear node of a normalised model, in graph order, those that share a weight `tied`.

    The two weights of every recurrent node are among them.

    Args:
        model: A normalised model.
        input_shapes: Shapes of inputs with free axes; a dynamic batch counts as 1.
    """
    nominal = nominal_input_shapes(model, input_shapes)
    shapes = concrete_shapes(model, nominal)
    batch = next((shape[0] for shape in nominal.values() if shape), 1)
    layers: list[Layer] = []
    for name, node in _named_nodes(model.graph):
        if node.op_type in _RECURRENT and node.domain == "":
            layers += _recurrent_layers(name, node, shapes, batch)
        hidden = _hides_layers(node)
        if not hidden and (node.op_type not in _LINEAR or node.domain != ""):
            continue
        geometry = None if hidden else _geometry(node, shapes, batch)
        reason = reason_kept(node, model.opset_imports.get("", 1)) if hidden else _reason(node, geometry, model.graph)
        x, y = node.inputs[1 - weight_place(node)], node.outputs[0]
        layers.append(Layer(name, node.op_type, (x.name if x else "") or "", y.name or "", geometry, reason, node))
    return tied(layers)


def _hides_layers(node: ir.Node) -> bool:
    """Whether a fused node of ONNX Runtime has a constant matrix where linear nodes have their weight."""
    weight = node.inputs[1] if node.domain == "com.microsoft" and len(node.inputs) > 1 else None
    return weight is not None and weight.const_value is not None and len(weight.const_value.shape) > 1


def _named_nodes(graph: ir.Graph) -> Iterator[tuple[str, ir.Node]]:
    """All nodes with a name for each: that of those in bodies, which others may have too, behind the operator's."""
    for node in graph:
        name = node.name or ""
        yield name, node
        for attribute, body in bodies(node).items():
            for place, (inner_name, inner) in enumerate(_named_nodes(body)):
                yield f"{name}/{attribute}/{inner_name or place}", inner


def _reason(node: ir.Node, geometry: Geometry | None, main: ir.Graph) -> str | None:
    weight = node.inputs[weight_place(node)]
    if node.graph is not main:
        return "inside the body of a control-flow operator"
    if weight is None or weight.const_value is None:
        left = node.inputs[0]
        return (
            "the constant is the left operand"
            if left is not None and left.const_value is not None
            else "no constant weight"
        )
    if weight.dtype not in _FLOATS:
        return f"weight is {weight.dtype}"
    if weight.is_graph_output():
        return "weight is a graph output"
    if "output_shape" in node.attributes:
        return "its output_shape is given, and pads cannot say it"
    if node.op_type in _CONVOLUTIONS and len(weight.const_value.shape) > 5:
        return "a convolution over more than three axes"
    if node.op_type == "Gemm" and _int(node, "transA", 0):
        return "Gemm with a transposed input"
    if node.op_type == "MatMul" and len(weight.const_value.shape) != 2:
        return f"weight of rank {len(weight.const_value.shape)}"
    if weight_place(node) == 0 and node.outputs[0].shape is not None and len(node.outputs[0].shape) < 2:
        return "multiplies a vector"
    if len(node.inputs) > 2 and node.inputs[2] is not None and node.inputs[2].const_value is None:
        return "bias is computed in the graph"
    if node.op_type == "Gemm" and len(node.inputs) > 2 and not _is_vector(node.inputs[2]):
        return "Gemm whose addend is not a bias vector"
    if geometry is None:
        return "shapes unknown: give --input-shape"
    if geometry.groups > 1 and geometry.groups in (geometry.in_channels, geometry.out_channels):
        return "depthwise"
    if min(geometry.cotangent_size, geometry.patch_size) < 2:
        return "too small to factorise"
    if geometry.patch_size > _LARGEST_PATCH:
        return f"input covariance of {geometry.patch_size:,} x {geometry.patch_size:,} is too large"
    if geometry.transposed and geometry.cotangent_size > _LARGEST_PATCH:
        return f"gradient covariance of {geometry.cotangent_size:,} x {geometry.cotangent_size:,} is too large"
    return None


def _is_vector(value: ir.Value | None) -> bool:
    if value is None or value.const_value is None:
        return value is None
    shape = value.const_value.shape.numpy()
    return math.prod(shape) == (shape[-1] if shape else 1)


def _geometry(node: ir.Node, shapes: Mapping[str, tuple[int, ...]], batch: int) -> Geometry | None:
    place = weight_place(node)
    operands = node.inputs[1 - place], node.inputs[place], node.outputs[0]
    names = [value.name if value is not None else None for value in operands]
    if any(name not in shapes for name in names):
        return None
    x, w, y = (shapes[name] for name in names if name is not None)
    kernel: tuple[int, ...] = ()
    groups = 1
    transposed = node.op_type == "ConvTranspose"
    if node.op_type in _CONVOLUTIONS:
        kernel, groups = w[2:], _int(node, "group", 1)
        inputs, outputs = x[1], w[1] * groups if transposed else w[0]
    elif not x or not y:
        return None
    elif place == 0:
        inputs, outputs = w[-1], math.prod(w[:-1])
    else:
        inputs = x[0] if node.op_type == "Gemm" and _int(node, "transA", 0) else x[-1]
        outputs = w[0] if node.op_type == "Gemm" and _int(node, "transB", 0) else (w[-1] if len(w) > 1 else 1)
    strides = _ints(node, "strides", (1,) * len(kernel))
    sizes = (y[2:], x[2:]) if kernel else ((), ())
    total = math.prod(y) // max(outputs * math.prod(y[2:] if kernel else ()), 1)
    repeats = total // batch if total % batch == 0 else total
    return Geometry(inputs, outputs, kernel, strides, groups, *sizes, repeats, transposed)


def _recurrent_layers(name: str, node: ir.Node, shapes: Mapping[str, tuple[int, ...]], batch: int) -> Iterator[Layer]:
    """W, which multiplies inputs, and R, which multiplies states: rows are gates, those of both directions together."""
    x, w, r = (shapes.get(value.name or "") if value is not None else None for value in node.inputs[:3])
    geometries: list[Geometry | None] = [None, None]
    if x and w and r:
        (directions, gates, inputs), steps = w, math.prod(x[:2]) // batch
        geometries = [
            Geometry(inputs, directions * gates, repeats=steps),
            Geometry(directions * r[2], directions * gates, groups=directions, repeats=steps),
        ]
    source, output = node.inputs[0], next((value.name for value in node.outputs if value.name), "")
    for weight, geometry in zip("WR", geometries, strict=True):
        yield Layer(
            f"{name}/{weight}", node.op_type, (source.name if source else "") or "", output, geometry, "recurrent", node
        )


def count_macs(model: ir.Model, input_shapes: Mapping[str, Sequence[int]] | None = None) -> int:
    """Multiply-accumulates of one sample in all linear and recurrent nodes, constant weights or not."""
    return sum(layer.macs for layer in find_layers(model, input_shapes))


def count_parameters(model: ir.Model) -> int:
    """Elements of all floating-point initializers."""
    return sum(
        value.const_value.size
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.dtype in _FLOATS
    )


def _int(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return attribute.as_int() if attribute is not None else default


def _float(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return attribute.as_float() if attribute is not None else default


def _ints(node: ir.Node, name: str, default: Sequence[int]) -> tuple[int, ...]:
    attribute = node.attributes.get(name)
    return tuple(attribute.as_ints()) if attribute is not None else tuple(default)
