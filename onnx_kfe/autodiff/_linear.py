"""Matrix products."""

from __future__ import annotations

import onnx_ir as ir

from onnx_kfe.autodiff._broadcasting import unbroadcast
from onnx_kfe.autodiff._emitter import sizes_of
from onnx_kfe.autodiff._registry import Backward, Cotangents, Declined, operand, vjp


@vjp("Gemm")
def gemm(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """`Y = alpha A' B' + beta C`, where `'` transposes or not."""
    alpha, beta = node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)
    flip_a, flip_b = node.attributes.get_int("transA", 0), node.attributes.get_int("transB", 0)
    a, b = node.inputs[0], node.inputs[1]

    def product(left: ir.Value | None, right: ir.Value | None, flip_left: int, flip_right: int) -> ir.Value:
        return backward.op("Gemm", left, right, alpha=alpha, transA=flip_left, transB=flip_right)

    def rule(index: int, value: ir.Value) -> ir.Value:
        if index == 0:
            return product(b, cotangent, flip_b, 1) if flip_a else product(cotangent, b, 0, 1 - flip_b)
        if index == 1:
            return product(cotangent, a, 1, flip_a) if flip_b else product(a, cotangent, 1 - flip_a, 0)
        return unbroadcast(backward, backward.scale(cotangent, beta), value, [value, node.outputs[0]])

    return backward.for_needed(node, rule)


@vjp("MatMul")
def matmul(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """`dA = dY B^T`, `dB = A^T dY`; leading axes broadcast, a vector is a matrix with an axis that is then dropped."""
    a, b = operand(node, 0), operand(node, 1)
    sizes_a, sizes_b = sizes_of(a), sizes_of(b)
    if sizes_a is None or sizes_b is None:
        raise Declined("no gradient rule for MatMul of operands of unknown rank")
    row = a if len(sizes_a) > 1 else _with_axis(backward, a, 0)
    column = b if len(sizes_b) > 1 else _with_axis(backward, b, 1)
    if len(sizes_b) == 1:
        cotangent = _with_axis(backward, cotangent, -1)
    if len(sizes_a) == 1:
        cotangent = _with_axis(backward, cotangent, -2)

    def rule(index: int, value: ir.Value) -> ir.Value:
        if index == 0:
            full = _product(backward, cotangent, _swapped(backward, column))
            return _restored(backward, _sum_leading(backward, full, row, column), row, value)
        if len(sizes_b) <= 2 < len(sizes_a):
            # One matrix for all leading axes: they are more rows of one product.
            full = _product(backward, _swapped(backward, _rows(backward, row)), _rows(backward, cotangent))
        else:
            full = _product(backward, _swapped(backward, row), cotangent)
            full = _sum_leading(backward, full, column, row)
        return _restored(backward, full, column, value)

    return backward.for_needed(node, rule)


def _restored(backward: Backward, matrix: ir.Value, matrices: ir.Value, operand: ir.Value) -> ir.Value:
    """Without the axis that made matrices of a vector operand."""
    return matrix if matrices is operand else backward.reshape_like(matrix, operand)


def _sum_leading(backward: Backward, full: ir.Value, matrices: ir.Value, other: ir.Value) -> ir.Value:
    """Sum a product over the leading axes along which one operand was repeated for the other."""
    sizes, other_sizes = sizes_of(matrices), sizes_of(other)
    if sizes is None or other_sizes is None:
        raise Declined("no gradient rule for MatMul of operands of unknown rank")
    # The matrix axes never broadcast: the other operand takes part with its leading axes alone.
    leading = ir.Value(shape=ir.Shape([*other_sizes[:-2], *sizes[-2:]]))
    return unbroadcast(backward, full, matrices, [matrices, leading])


def _product(backward: Backward, left: ir.Value, right: ir.Value) -> ir.Value:
    left_sizes, right_sizes = sizes_of(left), sizes_of(right)
    shape = None
    if left_sizes is not None and right_sizes is not None and (len(right_sizes) == 2 or len(left_sizes) == 2):
        leading = left_sizes[:-2] if len(right_sizes) == 2 else right_sizes[:-2]
        shape = [*leading, left_sizes[-2], right_sizes[-1]]
    elif left_sizes is not None and right_sizes is not None and left_sizes[:-2] == right_sizes[:-2]:
        shape = [*left_sizes[:-1], right_sizes[-1]]
    return backward.op("MatMul", left, right, shape=shape)


def _swapped(backward: Backward, matrix: ir.Value) -> ir.Value:
    sizes = sizes_of(matrix)
    if sizes is None:
        raise Declined("no gradient rule for MatMul of operands of unknown rank")
    rank = len(sizes)
    return backward.transpose(matrix, [*range(rank - 2), rank - 1, rank - 2])


def _rows(backward: Backward, value: ir.Value) -> ir.Value:
    """A value as a matrix of its last axis."""
    sizes = sizes_of(value)
    last = sizes[-1] if sizes is not None else None
    if isinstance(last, int):
        return backward.op("Reshape", value, backward.ints(-1, last), shape=(None, last))
    target = backward.op("Concat", backward.ints(-1), backward.size_of(value, -1), axis=0)
    return backward.op("Reshape", value, target, shape=(None, None))


def _with_axis(backward: Backward, value: ir.Value, axis: int) -> ir.Value:
    sizes = sizes_of(value)
    shape: list[int | str | None] | None = None
    if sizes is not None:
        shape = list(sizes)
        shape.insert(axis if axis >= 0 else len(sizes) + 1 + axis, 1)
    return backward.op("Unsqueeze", value, backward.ints(axis), shape=shape)
