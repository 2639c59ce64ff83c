"""Operators that ONNX defines by others: what they stand for is computed again, and differentiated node by node.

The forward node stays, and with it the runtime's fused kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from onnx_kfe.autodiff._emitter import constant_of, sizes_of
from onnx_kfe.autodiff._registry import Backward

_DOMAIN = "definition"

__all__ = ["emit_body", "has_body"]


def has_body(op_type: str, opset: int) -> bool:
    """Whether ONNX defines an operator by others in some opset."""
    if not onnx.defs.has(op_type, max_inclusive_version=opset):
        return False
    schema: Any = onnx.defs.get_schema(op_type, opset)
    return schema.has_function or schema.has_context_dependent_function


def emit_body(backward: Backward, node: ir.Node) -> tuple[Sequence[ir.Node], Mapping[ir.Value, ir.Value]] | None:
    """Append the nodes that an operator stands for.

    Args:
        backward: Where to emit.
        node: A node of the graph that grows.

    Returns:
        The nodes, and for each output of `node` the value that equals it; None if the operator stands for no others.
    """
    opset = backward.graph.opset_imports.get("", 1)
    if node.domain or not has_body(node.op_type, opset):
        return None
    try:
        body = _body(node, opset)
    except (RuntimeError, ValueError, onnx.shape_inference.InferenceError):  # no definition for such inputs
        return None
    if any(inner.op_type in ("If", "Loop", "Scan") for inner in body):
        return None
    values: dict[str | None, ir.Value] = {
        value.name: backward.constant(value.const_value.numpy())
        for value in body.initializers.values()
        if value.const_value is not None
    }
    values |= {value.name: value for value in node.inputs if value is not None}
    nodes = []
    for inner in body:
        copy = backward.again(inner, [None if value is None else values[value.name] for value in inner.inputs])
        values |= {own.name: output for own, output in zip(inner.outputs, copy.outputs, strict=True)}
        nodes.append(copy)
    return nodes, {output: values[output.name] for output in node.outputs if output.name}


def _body(node: ir.Node, opset: int) -> ir.Graph:
    """What a node stands for, with the names of its inputs and outputs and with shapes inferred."""
    inputs = {value.name: value for value in node.inputs if value is not None}
    # Shapes and axes say what shapes come out.
    known = {name: array for name, value in inputs.items() if (array := _integers(value)) is not None}
    call = ir.serde.serialize_node(node)
    function = _definition(node, opset)
    _state_defaults(call, opset)
    call.domain = function.domain
    graph = onnx.helper.make_graph(
        [call],
        node.op_type,
        [ir.serde.serialize_value(value) for name, value in inputs.items() if name not in known],
        [ir.serde.serialize_value(value) for value in node.outputs if value.name],
        [onnx.numpy_helper.from_array(array, name) for name, array in known.items()],
    )
    opsets = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(function.domain, 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, functions=[function])
    inlined = onnx.inliner.inline_local_functions(model)
    inferred = ir.from_proto(onnx.shape_inference.infer_shapes(inlined, data_prop=True))
    body = LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(inferred).model.graph
    _make_sizes_private(body, node)
    return body


def _make_sizes_private(body: ir.Graph, node: ir.Node) -> None:
    """Shape inference numbers new sizes from 0 in every graph: they must not look like sizes of the outer one."""
    outer = {size for value in node.inputs if value is not None for size in sizes_of(value) or ()}
    for value in (output for inner in body for output in inner.outputs):
        if (sizes := sizes_of(value)) is not None:
            private = f"{node.outputs[0].name}/"
            value.shape = ir.Shape([private + s if isinstance(s, str) and s not in outer else s for s in sizes])


def _definition(node: ir.Node, opset: int) -> onnx.FunctionProto:
    """The definition of an operator, for the inputs and attributes that a node has."""
    schema: Any = onnx.defs.get_schema(node.op_type, opset)  # the stubs of onnx lack the definitions
    if schema.has_function:
        version = max(known for known in schema.function_opset_versions if known <= opset)
        definition = schema.get_function_with_opset_version(version)
    else:
        version = max(known for known in schema.context_dependent_function_opset_versions if known <= opset)
        call = ir.serde.serialize_node(node).SerializeToString()
        # An input that is left out has the empty type.
        types = [onnx.TypeProto() if v is None else ir.serde.serialize_value(v).type for v in node.inputs]
        serialized = [kind.SerializeToString() for kind in types]
        definition = schema.get_context_dependent_function_with_opset_version(version, call, serialized)
    function = onnx.FunctionProto.FromString(definition)
    function.domain, function.name = _DOMAIN, node.op_type
    for imported in function.opset_import:
        imported.version = opset
    return function


def _state_defaults(call: onnx.NodeProto, opset: int) -> None:
    """Give a node the attributes it leaves to the schema, as the definitions rely on."""
    stated = {attribute.name for attribute in call.attribute}
    for name, attribute in onnx.defs.get_schema(call.op_type, opset).attributes.items():
        if name not in stated and attribute.default_value.type:
            call.attribute.append(attribute.default_value)


def _integers(value: ir.Value) -> np.ndarray | None:
    array = constant_of(value)
    return array if array is not None and array.dtype == np.int64 else None
