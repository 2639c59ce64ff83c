"""Linear nodes in the shapes that layers have: ``x W`` or ``W x`` with a matrix W, and no addend but a bias vector."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from onnx_kfe.graph._einsum import matmul_of
from onnx_kfe.graph._replacement import Replacement, is_constant

__all__ = ["ProductPass"]

_OLDEST_OPSET = 7  # whose Add and Gemm broadcast as those of today


class ProductPass(InPlacePass):
    """Write linear nodes with a constant operand in the shapes that layers have; the model computes what it did.

    - Gemm that transposes its input: a Transpose in front, which runtimes fuse again.
    - Gemm whose constant is the left operand: MatMul.
    - What Gemm or a convolution adds and is no constant vector: an Add behind it.
    - MatMul with a constant whose leading axes are 1: the matrix alone.
    - ConvTranspose whose output_shape is stated: its pads, where sizes are fixed.
    - Einsum that is a matrix product: MatMul, see `matmul_of`.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the nodes of the main graph."""
        if model.graph.opset_imports.get("", 1) < _OLDEST_OPSET:
            return PassResult(model, modified=False)
        taken = {
            name or "" for node in model.graph.all_nodes() for name in (node.name, *(v.name for v in node.outputs))
        }
        taken |= {value.name or "" for value in model.graph.inputs} | set(model.graph.initializers)
        modified = False
        for node in list(model.graph):
            rule = _RULES.get(node.op_type) if node.domain == "" else None
            found = rule(node, taken) if rule is not None else None
            if found is not None:
                found.write()
                modified = True
        return PassResult(model, modified=modified)


def _gemm(node: ir.Node, taken: set[str]) -> Replacement | None:
    a, b, c = (*node.inputs, None)[:3]
    assert a is not None
    assert b is not None
    if is_constant(a) == is_constant(b):
        return None
    added, flipped = c is not None and not _is_bias(c), node.attributes.get_int("transA", 0)
    if is_constant(b) and not added and not flipped:
        return None
    new = Replacement(node, taken)
    if is_constant(a):
        if len(a.uses()) > 1:
            return None
        x = new.op("Transpose", b, perm=[1, 0]) if node.attributes.get_int("transB", 0) else b
        matrix = _array(a).T if flipped else _array(a)
        alpha = node.attributes.get_float("alpha", 1.0)
        y = new.linear("MatMul", [new.constant("weight", (alpha * matrix).astype(matrix.dtype)), x])
        added = c is not None
    else:
        x = new.op("Transpose", a, perm=[1, 0]) if flipped else a
        kept = [key for key in ("alpha", "transB", *(() if added else ("beta",))) if key in node.attributes]
        operands = [x, b] if added or c is None else [x, b, c]
        y = new.linear("Gemm", operands, {key: node.attributes[key] for key in kept})
    if added:
        assert c is not None
        beta = node.attributes.get_float("beta", 1.0)
        new.op("Add", y, c if beta == 1 else _scaled(new, c, beta, y))
    return new


def _convolution(node: ir.Node, taken: set[str]) -> Replacement | None:
    x, weight, bias = (*node.inputs, None)[:3]
    computed = bias is not None and not is_constant(bias)
    pads = _pads(node)
    if not is_constant(weight) or not (computed or pads):
        return None
    assert x is not None
    assert weight is not None
    assert weight.shape is not None
    new = Replacement(node, taken)
    attributes = dict(node.attributes)
    if pads:
        attributes = {key: value for key, value in attributes.items() if key not in ("auto_pad", "output_shape")}
        attributes["pads"] = ir.AttrInt64s("pads", pads)
    y = new.linear(node.op_type, [x, weight] if bias is None or computed else [x, weight, bias], attributes)
    if bias is not None and computed:
        new.op("Add", y, new.reshape(bias, [1, -1, *[1] * (weight.shape.rank() - 2)]))
    return new


def _pads(node: ir.Node) -> list[int] | None:
    """The pads that give a ConvTranspose the output_shape it states; None without one, or where sizes are free."""
    x, weight = node.inputs[:2]
    wanted = node.attributes.get_ints("output_shape", ())
    if not wanted or x is None or x.shape is None or weight is None or weight.shape is None:
        return None
    sizes, kernel = x.shape[2:], weight.shape.numpy()[2:]
    if len(wanted) != len(kernel) or not all(isinstance(size, int) for size in sizes):
        return None
    strides, dilations = (node.attributes.get_ints(key, [1] * len(kernel)) for key in ("strides", "dilations"))
    added = node.attributes.get_ints("output_padding", [0] * len(kernel))
    terms = zip(sizes, wanted, kernel, strides, dilations, added, strict=True)
    totals = [s * (int(n) - 1) + more + d * (k - 1) + 1 - out for n, out, k, s, d, more in terms]
    if min(totals) < 0:  # more is wanted than there is
        return None
    less = [total // 2 for total in totals]
    rest = [total - half for total, half in zip(totals, less, strict=True)]
    return [*less, *rest] if node.attributes.get_string("auto_pad", "NOTSET") == "SAME_UPPER" else [*rest, *less]


def _matmul(node: ir.Node, taken: set[str]) -> Replacement | None:
    constants = [place for place, value in enumerate(node.inputs) if is_constant(value)]
    if len(constants) != 1:
        return None
    (place,) = constants
    weight, x = node.inputs[place], node.inputs[1 - place]
    assert weight is not None
    assert x is not None
    shape = _array(weight).shape
    if len(shape) < 3 or math.prod(shape[:-2]) > 1 or len(weight.uses()) > 1:
        return None
    if x.shape is None or len(x.shape) < len(shape):  # the product has axes that x has not
        return None
    new = Replacement(node, taken)
    matrix = new.constant("weight", _array(weight).reshape(shape[-2:]))
    new.linear("MatMul", [matrix, x] if place == 0 else [x, matrix])
    return new


def _is_bias(value: ir.Value) -> bool:
    """Whether an addend of Gemm is a constant for each feature, or for all."""
    shape = _array(value).shape if is_constant(value) else None
    return shape is not None and math.prod(shape) == math.prod(shape[-1:])


def _scaled(new: Replacement, value: ir.Value, factor: float, like: ir.Value) -> ir.Value:
    assert like.dtype is not None
    if is_constant(value):
        array = _array(value)
        return new.constant("addend", (factor * array).astype(array.dtype))
    return new.op("Mul", value, new.constant("beta", np.array(factor, like.dtype.numpy())))


def _array(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy()


_RULES = {
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Conv": _convolution,
    "ConvTranspose": _convolution,
    "Einsum": matmul_of,
}
