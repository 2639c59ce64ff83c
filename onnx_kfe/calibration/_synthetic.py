"""Made-up samples, for what depends on shapes alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from onnx_kfe.calibration._data import Dataset
from onnx_kfe.calibration._inputs import InputSpec, Label, Sample, batched_inputs
from onnx_kfe.calibration._source import Loader, Source
from onnx_kfe.errors import UsageError

__all__ = ["synthetic_dataset"]

_IMAGE_SIDE = 224
_OTHER_DIM = 16
_COLOURS = 3


class _SyntheticSource(Source):
    def __init__(
        self, inputs: Sequence[InputSpec], shapes: Mapping[str, tuple[int, ...]], count: int, seed: int
    ) -> None:
        self._inputs = inputs
        self._shapes = shapes
        self._count = count
        self._seed = seed

    def loaders(self) -> Iterator[Loader]:
        return (partial(self._draw, index) for index in range(self._count))

    def _draw(self, index: int) -> tuple[Sample, Label | None]:
        generator = np.random.default_rng([self._seed, index])
        return {spec.name: _draw(generator, self._shapes[spec.name], spec.dtype) for spec in self._inputs}, None

    def count(self) -> int:
        return self._count

    def describe(self) -> str:
        shapes = ", ".join(f"{name} {list(shape)}" for name, shape in self._shapes.items())
        return f"{self._count} synthetic samples of {shapes} (standard normal, integers 0 and 1)"


def _draw(generator: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if dtype.kind in "iub":
        # 0 and 1 are in range of every embedding and are masks as well.
        return generator.integers(0, 2, shape).astype(dtype)
    return generator.standard_normal(shape, np.float32).astype(dtype)


def synthetic_dataset(
    inputs: Sequence[InputSpec],
    count: int,
    seed: int,
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Dataset:
    """Draw samples: standard normal floats, integers 0 and 1. Each depends on the seed and its index alone.

    Args:
        inputs: What the model takes.
        count: Number of samples.
        seed: Seed of the draw.
        input_shapes: Input name -> whole shape, where the graph leaves dimensions open; the batch axis counts for
            nothing. A symbol given here for one input holds for the others. Other open dimensions become 3 channels
            of 224 x 224 in inputs of rank 4, and 16 elsewhere.

    Raises:
        UsageError: A shape does not fit its input, or an input takes neither numbers nor booleans.
    """
    given = dict(input_shapes or {})
    batched = batched_inputs(inputs)
    symbols: dict[str, int] = {}
    for name, shape in given.items():
        spec = next((spec for spec in inputs if spec.name == name), None)
        if spec is None:
            raise UsageError(f"input shape for {name}: the model takes {', '.join(spec.name for spec in inputs)}")
        _bind(spec, shape, spec.name in batched, symbols)
    for spec in inputs:
        if spec.dtype.kind not in "fiub" and spec.dtype.name != "bfloat16":
            raise UsageError(f"input {spec.name} is {spec.dtype}, which cannot be made up: give data")
    shapes = {spec.name: _fill(spec, given.get(spec.name), spec.name in batched, symbols) for spec in inputs}
    return Dataset(_SyntheticSource(tuple(inputs), shapes, count, seed))


def _bind(spec: InputSpec, shape: tuple[int, ...], has_batch_axis: bool, symbols: dict[str, int]) -> None:
    """Check a given shape and note what its symbols stand for."""
    fits = len(shape) == len(spec.shape) and all(
        size >= 1 and (wanted == size or not isinstance(wanted, int) or (has_batch_axis and axis == 0))
        for axis, (wanted, size) in enumerate(zip(spec.shape, shape, strict=True))
    )
    if not fits:
        raise UsageError(f"input shape {list(shape)} does not fit {spec.name}, which is {spec}")
    symbols.update({dim: size for dim, size in zip(spec.shape, shape, strict=True) if isinstance(dim, str)})


def _fill(
    spec: InputSpec, given: tuple[int, ...] | None, has_batch_axis: bool, symbols: Mapping[str, int]
) -> tuple[int, ...]:
    channels_last = len(spec.shape) == 4 and spec.shape[3] in (1, 3)

    def dimension(axis: int, dim: int | str | None) -> int:
        if has_batch_axis and axis == 0:
            return 1
        if given is not None:
            return given[axis]
        if isinstance(dim, int):
            return dim
        if isinstance(dim, str) and dim in symbols:
            return symbols[dim]
        if len(spec.shape) == 4:
            return _COLOURS if axis == 1 and not channels_last else _IMAGE_SIDE
        return _OTHER_DIM

    return tuple(dimension(axis, dim) for axis, dim in enumerate(spec.shape))
