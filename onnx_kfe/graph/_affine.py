"""Constant scales and shifts around convolutions, which go into these, and what of activations is written out."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from onnx_kfe.graph._replacement import is_constant

__all__ = ["AffinePass", "HardSigmoidPass", "clip_bounds"]

Array = npt.NDArray[np.float64]

_AFFINE = ("Add", "Sub", "Mul", "Div")
_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE)  # in others each product rounds visibly
_OLDEST_OPSET = 7  # whose operators broadcast as those of today
_SMALLEST_SCALE = 1e-4  # below which shifts that are divided by it grow beyond measure


class AffinePass(InPlacePass):
    """Take constant scales and shifts of channels into the convolution in front of them or behind them.

    A convolution that pads takes no shift in front of it, for its zeros would have to be shifted as well; it takes the
    scale in front of that. Weights that several nodes share stay as they are.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Fold around every convolution of the main graph."""
        if model.graph.opset_imports.get("", 1) < _OLDEST_OPSET:
            return PassResult(model, modified=False)
        modified = False
        for node in list(model.graph):
            if node.op_type == "Conv" and node.domain == "" and _is_own(node):
                while _fold_behind(node) or _fold_in_front(node) or _fold_past_shift(node):
                    modified = True
        return PassResult(model, modified=modified)


class HardSigmoidPass(InPlacePass):
    """Write ``Clip(x + a, 0, c) / c`` as HardSigmoid and ``x Clip(x + a, 0, c) / c`` as x times that.

    Exporters of operator sets without HardSwish write it as four elementwise operators, which take twice the time.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the nodes of the main graph."""
        if model.graph.opset_imports.get("", 1) < _OLDEST_OPSET:
            return PassResult(model, modified=False)
        found = [node for node in list(model.graph) if node.op_type == "Clip" and node.domain == "" and _gate(node)]
        return PassResult(model, modified=bool(found))


def clip_bounds(node: ir.Node) -> tuple[float, float] | None:
    """Least and largest value of a Clip of any operator set; None where they are computed."""
    bounds = [node.attributes.get_float("min", -np.inf), node.attributes.get_float("max", np.inf)]
    for place, bound in enumerate(node.inputs[1:3]):
        if bound is None:
            continue
        constant = ir.convenience.get_const_tensor(bound)
        if constant is None:
            return None
        bounds[place] = float(constant.numpy().item())
    return bounds[0], bounds[1]


def _gate(clip: ir.Node) -> bool:
    """Rewrite what a Clip is part of; whether that was a gate."""
    bounds, shift = clip_bounds(clip), _constant_operand(clip.inputs[0])
    user = _only_user(clip.outputs[0])
    if bounds is None or shift is None or user is None:
        return False
    (add, x, offset), (least, most) = shift, bounds
    if add.op_type != "Add" or offset.size != 1 or x.dtype not in (*_FLOATS, ir.DataType.FLOAT16):
        return False
    if least != 0 or not 0 < most < np.inf or _only_user(add.outputs[0]) is not clip:
        return False
    product = user if user.op_type == "Mul" and {*user.inputs} == {x, clip.outputs[0]} else None
    scale = _scale(_only_user(product.outputs[0]) if product is not None else user)
    if scale is None or not np.isclose(scale[1] * most, 1, rtol=1e-6):
        return False
    last = scale[0]
    gate = _node(last, "HardSigmoid", [x], alpha=1 / most, beta=float(offset.item()) / most)
    new = [gate] if product is None else [gate, _node(last, "Mul", [x, gate.outputs[0]])]
    old = [add, clip, *([] if product is None else [product]), last]
    ir.convenience.replace_nodes_and_values(_graph(last), last, list(reversed(old)), new, last.outputs, new[-1].outputs)
    return True


def _scale(node: ir.Node | None) -> tuple[ir.Node, float] | None:
    """A node that multiplies by one constant, and that."""
    if node is None or node.op_type not in ("Mul", "Div"):
        return None
    found = _constant_operand(node.outputs[0])
    return None if found is None or found[2].size != 1 else (node, _factor(node, found[2]).item())


def _node(place: ir.Node, op_type: str, inputs: list[ir.Value], **attributes: float) -> ir.Node:
    """A node, whose output is of the type of another's and is named after it."""
    given = [ir.AttrFloat32(key, value) for key, value in attributes.items()]
    node = ir.Node("", op_type, inputs, given, name=f"{place.name}/{op_type.lower()}")
    node.outputs[0].name = f"{place.outputs[0].name}/{op_type.lower()}"
    node.outputs[0].type, node.outputs[0].shape = place.outputs[0].type, place.outputs[0].shape
    return node


