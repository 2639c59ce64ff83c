"""Attention with its projections, masks and rotations, without keys and values of earlier calls."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnx_kfe.graph.fusions._registry import Expansion, Outputs, Unsupported, fusion

__all__: list[str] = []


@fusion("Attention")
def attention(op: Expansion) -> Outputs:
    """Projections to queries, keys and values, and attention among them."""
    if op.input(4) is not None:
        raise Unsupported("past keys and values")
    if op.attributes.get_int("do_rotary", 0):
        raise Unsupported("do_rotary")
    x, weight, bias, mask = op.operand(0), op.operand(1), op.input(2), op.input(3)
    width = op.size(weight, 1)
    widths = op.attributes.get_ints("qkv_hidden_sizes") or [width // 3] * 3
    projected = []
    for name, (start, stop) in zip(("/query", "/key", "/value"), _ranges(widths), strict=True):
        product = op.layer(name, "MatMul", x, op.sliced(weight, start, stop, axis=1))
        projected.append(product if bias is None else op.op("Add", product, op.sliced(bias, start, stop, axis=0)))
    return _attended(op, projected, widths[0], x, mask)[:1]


@fusion("MultiHeadAttention")
def multi_head_attention(op: Expansion) -> Outputs:
    """Attention among queries, keys and values."""
    if op.input(6) is not None:
        raise Unsupported("past keys and values")
    parts = [op.operand(0), op.operand(1, "keys of their own"), op.operand(2, "values of their own")]
    if any(op.rank(part) != 3 for part in parts):
        raise Unsupported("heads in an axis of their own")
    width, bias, mask = op.size(parts[0], 2), op.input(3), op.input(4)
    if bias is not None:
        ranges = _ranges([width, width, op.size(bias, 0) - 2 * width])
        parts = [
            op.op("Add", part, op.sliced(bias, start, stop, axis=0))
            for part, (start, stop) in zip(parts, ranges, strict=True)
        ]
    return _attended(op, parts, width, op.operand(1), mask)


def _ranges(widths: Sequence[int]) -> list[tuple[int, int]]:
    """Where parts of these widths, one after the other, begin and end."""
    return list(itertools.pairwise(itertools.accumulate(widths, initial=0)))


def _heads(op: Expansion, x: ir.Value) -> ir.Value:
    """``[batch, positions, heads * size]`` as ``[batch, heads, positions, size]``."""
    apart = op.op("Reshape", x, op.ints(0, 0, op.attributes.get_int("num_heads"), -1))
    return op.op("Transpose", apart, perm=[0, 2, 1, 3])


def _mask(op: Expansion, mask: ir.Value | None, keys: ir.Value) -> ir.Value | None:
    """What a mask of keys ``[batch, keys, any]`` adds to scores: 0 where it is positive, or below a length."""
    if mask is None:
        return None
    rank = op.rank(mask)
    if rank == 1:
        if not _is_length(op, mask, keys):
            raise Unsupported("a mask that may be more than a length a sequence")
        lengths = op.unsqueezed(op.op("Cast", mask, to=ir.DataType.INT64), 1)
        kept = op.op("Less", op.indices(op.length(keys, 1)), lengths)
    elif rank <= 3:
        kept = op.op("Greater", mask, op.constant(np.array(0, np.int32)))
    else:
        raise Unsupported(f"a mask of rank {rank}")
    filtered = op.number(op.attributes.get_float("mask_filter_value", -1e4))
    return op.unsqueezed(op.op("Where", kept, op.number(0), filtered), *((1,) if rank == 3 else (1, 2)))


def _is_length(op: Expansion, mask: ir.Value, keys: ir.Value) -> bool:
    """Whether a mask of one axis is as long as the batch, a sum over the keys for one; it may be longer."""
    producer = mask.producer()
    return op.same_size(mask, 0, keys, 0) or (producer is not None and producer.op_type == "ReduceSum")


def _causal(op: Expansion, scores: ir.Value, keys: ir.Value) -> ir.Value:
    """Scores of which those of later keys do not count."""
    queries = op.operand(0)
    if not op.same_size(queries, 1, keys, 1):
        raise Unsupported("unidirectional attention to other keys")
    places = op.indices(op.length(queries, 1))
    later = op.op("Greater", places, op.unsqueezed(places, 1))
    return op.op("Where", later, op.number(-math.inf), scores)


def _attended(op: Expansion, parts: Sequence[ir.Value], width: int, keys: ir.Value, mask: ir.Value | None) -> Outputs:
    """Values averaged with the softmax of scores.

    Args:
        op: What to emit with; its sixth input is added to the scores ``[batch, heads, queries, keys]``.
        parts: Queries, keys and values, ``[batch, positions, heads * size]`` each.
        width: Heads times size of the queries.
        keys: A value ``[batch, keys, any]``.
        mask: Which keys count, see `_mask`.

    Returns:
        The average ``[batch, queries, heads * size of values]``, and keys and values ``[batch, heads, keys, size]``.
    """
    query, key, value = (_heads(op, part) for part in parts)
    size = width // op.attributes.get_int("num_heads")
    scale = op.attributes.get_float("scale", 0.0) or 1 / math.sqrt(size)
    scores = op.scaled(op.layer("/scores", "MatMul", query, op.op("Transpose", key, perm=[0, 1, 3, 2])), scale)
    scores = op.added(op.added(scores, _mask(op, mask, keys)), op.input(5))
    if op.attributes.get_int("unidirectional", 0):
        scores = _causal(op, scores, keys)
    mixed = op.layer("/average", "MatMul", op.op("Softmax", scores, axis=-1), value)
    return _merged(op, op.op("Transpose", mixed, perm=[0, 2, 1, 3])), key, value


def _merged(op: Expansion, x: ir.Value) -> ir.Value:
    """``[batch, positions, heads, size]`` as ``[batch, positions, heads * size]``."""
    return op.op("Reshape", x, op.ints(0, 0, -1))


@fusion("RotaryEmbedding")
def rotary_embedding(op: Expansion) -> ir.Value:
    """Pairs of features turned by angles that the caches hold for each position."""
    x, cosines, sines = op.operand(0), op.operand(2), op.operand(3)
    if op.attributes.get_float("scale", 1.0) != 1:
        raise Unsupported("scale")
    if op.attributes.get_int("is_packed_batching", 0):
        raise Unsupported("is_packed_batching")
    pairs, partial = op.size(cosines, 1), op.attributes.get_int("rotary_embedding_dim", 0)
    together = op.rank(x) == 3
    apart = x
    if together:
        heads = op.attributes.get_int("num_heads", 0)
        apart = op.op("Reshape", x, op.ints(0, 0, *((heads, -1) if partial else (-1, 2 * pairs))))
    positions = op.operand(1)
    if op.rank(positions) == 1:  # the first one
        positions = op.op("Add", positions, op.indices(op.length(apart, 1 if together else 2)))
    tables = [op.op("Gather", table, positions) for table in (cosines, sines)]
    cosine, sine = (op.unsqueezed(table, -2 if together else -3) for table in tables)
    turned = _turned(op, op.sliced(apart, 0, 2 * pairs, axis=3) if partial else apart, pairs, cosine, sine)
    if partial:
        turned = op.op("Concat", turned, op.sliced(apart, 2 * pairs, 2**31 - 1, axis=3), axis=3)
    return _merged(op, turned) if together else turned


def _turned(op: Expansion, x: ir.Value, pairs: int, cosine: ir.Value, sine: ir.Value) -> ir.Value:
    """The pairs in the last axis of four, neighbours or half of it apart, turned."""
    axis, sizes = (4, (pairs, 2)) if op.attributes.get_int("interleaved", 0) else (3, (2, pairs))
    both = op.op("Reshape", x, op.ints(0, 0, 0, *sizes))
    real, imaginary = (op.op("Gather", both, op.constant(np.array(index)), axis=axis) for index in (0, 1))
    turned = [
        op.op("Sub", op.op("Mul", real, cosine), op.op("Mul", imaginary, sine)),
        op.op("Add", op.op("Mul", real, sine), op.op("Mul", imaginary, cosine)),
    ]
    joined = op.op("Concat", *(op.unsqueezed(part, axis) for part in turned), axis=axis)
    return op.op("Reshape", joined, op.ints(0, 0, 0, 2 * pairs))
