"""What a model takes, and whether some arrays are that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_kfe.errors import KfeError

__all__ = ["InputSpec", "Label", "Sample", "Table", "batched_inputs", "fixed_batch", "make_table", "one_line"]

Sample = dict[str, np.ndarray]
"""One sample: input name -> array with a leading axis of size 1, where the input has a batch axis."""

Label = np.ndarray
"""The label of one sample: an array of rank 0 for a class index."""

LABEL_KEYS = ("labels", "label", "y")


@dataclass(frozen=True)
class InputSpec:
    """One model input: its name, element type and shape, where a symbolic dimension is a name or None."""

    name: str
    dtype: np.dtype
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        return f"{self.dtype} [{', '.join('?' if dim is None else str(dim) for dim in self.shape)}]"


def one_line(error: Exception) -> str:
    """Return what an error of another library says, or its type if it says nothing, for use in a message."""
    return " ".join(str(error).split()) or type(error).__name__


def _leading(inputs: Sequence[InputSpec]) -> int | str | None:
    """The leading dimension of the first input that can have a batch axis; 1 where none can."""
    return next((spec.shape[0] for spec in inputs if _may_be_batched(spec)), 1)


def _may_be_batched(spec: InputSpec) -> bool:
    is_single_image = len(spec.shape) == 3 and spec.shape[0] == 3
    return bool(spec.shape) and not is_single_image


def fixed_batch(inputs: Sequence[InputSpec]) -> int | None:
    """Return the batch size the model insists on, or None if it takes any."""
    leading = _leading(inputs)
    return leading if isinstance(leading, int) else None


def batched_inputs(inputs: Sequence[InputSpec]) -> frozenset[str]:
    """Return the names of the inputs whose first axis is the batch.

    ONNX does not say which axis is the batch. An input has one if its leading dimension is like that of the first
    input: the same number, or symbolic as well (exporters often give every input its own symbol). Scalars and a
    single image ``[3, H, W]`` have none.
    """
    batch = fixed_batch(inputs)

    def alike(dim: int | str | None) -> bool:
        return dim == batch if batch is not None else not isinstance(dim, int)

    return frozenset(spec.name for spec in inputs if _may_be_batched(spec) and alike(spec.shape[0]))


@dataclass(frozen=True)
class Table:
    """Arrays that hold a whole number of samples and fit the inputs in name, rank, dimensions and type of element.

    The values are only looked at row by row, so a memory-mapped file is never read as a whole.
    """

    name: str
    inputs: tuple[InputSpec, ...]
    arrays: dict[str, np.ndarray]
    labels: np.ndarray | None
    count: int
    stacked: bool

    def load(self, row: int) -> tuple[Sample, Label | None]:
        """Return one sample in the model's element types, and its label.

        Raises:
            KfeError: A value is not finite, or out of range of the model's element type.
        """
        where = f"{self.name}, sample {row}" if self.count > 1 else self.name
        batched = batched_inputs(self.inputs)
        sample = {}
        for spec in self.inputs:
            array = self.arrays[spec.name]
            if spec.name in batched:
                array = array[row : row + 1]
            elif self.stacked:
                array = array[row]
            sample[spec.name] = _convert(spec, np.asarray(array), where)
        return sample, None if self.labels is None else np.asarray(self.labels[row])


def make_table(feeds: Mapping[str, object], inputs: Sequence[InputSpec], name: str, *, stacked: bool) -> Table:
    """Check arrays against the inputs of a model.

    Args:
        feeds: Input name -> array. A key ``labels``, ``label`` or ``y`` that is no input holds the labels.
        inputs: What the model takes.
        name: Where the arrays come from, for messages.
        stacked: Whether an input *without* a batch axis has one value for each sample, stacked along a first axis;
            otherwise its array is what the model takes. Inputs with a batch axis have the samples along it anyway.

    Raises:
        KfeError: A name, rank, dimension or type is wrong, or the arrays hold different numbers of samples.
    """
    known = {spec.name for spec in inputs}
    label_keys = [key for key in LABEL_KEYS if key in feeds and key not in known]
    if unknown := [str(key) for key in feeds if key not in known and key not in label_keys]:
        raise KfeError(f"{name}: no input is called {', '.join(unknown)}; the model takes {', '.join(sorted(known))}")
    if missing := [spec.name for spec in inputs if spec.name not in feeds]:
        raise KfeError(
            f"{name}: input {', '.join(missing)} is missing; found {', '.join(map(str, feeds)) or 'nothing'}"
        )

    batched = batched_inputs(inputs)
    arrays = {spec.name: _as_array(feeds[spec.name], spec.name, name) for spec in inputs}
    counts: dict[str, int] = {}
    for spec in inputs:
        array, has_samples = arrays[spec.name], stacked or spec.name in batched
        _check_type(spec, array.dtype, name)
        _check_shape(spec, array.shape, spec.name in batched, has_samples, name)
        if has_samples:
            counts[spec.name] = array.shape[0]
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{key} {count}" for key, count in counts.items())
        raise KfeError(f"{name}: the first axes differ, so the samples cannot be told apart: {found}")
    count = next(iter(counts.values()), 1)
    labels = _labels(feeds[label_keys[0]], label_keys[0], count, name) if label_keys else None
    return Table(name, tuple(inputs), arrays, labels, count, stacked)


def _as_array(value: object, key: str, where: str) -> np.ndarray:
    try:
        array = np.asanyarray(value)  # keeps a memory map what it is
    except (ValueError, TypeError, RuntimeError) as error:
        raise KfeError(f"{where}: {key} is no array: {one_line(error)}") from error
    if array.dtype.hasobject and not all(isinstance(item, str) for item in array.flat):
        raise KfeError(f"{where}: {key} is an array of Python objects; give numbers in a plain array")
    return array


def _labels(value: object, key: str, count: int, where: str) -> np.ndarray:
    labels = _as_array(value, key, where)
    if count == 1 and (labels.ndim == 0 or labels.shape[0] != 1):
        return labels[None]
    if labels.ndim == 0 or labels.shape[0] != count:
        raise KfeError(f"{where}: {key} has shape {list(labels.shape)}, expected one label for each of {count} samples")
    return labels


def _check_shape(spec: InputSpec, shape: tuple[int, ...], has_batch_axis: bool, has_samples: bool, where: str) -> None:
    expected = spec.shape[1:] if has_batch_axis else spec.shape
    found = shape[1:] if has_samples else shape
    fits = len(shape) == len(expected) + has_samples and all(
        wanted == size for wanted, size in zip(expected, found, strict=True) if isinstance(wanted, int)
    )
    if not fits:
        samples_first = " with the samples stacked along a first axis" if has_samples and not has_batch_axis else ""
        raise KfeError(f"{where}: {spec.name} has shape {list(shape)}, the model takes {spec}{samples_first}")


def _is_float(dtype: np.dtype) -> bool:
    return dtype.kind == "f" or dtype.name == "bfloat16"


def _check_type(spec: InputSpec, dtype: np.dtype, where: str) -> None:
    """Floats may change their width and so may integers; anything else would be a guess at what was meant."""
    wanted = spec.dtype
    both_floats = _is_float(wanted) and _is_float(dtype)
    both_integers = wanted.kind in "iub" and dtype.kind in "iub"
    both_text = wanted.kind in "OUT" and dtype.kind in "OUT"
    if not (wanted == dtype or both_floats or both_integers or both_text):
        hint = " (scale it as the model expects)" if _is_float(wanted) and dtype.kind in "iub" else ""
        raise KfeError(f"{where}: {spec.name} is {dtype}, the model takes {wanted}; convert it first{hint}")


def _convert(spec: InputSpec, array: np.ndarray, where: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        converted = array.astype(spec.dtype, copy=False)
    if _is_float(spec.dtype):
        if not np.isfinite(array).all():
            raise KfeError(f"{where}: {spec.name} holds NaN or infinity; repair or leave out this sample")
        if not np.isfinite(converted).all():
            raise KfeError(f"{where}: {spec.name} holds values beyond the range of {spec.dtype}, which the model takes")
    elif spec.dtype != array.dtype and spec.dtype.kind in "iub" and not np.array_equal(converted, array):
        raise KfeError(f"{where}: {spec.name} holds values that do not fit {spec.dtype}, which the model takes")
    return converted