def _is_own(node: ir.Node) -> bool:
    """Whether the weight is a constant that only this node reads."""
    weight, bias = (*node.inputs, None)[1:3]
    assert weight is not None
    own = is_constant(weight) and len(weight.uses()) == 1 and weight.dtype in _FLOATS
    return own and (bias is None or is_constant(bias))


def _fold_behind(node: ir.Node) -> bool:
    output = node.outputs[0]
    user = _only_user(output)
    found = None if user is None else _constant_operand(user.outputs[0])
    weight, bias = _parameters(node)
    vector = None if found is None else _channels(found[2], len(weight), weight.ndim)
    if user is None or found is None or vector is None:
        return False
    if user.op_type in ("Add", "Sub"):
        _write(node, weight, bias + _term(user, vector))
    else:
        factor = _factor(user, vector)
        _write(node, weight * factor.reshape(-1, *[1] * (weight.ndim - 1)), bias * factor)
    _bypass(user, output)
    return True


def _fold_in_front(node: ir.Node) -> bool:
    found = _affine_in_front(node, node.inputs[0])
    if found is None:
        return False
    affine, x, vector = found
    weight, bias = _parameters(node)
    groups = node.attributes.get_int("group", 1)
    by_input = vector.reshape(groups, 1, weight.shape[1], *[1] * (weight.ndim - 2))
    apart = weight.reshape(groups, -1, *weight.shape[1:])
    if affine.op_type in ("Mul", "Div"):
        _write(node, (apart * _factor(affine, by_input)).reshape(weight.shape), bias)
    elif _pads(node):
        return False
    else:
        moved = (apart * _term(affine, by_input)).reshape(len(weight), -1).sum(axis=1)
        _write(node, weight, bias + moved)
    _bypass(affine, x)
    return True


def _fold_past_shift(node: ir.Node) -> bool:
    """``s x + b`` in front is ``s (x + b / s)``, so that the scale can go where the shift cannot."""
    shift = _affine_in_front(node, node.inputs[0])
    scale = None if shift is None else _affine_in_front(node, shift[1])
    if shift is None or scale is None or scale[0].op_type not in ("Mul", "Div"):
        return False
    factor = _factor(scale[0], scale[2])
    if np.abs(factor).min() < _SMALLEST_SCALE:
        return False
    add, _, vector = shift
    place = next(place for place, value in enumerate(add.inputs) if is_constant(value))
    old = add.inputs[place]
    assert old is not None
    shape = (-1, *[1] * (_parameters(node)[0].ndim - 2))
    add.replace_input_with(place, _constant(old, (vector / factor).reshape(shape), f"{add.name}/shift"))
    _bypass(scale[0], scale[1])
    weight, bias = _parameters(node)
    groups = node.attributes.get_int("group", 1)
    by_input = factor.reshape(groups, 1, weight.shape[1], *[1] * (weight.ndim - 2))
    _write(node, (weight.reshape(groups, -1, *weight.shape[1:]) * by_input).reshape(weight.shape), bias)
    return True


def _affine_in_front(node: ir.Node, value: ir.Value | None) -> tuple[ir.Node, ir.Value, Array] | None:
    """The node that scales or shifts a value that nothing else reads, what it does that to, and by how much."""
    if value is None or _only_user(value) is None:
        return None
    found = _constant_operand(value)
    weight = _parameters(node)[0]
    channels = weight.shape[1] * node.attributes.get_int("group", 1)
    vector = None if found is None else _channels(found[2], channels, weight.ndim)
    if found is None or vector is None:
        return None
    affine, x, constant = found
    assert x.shape is not None
    grows = len(x.shape) != weight.ndim or (constant.size > 1 and x.shape[1] != channels)
    return None if grows else (affine, x, vector)


