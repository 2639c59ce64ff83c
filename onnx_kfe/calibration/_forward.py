"""The model up to its heads: the scale of each head and the shape its noise must have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from onnx_kfe.calibration._batches import Batch
from onnx_kfe.calibration._heads import Head
from onnx_kfe.errors import KfeError
from onnx_kfe.graph import serialize
from onnx_kfe.runtime import create_session, feeds_for

__all__ = ["Forward"]

Shapes = dict[str, tuple[int, ...]]


class Forward:
    """Runs a model to the values that its heads are differentiated from.

    Args:
        model: As of `differentiable_copy`; it is not changed.
        heads: The heads.
        providers: Execution providers.
        threads: Threads.
    """

    def __init__(
        self, model: ir.Model, heads: Sequence[Head], *, providers: Sequence[str] = (), threads: int | None = None
    ) -> None:
        self._heads = list(heads)
        copy = model.clone()
        values = {value.name: value for node in copy.graph for value in node.outputs}
        self._sources = list(dict.fromkeys(head.source for head in heads))
        copy.graph.outputs.clear()
        copy.graph.outputs.extend(values[name] for name in self._sources)
        self._session = create_session(serialize(copy), providers=providers, threads=threads)
        self._known: dict[tuple[object, ...], Shapes] = {}

    def run(self, batch: Batch) -> dict[str, np.ndarray]:
        """Value of every head's source, by output name.

        Raises:
            KfeError: ONNX Runtime fails on the batch.
        """
        try:
            values = self._session.run(self._sources, feeds_for(self._session, batch.feeds))
        except Exception as error:
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in batch.feeds.items())
            raise KfeError(f"the model fails on {shapes}: {str(error).strip().splitlines()[0]}") from error
        by_source = dict(zip(self._sources, values, strict=True))
        return {head.output: by_source[head.source] for head in self._heads}

    def sample_shapes(self, batch: Batch) -> Shapes:
        """Shape of each head's source for one sample ``(1, ...)``, by output name."""
        key = (len(batch), *(array.shape[1:] for array in batch.feeds.values()))
        if key not in self._known:
            self._known[key] = {
                name: _per_sample(name, value.shape, len(batch)) for name, value in self.run(batch).items()
            }
        return self._known[key]

    def scaled_heads(self, numbered: Iterable[tuple[int, Batch]]) -> list[Head]:
        """The heads, Gaussian ones in units of their standard deviation over the batches, so that all weigh alike."""
        gaussian = [head for head in self._heads if head.kind == "gaussian"]
        if not gaussian:
            return self._heads
        moments = {head.output: np.zeros(3) for head in gaussian}
        for _, batch in numbered:
            for name, value in self.run(batch).items():
                if name in moments:
                    wide = value.astype(np.float64)
                    moments[name] += (wide.size, wide.sum(), np.square(wide).sum())
        return [head.with_scale(_deviation(moments[head.output])) if head in gaussian else head for head in self._heads]


def _deviation(moments: np.ndarray) -> float:
    count, total, squares = moments
    if count == 0:  # an output without elements
        return 1.0
    deviation = float(np.sqrt(max(squares / count - (total / count) ** 2, 0.0)))
    return deviation if deviation > 0 else 1.0


def _per_sample(name: str, shape: tuple[int, ...], samples: int) -> tuple[int, ...]:
    if not shape or shape[0] % samples:
        raise KfeError(
            f"output '{name}' of shape {list(shape)} has no axis of {samples} samples; use --head {name}=none"
        )
    return (shape[0] // samples, *shape[1:])
