"""One name for each symbolic size.

Shape inference gives the outputs of reshapes, convolutions and sums new names even where the sizes are those of an
input. Sizes that are certainly equal get the same name here, and the backward graph then needs no arithmetic on shapes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import onnx_ir as ir

from onnx_kfe.autodiff._emitter import Dim, constant_of, sizes_of

__all__ = ["unify_sizes"]


@dataclass(frozen=True)
class _Size:
    """A size as a product of a number and powers of named sizes."""

    factor: Fraction
    powers: frozenset[tuple[str, int]] = frozenset()

    def __mul__(self, other: _Size) -> _Size:
        return self._times(other, 1)

    def __truediv__(self, other: _Size) -> _Size:
        return self._times(other, -1)

    def _times(self, other: _Size, sign: int) -> _Size:
        powers = Counter(dict(self.powers))
        for name, power in other.powers:
            powers[name] += sign * power
        kept = frozenset((name, power) for name, power in powers.items() if power)
        return _Size(self.factor * other.factor**sign, kept)

    def dim(self) -> int | str:
        """As an entry of a shape."""
        if not self.powers and self.factor.denominator == 1:
            return int(self.factor)
        parts = [name if power == 1 else f"{name}^{power}" for name, power in sorted(self.powers)]
        return "*".join(parts if self.factor == 1 else [str(self.factor), *parts])


_Sizes = Sequence[_Size | None]
_Introduce = Callable[[ir.Node, Sequence[_Sizes | None], int, int], _Size | None]
"""`(node, sizes of the inputs, rank of the output, axis) -> size of the output`, None where it cannot be told."""

_ONE = _Size(Fraction(1))
_RULES: dict[str, _Introduce] = {}


def unify_sizes(graph: ir.Graph) -> None:
    """Give equal symbolic sizes of a graph the same name, and numbers to those that are known after all."""
    known: dict[str, _Size] = {}
    formulas: dict[_Size, _Size] = {}
    for value in (*graph.inputs, *graph.initializers.values()):
        for dim in sizes_of(value) or ():
            if isinstance(dim, str):
                known.setdefault(dim, _named(dim))
    for node in graph:
        if node.outputs:
            _name_new_sizes(node, node.outputs[0], known, formulas)
        for value in node.outputs:
            _rename(value, known)


def _name_new_sizes(node: ir.Node, output: ir.Value, known: dict[str, _Size], formulas: dict[_Size, _Size]) -> None:
    """Express the sizes that an output is the first to have by those of the inputs."""
    rule = None if node.domain else _RULES.get(node.op_type)
    sizes = sizes_of(output) or ()
    for axis, dim in enumerate(sizes):
        if not isinstance(dim, str) or dim in known:
            continue
        shapes = [None if value is None else _sizes(value, known) for value in node.inputs]
        if rule is _by_count:
            shapes = [shapes[0], _sizes(output, known)]
        size = None if rule is None else rule(node, shapes, len(sizes), axis)
        if size is None:
            size = _named(dim)
        elif rule is _window:
            # A formula goes by the name its first result has.
            size = formulas.setdefault(size, size if size in known.values() else _named(dim))
        known[dim] = size


def _named(name: str) -> _Size:
    return _Size(Fraction(1), frozenset({(name, 1)}))


def _sizes(value: ir.Value, known: dict[str, _Size]) -> _Sizes | None:
    sizes = sizes_of(value)
    return None if sizes is None else [_size(dim, known) for dim in sizes]


def _size(dim: Dim, known: dict[str, _Size]) -> _Size | None:
    return _Size(Fraction(dim)) if isinstance(dim, int) else known.get(dim) if dim is not None else None


def _rename(value: ir.Value, known: dict[str, _Size]) -> None:
    if value.shape is None or value.shape.is_static():
        return
    sizes = sizes_of(value) or ()
    renamed: list[Dim] = []
    for dim in sizes:
        size = known.get(dim) if isinstance(dim, str) else None
        renamed.append(dim if size is None else size.dim())
        if size is not None:
            known.setdefault(str(size.dim()), size)
    if renamed != list(sizes):
        value.shape = ir.Shape(renamed)


def _introduces(*op_types: str) -> Callable[[_Introduce], _Introduce]:
    def register(function: _Introduce) -> _Introduce:
        _RULES.update(dict.fromkeys(op_types, function))
        return function

    return register


def _common(sizes: Iterable[_Size | None]) -> _Size | None:
    """The size that sizes broadcast to."""
    found = {size for size in sizes if size != _ONE}
    return found.pop() if len(found) == 1 else _ONE if not found else None


def _aligned(sizes: _Sizes | None, rank: int, axis: int) -> _Size | None:
    """The size along an axis of a shape that ones extend in front."""
    if sizes is None:
        return None
    own = axis - rank + len(sizes)
    return _ONE if own < 0 else sizes[own]


@_introduces("Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Sum", "Mean", "Where", "PRelu")
def _broadcast(node: ir.Node, inputs: Sequence[_Sizes | None], rank: int, axis: int) -> _Size | None:
    return _common(_aligned(sizes, rank, axis) for sizes in inputs)


@_introduces("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _by_count(node: ir.Node, inputs: Sequence[_Sizes | None], rank: int, axis: int) -> _Size | None:
    """The number of elements stays: `inputs` are the sizes of the input and those of the output known so far."""
    before, after = inputs[0], inputs[1]
    target = constant_of(node.inputs[1]) if node.op_type == "Reshape" else None
    if before is not None and target is not None and target[axis] == 0 and axis < len(before):
        return before[axis]
    rest = [size for index, size in enumerate(after or ()) if index != axis]
    if before is None or not all(before) or not all(rest):
        return None
    count = math.prod(filter(None, before), start=_ONE) / math.prod(filter(None, rest), start=_ONE)
    return count if count.factor.denominator == 1 and all(power > 0 for _, power in count.powers) else None


@_introduces("Slice")
def _slice(node: ir.Node, inputs: Sequence[_Sizes | None], rank: int, axis: int) -> _Size | None:
    axes = constant_of(node.inputs[3]) if len(node.inputs) > 3 else None
    if axes is None or axis in [int(sliced) % rank for sliced in axes]:
        return None
    return _same(node, inputs, rank, axis)


@_introduces("Softmax", "LogSoftmax", "Relu", "Clip", "Sigmoid", "Tanh", "Identity", "Cast", "LayerNormalization")
def _same(node: ir.Node, inputs: Sequence[_Sizes | None], rank: int, axis: int) -> _Size | None:
    return inputs[0][axis] if inputs[0] is not None else None


@_introduces("MatMul")
def _matmul(node: ir.Node, inputs: Sequence[_Sizes | None], rank: int, axis: int) -> _Size | None:
    left, right = inputs
    if left is None or right is None or min(len(left), len(right)) < 2:
        return None
    if axis >= rank - 2:
        return left[-2] if axis == rank - 2 else right[-1]
    return _common((_aligned(left, rank, axis), _aligned(right, rank, axis)))


@_introduces("Gemm")
def _gemm(node: ir.Node, inputs: Sequence[_Sizes | None], rank: int, axis: int) -> _Size | None:
    sizes = inputs[axis]
    flipped = node.attributes.get_int("transB" if axis else "transA", 0)
    return None if sizes is None else sizes[axis ^ flipped]


@_introduces("Conv", "MaxPool", "AveragePool")
def _window(node: ir.Node, inputs: Sequence[_Sizes | None], rank: int, axis: int) -> _Size | None:
    sizes = inputs[0]
    size = sizes[axis] if sizes is not None and (axis == 0 or axis > 1) else None
    if axis == 0 or size is None:
        return size
    weight = inputs[1] if len(inputs) > 1 else None
    taps = node.attributes.get_ints("kernel_shape", [int(s.factor) if s else 0 for s in (weight or ())[2:]])
    spatial = axis - 2
    if spatial >= len(taps) or node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        return None
    pads = node.attributes.get_ints("pads", [0] * (2 * len(taps)))
    stride = node.attributes.get_ints("strides", [1] * len(taps))[spatial]
    dilation = node.attributes.get_ints("dilations", [1] * len(taps))[spatial]
    spare = pads[spatial] + pads[spatial + len(taps)] - dilation * (taps[spatial] - 1) - 1
    if stride == 1 and spare == -1:
        return size
    rounding = "ceil" if node.attributes.get_int("ceil_mode", 0) else "floor"
    return _named(f"{rounding}(({size.dim()}{spare:+d})/{stride})+1")


@_introduces("Resize")
def _resize(node: ir.Node, inputs: Sequence[_Sizes | None], rank: int, axis: int) -> _Size | None:
    scales = constant_of(node.inputs[2]) if len(node.inputs) > 2 else None
    if scales is None or len(scales) != rank or inputs[0] is None or not float(scales[axis]).is_integer():
        return None
    size = inputs[0][axis]
    return None if size is None else size * _Size(Fraction(int(scales[axis])))


@_introduces("Concat")
def _concat(node: ir.Node, inputs: Sequence[_Sizes | None], rank: int, axis: int) -> _Size | None:
    if axis == node.attributes.get_int("axis", 0) % rank:
        return None
    found = {sizes[axis] if sizes is not None else None for sizes in inputs}
    return found.pop() if len(found) == 1 else None
