"""Workloads: single nodes of a chain with all that their latency depends on, and models that run many of them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_kfe.graph import Geometry, Layer
from onnx_kfe.planning._chain import Link, sized

__all__ = ["Workload", "micro_model", "workloads"]

_FUSED = {  # with the convolution in front, by the runtime; Clip costs as much as Relu and needs no bounds
    "Relu": "Relu", "Clip": "Relu", "LeakyRelu": "LeakyRelu", "Sigmoid": "Sigmoid", "Tanh": "Tanh",
}  # fmt: skip
_OPSET, _IR_VERSION = 17, 8


@dataclass(frozen=True)
class Workload:
    """A convolution, product or reordering of channels at fixed shapes.

    Attributes:
        operator: Conv, ConvTranspose, Gemm, MatMul or Gather.
        inputs: Input channels, over all groups.
        outputs: Output channels, over all groups.
        groups: Groups.
        leading: Batch times repeats for convolutions and Gemm, ``(batch, repeats)`` for MatMul.
        size: Spatial extents of the input.
        kernel: Spatial extents of the kernel.
        attributes: Strides, pads, dilations and auto_pad as name and value.
        activation: Operator behind the node that the runtime fuses with it, empty for none.
        dtype: Name of the element type.
    """

    operator: str
    inputs: int
    outputs: int
    groups: int
    leading: tuple[int, ...]
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    attributes: tuple[tuple[str, tuple[int, ...] | str], ...]
    activation: str
    dtype: str

    @property
    def key(self) -> str:
        """What identifies it in a file."""
        return json.dumps(dataclasses.astuple(self))

    @property
    def family(self) -> Workload:
        """What it has in common with those of other numbers of channels, between which latency is interpolated."""
        groups = -1 if self.groups == self.inputs > 1 else self.groups  # depthwise at any width
        return dataclasses.replace(self, inputs=0, outputs=0, groups=groups)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of what it reads."""
        return (*self.leading, self.inputs, *self.size) if self.size else (*self.leading, self.inputs)

    @property
    def elements(self) -> int:
        """Elements read, written and of the weight."""
        return math.prod(self.leading) * math.prod(self.size) * (self.inputs + self.outputs) + self._weight_size

    @property
    def _weight_size(self) -> int:
        return self.outputs * self.inputs // self.groups * math.prod(self.kernel)


def workloads(layer: Layer, links: Sequence[Link], batch: int) -> Iterator[Workload]:
    """The workloads of a chain in place of a layer; ``W @ x`` is timed as ``x @ W``."""
    geometry = layer.geometry
    assert geometry is not None
    weight = layer.weight_value
    assert weight is not None
    leading = (batch, geometry.repeats) if layer.op_type == "MatMul" else (batch * geometry.repeats,)
    for place, (link, before, _) in enumerate(sized(geometry, links)):
        last = place == len(links) - 1
        operator = "Gather" if link.reorders else "Conv" if layer.transposed and not link.axes else layer.op_type
        yield Workload(
            operator, link.inputs, link.outputs, link.groups, leading, before,
            tuple(k if axis in link.axes else 1 for axis, k in enumerate(geometry.kernel)),
            () if link.reorders else tuple(_attributes(layer, geometry, link.axes)),
            _activation(layer) if last and operator == "Conv" else "",
            weight.dtype.name if weight.dtype is not None else "FLOAT",
        )  # fmt: skip


def _attributes(layer: Layer, geometry: Geometry, axes: Sequence[int]) -> Iterator[tuple[str, tuple[int, ...] | str]]:
    """Of the axes carried, as the rewriting writes them; what is as by default is left out."""
    dimensions = len(geometry.kernel)
    for name, nothing in (("strides", 1), ("pads", 0), ("dilations", 1), ("output_padding", 0)):
        if dimensions and name in layer.node.attributes:
            values = layer.node.attributes[name].as_ints()
            own = tuple(value if place % dimensions in axes else nothing for place, value in enumerate(values))
            if set(own) != {nothing}:
                yield name, own
    if dimensions and axes and "auto_pad" in layer.node.attributes:
        yield "auto_pad", layer.node.attributes["auto_pad"].as_string()


def _activation(layer: Layer) -> str:
    uses = layer.node.outputs[0].uses()
    operators = {use.node.op_type for use in uses}
    (operator,) = operators if len(uses) == 1 else {""}
    return _FUSED.get(operator, "")


def micro_model(given: Sequence[Workload]) -> ir.Model:
    """A model that runs each workload once, one after the other.

    Nodes and values of the n-th workload are named ``w<n>/``. What it reads is computed just before it, an offset added
    to an input of the model, and so lies in the caches of all cores as it would behind another layer; without that
    small convolutions were up to a third faster. A global average, or mean, follows each, so that little is held and
    nothing is converted behind it.
    """
    graph = ir.Graph([], [], nodes=[], opset_imports={"": _OPSET}, name="workloads")
    inputs: dict[tuple[object, ...], ir.Value] = {}
    random = np.random.default_rng(0)
    for place, workload in enumerate(given):
        shape, dtype = workload.input_shape, _dtype(workload)
        source = inputs.get((shape, dtype))
        if source is None:
            source = ir.Value(name=f"x{len(inputs)}", type=ir.TensorType(dtype), shape=ir.Shape(shape))
            inputs[shape, dtype] = source
            graph.inputs.append(source)
        offset = _constant(graph, f"offset{place}", np.array(place, dtype.numpy()))  # each its own, or they become one
        graph.append(ir.Node("", "Add", [source, offset], name=f"source{place}"))
        read = graph[-1].outputs[0]
        read.name = f"source{place}/y"
        _append(graph, workload, read, f"w{place}/", random)
    return ir.Model(graph, ir_version=_IR_VERSION)


def _append(graph: ir.Graph, workload: Workload, read: ir.Value, name: str, random: np.random.Generator) -> None:
    dtype = _dtype(workload)
    attributes: list[ir.Attr] = []
    if "Conv" in workload.operator:
        shape = (workload.outputs, workload.inputs // workload.groups, *workload.kernel)
        if workload.operator == "ConvTranspose":
            shape = (workload.inputs, workload.outputs // workload.groups, *workload.kernel)
        weight: np.ndarray = random.normal(size=shape).astype(dtype.numpy())
        attributes = [ir.AttrInt64("group", workload.groups), ir.AttrInt64s("kernel_shape", workload.kernel)]
        for key, value in workload.attributes:
            attributes.append(ir.AttrString(key, value) if isinstance(value, str) else ir.AttrInt64s(key, value))
    elif workload.operator == "Gather":
        weight, attributes = random.permutation(workload.inputs), [ir.AttrInt64("axis", 1)]
    else:
        weight = random.normal(size=(workload.inputs, workload.outputs)).astype(dtype.numpy())
    constant = _constant(graph, f"{name}weight", weight)
    graph.append(ir.Node("", workload.operator, [read, constant], attributes, name=name))
    if workload.activation:
        graph[-1].outputs[0].name = f"{name}linear"
        graph.append(ir.Node("", workload.activation, graph[-1].outputs, name=f"{name}activation"))
    graph[-1].outputs[0].name = f"{name}y"
    mean = "GlobalAveragePool" if workload.size else "ReduceMean"
    graph.append(ir.Node("", mean, graph[-1].outputs, name=f"mean{name}"))
    result = graph[-1].outputs[0]
    result.name, result.type = f"mean{name}y", ir.TensorType(dtype)
    graph.outputs.append(result)


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    constant = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(constant)
    return constant


def _dtype(workload: Workload) -> ir.DataType:
    return ir.DataType[workload.dtype]
