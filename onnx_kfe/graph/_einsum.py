"""Einsum of a value and a constant that is a matrix product but for the order of axes, as MatMul."""

from __future__ import annotations

import string

import numpy as np
import onnx_ir as ir

from onnx_kfe.graph._replacement import Replacement, is_constant

__all__ = ["matmul_of"]


def matmul_of(node: ir.Node, taken: set[str]) -> Replacement | None:
    """``Transpose -> Reshape -> MatMul -> Reshape -> Transpose``, each where it is needed, in place of an Einsum.

    The axes of the constant are summed over with those of the value, or are axes of the output alone: none is an axis
    of all three, along which the products would be several.

    Args:
        node: An Einsum.
        taken: Names that are taken.

    Returns:
        None where it is anything else.
    """
    constants = [place for place, value in enumerate(node.inputs) if is_constant(value)]
    if len(node.inputs) != 2 or len(constants) != 1:
        return None
    (place,) = constants
    weight, x = node.inputs[place], node.inputs[1 - place]
    assert weight is not None
    assert weight.const_value is not None
    assert x is not None
    terms = _terms(node, x, 1 - place)
    if terms is None or len(weight.uses()) > 1:
        return None
    read, seen, output = terms
    free = [axis for axis in output if axis in read]
    summed = [axis for axis in read if axis not in output]
    written = [axis for axis in output if axis not in read]
    if not (free and summed and written) or sorted(seen) != sorted(summed + written):
        return None
    array = weight.const_value.numpy().transpose([seen.index(axis) for axis in summed + written])
    sizes, inside = array.shape, int(np.prod(array.shape[: len(summed)]))
    new = Replacement(node, taken)
    value = _transposed(new, x, [read.index(axis) for axis in free + summed])
    if len(summed) > 1:
        value = new.reshape(value, [*[0] * len(free), inside])
    value = new.linear("MatMul", [value, new.constant("weight", array.reshape(inside, -1))])
    if len(written) > 1:
        value = new.reshape(value, [*[0] * len(free), *sizes[len(summed) :]])
    _transposed(new, value, [(free + written).index(axis) for axis in output])
    return new


def _transposed(new: Replacement, value: ir.Value, order: list[int]) -> ir.Value:
    return value if order == sorted(order) else new.op("Transpose", value, perm=order)


def _terms(node: ir.Node, x: ir.Value, place: int) -> tuple[str, str, str] | None:
    """Axes of the value, of the constant and of the output; None where one is repeated or unclear."""
    equation = node.attributes.get_string("equation", "").replace(" ", "")
    left, arrow, output = equation.partition("->")
    terms = left.split(",")
    read, seen = terms[place], terms[1 - place]
    if not arrow or "..." in seen or ("..." in output) != ("..." in read):
        return None
    if "..." in read:
        if x.shape is None:
            return None
        unused = [name for name in string.ascii_letters if name not in equation]
        names = "".join(unused[: len(x.shape) - len(read.replace("...", ""))])
        read, output = read.replace("...", names), output.replace("...", names)
    repeated = any(len(set(term)) < len(term) for term in (read, seen, output))
    return None if repeated or not set(output) <= set(read + seen) else (read, seen, output)
