"""Padding: positions of a sequence that are there only so that samples have one length weigh nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from onnx_kfe.autodiff import Emitter, sizes_of
from onnx_kfe.graph import Layer, concrete_shapes

__all__ = ["Padding", "find_padding"]

_NAMES = re.compile(r"(attention|input)_mask", re.IGNORECASE)
_FREE_SIZES = (3, 37)  # of batch and sequence, where they are free: sizes that no other axes have


@dataclass(frozen=True)
class Padding:
    """A mask over the positions of sequences: an input ``[batch, sequence]``, by its name, that is 0 at padding.

    Attributes:
        mask: Name of the input.
        ranks: Numbers of axes of the values whose first two are those of the mask, by name.
    """

    mask: str
    ranks: Mapping[str, int]

    def covers(self, layer: Layer) -> bool:
        """Whether the positions of a layer are those of the mask."""
        return layer.op_type == "MatMul" and self.ranks.get(layer.input) == self.ranks.get(layer.output) == 3

    def weight(self, emit: Emitter, value: ir.Value) -> ir.Value:
        """1 at real positions and 0 at padding, in single precision: ``[batch, sequence, 1, ...]`` beside a value.

        Args:
            emit: Where the nodes go; the graph has the mask as an input.
            value: One of `ranks`.
        """
        real = emit.op("Cast", self._real(emit), dtype=ir.DataType.FLOAT, to=int(ir.DataType.FLOAT))
        behind = range(2, self.ranks[value.name or ""])
        return emit.op("Unsqueeze", real, emit.ints(*behind)) if behind else real

    def real_rows(self, emit: Emitter, value: ir.Value) -> ir.Value:
        """The rows of a value ``[batch, sequence, features]`` at real positions, in order: ``[1, rows, features]``."""
        rows = emit.op("Reshape", value, emit.op("Concat", emit.ints(-1), emit.size_of(value, -1), axis=0))
        rows = emit.op("Compress", rows, emit.op("Reshape", self._real(emit), emit.ints(-1)), axis=0)
        return emit.op("Unsqueeze", rows, emit.ints(0), shape=(1, None, None))

    def mean(self, emit: Emitter, value: ir.Value) -> ir.Value:
        """The mean of a value ``[batch, sequence, features]`` over the real positions: ``[batch, features]``.

        Where a sample has none it is 0.

        Args:
            emit: Where the nodes go; the graph has the mask as an input.
            value: One of `ranks`.
        """
        weight = self.weight(emit, value)
        batch, _, features = sizes_of(value) or (None,) * 3
        total = emit.op(
            "ReduceSum", emit.op("Mul", value, weight, like=value), emit.ints(1), shape=(batch, features), keepdims=0
        )
        count = emit.op("ReduceSum", weight, emit.ints(1), shape=(batch, 1), keepdims=0)
        return emit.op("Div", total, emit.op("Max", count, emit.number(1.0, count), like=count), like=total)

    def _real(self, emit: Emitter) -> ir.Value:
        mask = next(value for value in emit.graph.inputs if value.name == self.mask)
        return emit.op("Cast", mask, dtype=ir.DataType.BOOL, to=int(ir.DataType.BOOL))


def find_padding(model: ir.Model) -> Padding | None:
    """The mask of a model: an input of two axes named ``attention_mask`` or ``input_mask``; None where there is none.

    Args:
        model: A normalised model.
    """
    for value in model.graph.inputs:
        if _NAMES.search(value.name or "") and value.shape is not None and len(value.shape) == 2:
            sizes = tuple(
                own if isinstance(own, int) else free for own, free in zip(value.shape, _FREE_SIZES, strict=True)
            )
            shapes = concrete_shapes(model, _given(model, value, sizes))
            return Padding(value.name or "", {name: len(s) for name, s in shapes.items() if s[:2] == sizes})
    return None


def _given(model: ir.Model, mask: ir.Value, sizes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of the inputs; a free axis has the size of the mask's axis of that name, or else of that place."""
    named = {
        own.value: size for own, size in zip(mask.shape or (), sizes, strict=True) if isinstance(own, ir.SymbolicDim)
    }
    named.pop(None, None)
    return {
        value.name or "": tuple(
            own if isinstance(own, int) else named.get(str(own.value), sizes[min(axis, 1)])
            for axis, own in enumerate(value.shape)
        )
        for value in model.graph.inputs
        if value.shape is not None and not value.is_initializer()
    }
