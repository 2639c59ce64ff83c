"""Concrete shapes of every value, for counting multiply-accumulates and positions."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir

from onnx_kfe.errors import UsageError
from onnx_kfe.graph._precision import in_single_precision
from onnx_kfe.graph._serialize import serialize
from onnx_kfe.runtime import create_session, feeds_for

if TYPE_CHECKING:
    import onnxruntime as ort

__all__ = ["concrete_shapes", "infer_shapes", "nominal_input_shapes", "without_weights"]

_NOMINAL_IMAGE = 224
_NOMINAL_SEQUENCE = 128
_SMALL = 1024  # elements: constants that shape arithmetic may read; larger ones are weights


def nominal_input_shapes(
    model: ir.Model, input_shapes: Mapping[str, Sequence[int]] | None = None
) -> dict[str, tuple[int, ...]]:
    """One concrete shape for each graph input: a dynamic batch counts as 1, other free axes as given or typical.

    Args:
        model: The model.
        input_shapes: Shapes by input name, as of ``--input-shape``; a leading 1 stands for a batch fixed by the model.

    Raises:
        UsageError: A given name or shape does not fit the model.
    """
    given = dict(input_shapes or {})
    shapes: dict[str, tuple[int, ...]] = {}
    for value in model.graph.inputs:
        if value.is_initializer() or value.shape is None or not isinstance(value.type, ir.TensorType):
            continue
        declared = list(value.shape)
        name = value.name or ""
        chosen = given.pop(name, None)
        if chosen is not None and len(chosen) != len(declared):
            raise UsageError(f"--input-shape {value.name}: the model expects rank {len(declared)}, not {len(chosen)}")
        shapes[name] = tuple(_nominal(declared)) if chosen is None else _checked(name, chosen, declared)
    if given:
        raise UsageError(f"--input-shape {next(iter(given))}: no such input; the model has {', '.join(shapes)}")
    return shapes


def _checked(name: str, chosen: Sequence[int], declared: Sequence[int | ir.SymbolicDim]) -> tuple[int, ...]:
    shape = list(chosen)
    for axis, dim in enumerate(declared):
        if isinstance(dim, int) and shape[axis] != dim:
            if axis or shape[axis] != 1:
                raise UsageError(f"--input-shape {name}: axis {axis} is fixed at {dim}, not {shape[axis]}")
            shape[axis] = dim
    return tuple(shape)


def _nominal(dims: Sequence[int | ir.SymbolicDim]) -> list[int]:
    free = _NOMINAL_IMAGE if len(dims) >= 4 else _NOMINAL_SEQUENCE
    least = [1] + [0] * len(dims)  # a batch of 0 is a free one; other axes can be empty
    return [
        dim if isinstance(dim, int) and dim >= least[axis] else (1 if axis == 0 else free)
        for axis, dim in enumerate(dims)
    ]


def concrete_shapes(model: ir.Model, input_shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Infer the shape of every value for the given input shapes; values that stay unknown are left out.

    Args:
        model: The model; its own shapes stay as they are.
        input_shapes: A concrete shape for each graph input.
    """
    proto = without_weights(model)
    for info in proto.graph.input:
        if info.name in input_shapes:
            dims = info.type.tensor_type.shape.dim
            for dim, size in zip(dims, input_shapes[info.name], strict=True):
                dim.dim_value = size
    del proto.graph.value_info[:]
    inputs = {info.name for info in proto.graph.input}
    for info in proto.graph.output:
        if info.name not in inputs:
            info.type.tensor_type.ClearField("shape")
    with contextlib.suppress(Exception):
        proto = onnx.shape_inference.infer_shapes(proto, strict_mode=False, data_prop=True)
    shapes = _known_shapes(proto)
    unknown = [value for node in model.graph for value in node.outputs if value.name and value.name not in shapes]
    if unknown:
        with contextlib.suppress(Exception):  # inputs of typical shapes may be no inputs of this model
            shapes |= _run_shapes(model, input_shapes, [value.name or "" for value in unknown])
    return shapes


