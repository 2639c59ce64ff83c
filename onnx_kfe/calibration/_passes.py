"""A pass of an instrumented model over the data: the same batches, noise and grids wherever it runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from onnx_kfe.calibration._batches import Batch, batches
from onnx_kfe.calibration._data import Dataset
from onnx_kfe.calibration._forward import Forward
from onnx_kfe.calibration._grid import grid_phase
from onnx_kfe.calibration._heads import Head, sample_noise
from onnx_kfe.calibration._inputs import InputSpec, fixed_batch
from onnx_kfe.calibration._instrument import PHASE_INPUT, activation_bytes, noise_input
from onnx_kfe.calibration._loss import Loss
from onnx_kfe.errors import KfeError
from onnx_kfe.graph import Network, concrete_shapes, nominal_input_shapes
from onnx_kfe.runtime import feeds_for

if TYPE_CHECKING:
    import onnxruntime as ort

__all__ = ["ACTIVATION_BUDGET", "Progress", "batch_size", "blocks", "data_specs", "input_specs", "run_pass"]

ACTIVATION_BUDGET = 2**30  # bytes of activations of one batch, forward and backward together
_LARGEST_BATCH = 64

Progress = Callable[[int], None]


def input_specs(model: ir.Model) -> list[InputSpec]:
    """What the model takes, as the data readers want it.

    Raises:
        KfeError: An input is no tensor, or of unknown rank.
    """
    specs = []
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        if not isinstance(value.type, ir.TensorType):
            raise KfeError(
                f"input '{value.name}' is no tensor: a model with sequences or optionals as inputs can't be fed"
            )
        if value.shape is None:
            raise KfeError(f"input '{value.name}' has no declared shape: declare one, with names for free axes")
        shape = tuple(size if isinstance(size, int) else size.value for size in value.shape)
        specs.append(InputSpec(value.name or "", np.dtype(value.type.dtype.numpy()), shape))
    return specs


def data_specs(model: ir.Model, loss: Loss | None) -> list[InputSpec]:
    """What statistics are collected from: what the model takes and, behind it, what a loss reads besides."""
    return [*input_specs(model), *(loss.targets if loss is not None else ())]


def batch_size(network: Network, input_shapes: Mapping[str, Sequence[int]]) -> int:
    """Samples run together: a function of the model and its input shapes, so that shards divide the data alike."""
    shapes = concrete_shapes(network.model, nominal_input_shapes(network.model, input_shapes))
    return int(np.clip(ACTIVATION_BUDGET // (3 * max(activation_bytes(network.model, shapes), 1)), 1, _LARGEST_BATCH))


def blocks(
    data: Dataset, size: int, specs: Sequence[InputSpec], shard: tuple[int, int] = (0, 1)
) -> Iterator[tuple[int, Batch]]:
    """Batches within blocks of consecutive indices, so that any shard sees the batches of the single run.

    Args:
        data: The samples.
        size: Samples run together.
        specs: What the model takes.
        shard: ``(i, n)``: the i-th of n parts.

    Yields:
        Number of the block, and a batch of it.
    """
    fixed = fixed_batch(specs) or 1
    length = size if fixed == 1 else 16 * fixed
    index, count = shard
    chosen = data if count == 1 else data.where(lambda place: place // length % count == index)
    for block, items in itertools.groupby(chosen, key=lambda item: item.index // length):
        for batch in batches(items, size, specs):
            yield block, batch


def run_pass(
    session: ort.InferenceSession,
    names: Sequence[str],
    numbered: Iterable[tuple[int, Batch]],
    forward: Forward,
    heads: list[Head],
    seed: int,
    *,
    loss: Loss | None = None,
    progress: Progress,
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Run an instrumented model over batches.

    Args:
        session: Of the model.
        names: Its outputs.
        numbered: As of `blocks`.
        forward: The model up to its heads.
        heads: The heads, with their scales.
        seed: Seed of noise and positions.
        loss: What is differentiated in the place of the heads.
        progress: Called with the number of samples done since the last call.

    Yields:
        Samples of a batch, and its outputs by name.

    Raises:
        KfeError: ONNX Runtime fails on a batch.
    """
    for block, batch in numbered:
        given = _noise(batch, forward, heads, seed) if loss is None else loss.feeds(batch)
        feeds = _feeds(session, batch, given, seed, block)
        yield len(batch), dict(zip(names, _run(session, names, feeds), strict=True))
        progress(len(batch))


def _noise(batch: Batch, forward: Forward, heads: list[Head], seed: int) -> dict[str, np.ndarray]:
    shapes = forward.sample_shapes(batch)
    drawn = [sample_noise(heads, shapes, seed, int(index)) for index in batch.indices]
    return {noise_input(head): np.concatenate([row[place] for row in drawn]) for place, head in enumerate(heads)}


def _feeds(session: Any, batch: Batch, given: Mapping[str, np.ndarray], seed: int, block: int) -> dict[str, np.ndarray]:
    return feeds_for(session, {**batch.feeds, **given, PHASE_INPUT: grid_phase(seed, block)})


def _run(session: Any, names: Sequence[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    try:
        return session.run(names, feeds)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise KfeError(f"the instrumented model failed in ONNX Runtime: {reason}") from error
