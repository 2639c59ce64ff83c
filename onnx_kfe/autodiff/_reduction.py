"""Reductions, and the functions that divide by one."""

from __future__ import annotations

import math
from collections.abc import Callable

import onnx_ir as ir

from onnx_kfe.autodiff._emitter import constant_of, sizes_of
from onnx_kfe.autodiff._registry import Backward, Cotangents, Declined, vjp

__all__ = ["divide_by_count", "share_among_equal"]

Spread = Callable[[Backward, ir.Value, ir.Value, ir.Value, ir.Value | None], ir.Value]
"""`(backward, x, y, cotangent, axes) -> dx`, with the output and its cotangent in the rank of `x`."""


def reduction(op_type: str) -> Callable[[Spread], Spread]:
    """Register the rule of a reduction."""

    def register(spread: Spread) -> Spread:
        @vjp(op_type)
        def rule(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
            x, y = node.inputs[0], node.outputs[0]
            assert x is not None
            axes = _axes(backward, node)
            if axes is None and node.attributes.get_int("noop_with_empty_axes", 0) == 1:
                return [spread(backward, x, y, cotangent, backward.ints())]
            if node.attributes.get_int("keepdims", 1) == 0:
                y, cotangent = (_restored(backward, value, x, axes) for value in (y, cotangent))
            return [spread(backward, x, y, cotangent, axes)]

        return spread

    return register


def _axes(backward: Backward, node: ir.Node) -> ir.Value | None:
    """The reduced axes, or None for all (or, on request of the node, for none)."""
    if "axes" in node.attributes:
        return backward.ints(*node.attributes.get_ints("axes", ()))
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    stated = constant_of(axes)
    return None if stated is not None and stated.size == 0 else axes


def _restored(backward: Backward, value: ir.Value, x: ir.Value, axes: ir.Value | None) -> ir.Value:
    if axes is not None:
        return backward.op("Unsqueeze", value, axes)
    sizes = sizes_of(x)
    if sizes is None:
        raise Declined("no gradient rule for a reduction over all axes of an input of unknown rank")
    return backward.op("Reshape", value, backward.ints(*[1] * len(sizes)))


def divide_by_count(backward: Backward, value: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
    """A value divided by the number of elements of `x` to one of `y`."""
    sizes, reduced = sizes_of(x), sizes_of(y)
    if sizes is not None and reduced is not None:
        named, named_too = (sorted(str(s) for s in shape if not isinstance(s, int)) for shape in (sizes, reduced))
        if named == named_too and None not in sizes:
            # The unknown sizes divide out.
            count, count_too = (math.prod(s for s in shape if isinstance(s, int)) for shape in (sizes, reduced))
            return backward.scale(value, count_too / count)
    count_x, count_y = (backward.op("Size", v, dtype=ir.DataType.INT64, shape=()) for v in (x, y))
    ratio = backward.op("Div", count_x, count_y, shape=())
    dtype = backward.dtype(value)
    return backward.op("Div", value, backward.op("Cast", ratio, dtype=dtype, to=int(dtype), shape=()), like=value)


def share_among_equal(
    backward: Backward, x: ir.Value, y: ir.Value, cotangent: ir.Value, axes: ir.Value | None
) -> ir.Value:
    """Divide a cotangent equally among the elements of `x` that equal the extremum `y` over some axes."""
    equal = backward.op("Equal", x, y, dtype=ir.DataType.BOOL)
    mask = backward.op("Cast", equal, like=x, to=int(backward.dtype(x)))
    count = backward.op("ReduceSum", mask, axes, keepdims=1)
    return backward.op("Mul", mask, backward.op("Div", cotangent, count), like=x)


@reduction("ReduceSum")
def reduce_sum(backward: Backward, x: ir.Value, y: ir.Value, cotangent: ir.Value, axes: ir.Value | None) -> ir.Value:
    """1."""
    return backward.expand_like(cotangent, x)


@reduction("ReduceMean")
def reduce_mean(backward: Backward, x: ir.Value, y: ir.Value, cotangent: ir.Value, axes: ir.Value | None) -> ir.Value:
    """1 by the number of elements."""
    return backward.expand_like(divide_by_count(backward, cotangent, x, y), x)


@reduction("ReduceMax")
def reduce_max(backward: Backward, x: ir.Value, y: ir.Value, cotangent: ir.Value, axes: ir.Value | None) -> ir.Value:
    """Passes to the elements that attain the maximum, in equal parts."""
    return share_among_equal(backward, x, y, cotangent, axes)


@reduction("ReduceMin")
def reduce_min(backward: Backward, x: ir.Value, y: ir.Value, cotangent: ir.Value, axes: ir.Value | None) -> ir.Value:
    """Passes to the elements that attain the minimum, in equal parts."""
    return share_among_equal(backward, x, y, cotangent, axes)


@reduction("ReduceSumSquare")
def reduce_sum_square(
    backward: Backward, x: ir.Value, y: ir.Value, cotangent: ir.Value, axes: ir.Value | None
) -> ir.Value:
    """`2 x`."""
    return backward.op("Mul", x, backward.scale(cotangent, 2.0), like=x)


@reduction("ReduceL1")
def reduce_l1(backward: Backward, x: ir.Value, y: ir.Value, cotangent: ir.Value, axes: ir.Value | None) -> ir.Value:
    """The sign."""
    return backward.op("Mul", backward.op("Sign", x, like=x), cotangent, like=x)


@reduction("ReduceL2")
def reduce_l2(backward: Backward, x: ir.Value, y: ir.Value, cotangent: ir.Value, axes: ir.Value | None) -> ir.Value:
    """`x / y`."""
    return backward.op("Mul", x, backward.op("Div", cotangent, y), like=x)


@reduction("ReduceLogSum")
def reduce_log_sum(
    backward: Backward, x: ir.Value, y: ir.Value, cotangent: ir.Value, axes: ir.Value | None
) -> ir.Value:
    """`exp(-y)`."""
    return backward.expand_like(backward.op("Div", cotangent, backward.op("Exp", y)), x)


@reduction("ReduceLogSumExp")
def reduce_log_sum_exp(
    backward: Backward, x: ir.Value, y: ir.Value, cotangent: ir.Value, axes: ir.Value | None
) -> ir.Value:
    """`exp(x - y)`."""
    probability = backward.op("Exp", backward.op("Sub", x, y, like=x), like=x)
    return backward.op("Mul", probability, cotangent, like=x)


@reduction("ReduceProd")
def reduce_prod(backward: Backward, x: ir.Value, y: ir.Value, cotangent: ir.Value, axes: ir.Value | None) -> ir.Value:
    """The product of the others, which zeros must not be divided out of."""
    zero, one = backward.number(0.0, x), backward.number(1.0, x)
    is_zero = backward.op("Equal", x, zero, dtype=ir.DataType.BOOL)
    zeros = backward.op("Cast", is_zero, like=x, to=int(backward.dtype(x)))
    nonzero = backward.op("Where", is_zero, one, x, like=x)
    product = backward.op("Mul", cotangent, backward.op("ReduceProd", nonzero, axes, keepdims=1))
    # All zeros of the product, if any, are the element itself.
    alone = backward.op("Equal", zeros, backward.op("ReduceSum", zeros, axes, keepdims=1), dtype=ir.DataType.BOOL)
    return backward.op("Where", alone, backward.op("Div", product, nonzero, like=x), zero, like=x)


@vjp("Softmax")
def softmax(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """`y (g - sum y g)`."""
    y = node.outputs[0]
    if _is_guarded(y):
        # A row that is masked as a whole is NaN, and what a later Where puts in its place has no derivative.
        unknown = backward.op("IsNaN", y, dtype=ir.DataType.BOOL)
        y = backward.op("Where", unknown, backward.number(0.0, y), y, like=y)
    axis = backward.ints(node.attributes.get_int("axis", -1))
    mean = backward.op("ReduceSum", backward.op("Mul", y, cotangent, like=y), axis, keepdims=1)
    return [backward.op("Mul", y, backward.op("Sub", cotangent, mean, like=y), like=y)]


def _is_guarded(y: ir.Value) -> bool:
    """Whether a Where replaces some of a value."""
    users = [use.node for use in y.uses()]
    return any(user.op_type == "Where" or (user.op_type == "Cast" and _is_guarded(user.outputs[0])) for user in users)


@vjp("LogSoftmax")
def log_softmax(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """`g - exp(y) sum g`."""
    y = node.outputs[0]
    total = backward.op("ReduceSum", cotangent, backward.ints(node.attributes.get_int("axis", -1)), keepdims=1)
    return [backward.op("Sub", cotangent, backward.op("Mul", backward.op("Exp", y, like=y), total, like=y), like=y)]


@vjp("CumSum")
def cumulative_sum(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """The sum from the other end."""
    reverse = 1 - node.attributes.get_int("reverse", 0)
    exclusive = node.attributes.get_int("exclusive", 0)
    return [backward.op("CumSum", cotangent, node.inputs[1], like=cotangent, reverse=reverse, exclusive=exclusive)]