def infer_shapes(model: ir.Model) -> None:
    """Infer types and shapes of the values of the main graph, in place, as far as ONNX can.

    Those of operators of other domains are as ONNX Runtime says, if it can load them. Bodies are not touched, and
    outputs of the graph keep the shapes that they are declared with.
    """
    with contextlib.suppress(Exception):  # shapes are a help, not a precondition
        _declare_convolutions(model.graph)
        _infer(model)
        others = [node for node in model.graph if not onnx.defs.has(node.op_type, node.domain)]
        if unknown := {value.name: value for node in others for value in node.outputs if value.shape is None}:
            for output in _loaded(model, [name for name in unknown if name]).get_outputs():
                value, dtype = unknown[output.name], output.type.removeprefix("tensor(").removesuffix(")")
                value.type = ir.TensorType(ir.DataType[dtype.upper()])
                value.shape = ir.Shape(output.shape) if output.shape else None  # [] is any rank, too
            _infer(model)


def _infer(model: ir.Model) -> None:
    proto = onnx.shape_inference.infer_shapes(without_weights(model), strict_mode=False, data_prop=True)
    found = {info.name: info.type for info in (*proto.graph.value_info, *proto.graph.output)}
    for value in (output for node in model.graph for output in node.outputs if output.name in found):
        shape = ir.serde.deserialize_type_proto_for_shape(found[value.name])
        value.type = ir.serde.deserialize_type_proto_for_type(found[value.name]) or value.type
        if shape is not None and (value.shape is None or not value.is_graph_output()):
            value.shape = shape


def _declare_convolutions(graph: ir.Graph) -> None:
    """Give what convolutions read and write the rank that it must have, for what comes behind unknown shapes."""
    for node in graph:
        if node.op_type == "Conv" and not node.domain and (weight := node.inputs[1]) and weight.shape is not None:
            for value in (node.inputs[0], node.outputs[0]):
                if value is not None and value.shape is None:
                    value.shape, value.type = ir.Shape([None] * len(weight.shape)), value.type or weight.type


def _run_shapes(
    model: ir.Model, input_shapes: Mapping[str, Sequence[int]], names: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    """The shapes that values have when the model is run, whatever arithmetic of the graph decides them."""
    session = _loaded(in_single_precision(model), names)
    types = {value.name: value.dtype or ir.DataType.FLOAT for value in model.graph.inputs}
    feeds = {name: np.zeros(shape, types[name].numpy()) for name, shape in input_shapes.items()}
    found = zip(names, session.run(list(names), feeds_for(session, feeds)), strict=True)
    return {name: array.shape for name, array in found if isinstance(array, np.ndarray) and array.size}


def _loaded(model: ir.Model, outputs: Sequence[str]) -> ort.InferenceSession:
    """The model as it is in ONNX Runtime, with other outputs."""
    copy = model.clone()
    values = {value.name: value for node in copy.graph for value in node.outputs}
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(values[name] for name in outputs)
    return create_session(serialize(copy), threads=1, optimize=False)


def _known_shapes(proto: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    for info in (*proto.graph.input, *proto.graph.value_info, *proto.graph.output):
        tensor = info.type.tensor_type
        if tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim):
            shapes[info.name] = tuple(dim.dim_value for dim in tensor.shape.dim)
    return shapes


def without_weights(model: ir.Model) -> onnx.ModelProto:
    """The model with large initializers turned into inputs, so that inference neither copies nor serialises them."""
    skeleton = ir.Model(model.graph.clone(), ir_version=model.ir_version, functions=tuple(model.functions.values()))
    for value in list(skeleton.graph.initializers.values()):
        tensor = value.const_value
        if tensor is not None and tensor.size > _SMALL:
            skeleton.graph.initializers.pop(value.name or "")
            value.const_value = None
            value.shape, value.type = ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)
            skeleton.graph.inputs.append(value)
        elif isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.Tensor(tensor.numpy(), tensor.dtype, name=value.name)
    return ir.to_proto(skeleton)