def _constant_operand(value: ir.Value | None) -> tuple[ir.Node, ir.Value, Array] | None:
    """The node that makes a value by adding, subtracting, multiplying or dividing by a constant; of what, and which."""
    node = None if value is None else value.producer()
    if node is None or node.op_type not in _AFFINE or node.domain:
        return None
    first, second = node.inputs
    if is_constant(first) and node.op_type in ("Add", "Mul"):
        first, second = second, first
    if first is None or second is None or is_constant(first) or not is_constant(second):
        return None
    assert second.const_value is not None
    constant = second.const_value.numpy().astype(np.float64)
    grows = first.shape is None or len(first.shape) < constant.ndim
    return None if grows or (node.op_type == "Div" and not constant.all()) else (node, first, constant)


def _channels(constant: Array, channels: int, rank: int) -> Array | None:
    """A constant as a vector ``[channels]``; None where it differs between positions or samples."""
    if constant.ndim > rank:
        return None
    shape = (1,) * (rank - constant.ndim) + constant.shape
    if shape[0] != 1 or shape[1] not in (1, channels) or any(size != 1 for size in shape[2:]):
        return None
    return np.broadcast_to(constant.reshape(-1), channels)


def _factor(node: ir.Node, constant: Array) -> Array:
    return 1 / constant if node.op_type == "Div" else constant


def _term(node: ir.Node, constant: Array) -> Array:
    return -constant if node.op_type == "Sub" else constant


def _pads(node: ir.Node) -> bool:
    mode = node.attributes.get_string("auto_pad", "NOTSET")
    return any(node.attributes.get_ints("pads", [0])) if mode == "NOTSET" else mode != "VALID"


def _parameters(node: ir.Node) -> tuple[Array, Array]:
    """Weight and bias."""
    weight, bias = (
        None if value is None or value.const_value is None else value.const_value.numpy().astype(np.float64)
        for value in (*node.inputs, None)[1:3]
    )
    assert weight is not None
    return weight, np.zeros(len(weight)) if bias is None else bias


def _write(node: ir.Node, weight: Array, bias: Array) -> None:
    """Give a convolution new parameters, in the element type of the old."""
    old = node.inputs[1]
    assert old is not None
    node.replace_input_with(1, _constant(old, weight, f"{node.name}/weight"))
    if bias.any() or len(node.inputs) > 2:
        node.resize_inputs(3)
        node.replace_input_with(2, _constant(old, bias, f"{node.name}/bias"))


def _constant(like: ir.Value, array: Array, name: str) -> ir.Value:
    """An initializer in the graph and of the element type of another."""
    graph = like.graph
    assert graph is not None
    assert like.dtype is not None
    count, unique = 1, name
    while unique in graph.initializers:
        count += 1
        unique = f"{name}_{count}"
    tensor = ir.tensor(np.ascontiguousarray(array, like.dtype.numpy()), name=unique)
    value = ir.Value(name=unique, type=ir.TensorType(like.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    graph.register_initializer(value)
    return value


def _only_user(value: ir.Value) -> ir.Node | None:
    """The node of the same graph that alone reads a value, once, or twice by itself."""
    users = {use.node for use in value.uses()}
    if len(users) != 1 or value.is_graph_output():
        return None
    (user,), producer = users, value.producer()
    return user if producer is not None and user.graph is producer.graph else None


def _bypass(node: ir.Node, value: ir.Value) -> None:
    """Let a value be what a node made of it, by that name where it is an output of the graph."""
    output = node.outputs[0]
    if output.is_graph_output():
        value.name = output.name
    ir.convenience.replace_all_uses_with(output, value, replace_graph_outputs=True)
    _graph(node).remove(node, safe=True)


def _graph(node: ir.Node) -> ir.Graph:
    assert isinstance(node.graph, ir.Graph)
    return node.graph
