"""Sums of products over named axes."""

from __future__ import annotations

import string

import onnx_ir as ir

from onnx_kfe.autodiff._emitter import sizes_of
from onnx_kfe.autodiff._registry import Backward, Cotangents, Declined, operand, vjp


@vjp("Einsum")
def einsum(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """The sum of products of the cotangent and the other operands over the axes that the operand does not have."""
    terms, output = _parsed(node)

    def rule(index: int, value: ir.Value) -> ir.Value:
        term = terms[index]
        others = [other for place, other in enumerate(node.inputs) if place != index]
        names = [output, *(other for place, other in enumerate(terms) if place != index)]
        kept = "".join(name for name in term if any(name in other for other in names))
        equation = f"{','.join(names)}->{kept}"
        product = backward.op("Einsum", cotangent, *others, equation=equation)
        return _in_shape(backward, product, value, term, kept)

    return backward.for_needed(node, rule)


def _in_shape(backward: Backward, product: ir.Value, value: ir.Value, term: str, kept: str) -> ir.Value:
    """Summed along the axes where the operand was repeated, repeated along those that nothing else has."""
    sizes = sizes_of(value)
    assert sizes is not None
    repeated = [kept.index(name) for name, size in zip(term, sizes, strict=True) if size == 1 and name in kept]
    if repeated:
        product = backward.op("ReduceSum", product, backward.ints(*repeated), keepdims=1)
    missing = [axis for axis, name in enumerate(term) if name not in kept]
    if not missing:
        product.shape = ir.Shape(sizes)
        return product
    return backward.expand_like(backward.op("Unsqueeze", product, backward.ints(*missing)), value)


def _parsed(node: ir.Node) -> tuple[list[str], str]:
    """The axes of the operands and of the output, an ellipsis as axes of names that are not used."""
    equation = node.attributes.get_string("equation", "").replace(" ", "")
    left, arrow, output = equation.partition("->")
    terms = left.split(",")
    if not arrow:
        once = sorted(name for name in set(left) - set(",.") if left.count(name) == 1)
        output = ("..." if "..." in left else "") + "".join(once)
    rank = max(_ellipsis_rank(operand(node, index), term) for index, term in enumerate(terms))
    names = "".join(name for name in string.ascii_letters if name not in equation)[:rank]
    named = [term.replace("...", names) for term in terms]
    if any(len(set(term)) < len(term) for term in named):
        raise Declined("no gradient rule for Einsum along a diagonal")
    return named, output.replace("...", names)


def _ellipsis_rank(value: ir.Value, term: str) -> int:
    sizes = sizes_of(value)
    if sizes is None:
        raise Declined("no gradient rule for Einsum of an input of unknown rank")
    return len(sizes) - len(term.replace("...", ""))
