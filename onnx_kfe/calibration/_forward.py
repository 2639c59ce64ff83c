"""The model up to its heads: the scale of each head and the shape its noise must have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from onnx_kfe.autodiff import Emitter
from onnx_kfe.calibration._batches import Batch
from onnx_kfe.calibration._heads import Head, emit_source
from onnx_kfe.calibration._weight_file import WeightFile
from onnx_kfe.errors import KfeError
from onnx_kfe.runtime import feeds_for

__all__ = ["Forward"]

Shapes = dict[str, tuple[int, ...]]


class Forward:
    """Runs a model to the values that its heads are differentiated from.

    Args:
        model: As of `differentiable_copy`; it is not changed.
        heads: The heads.
        weights: Those of the model.
        providers: Execution providers.
        threads: Threads.
    """

    def __init__(
        self,
        model: ir.Model,
        heads: Sequence[Head],
        weights: WeightFile,
        *,
        providers: Sequence[str] = (),
        threads: int | None = None,
    ) -> None:
        self._heads = list(heads)
        copy = model.clone()
        values = {value.name: value for node in copy.graph for value in node.outputs}
        emit = Emitter(copy.graph, prefix="kfe/")
        sources = {head.output: emit_source(emit, head, values) for head in heads}
        self._sources = {output: value.name or "" for output, value in sources.items()}
        copy.graph.outputs.clear()
        copy.graph.outputs.extend(dict.fromkeys(sources.values()))
        self._session = weights.session(copy, providers=providers, threads=threads)
        self._known: dict[tuple[object, ...], Shapes] = {}

    def run(self, batch: Batch) -> dict[str, np.ndarray]:
        """What every head is differentiated from, by output name.

        Raises:
            KfeError: ONNX Runtime fails on the batch.
        """
        names = list(dict.fromkeys(self._sources.values()))
        try:
            values = self._session.run(names, feeds_for(self._session, batch.feeds))
        except Exception as error:
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in batch.feeds.items())
            raise KfeError(f"the model fails on {shapes}: {str(error).strip().splitlines()[0]}") from error
        by_name = dict(zip(names, values, strict=True))
        return {output: by_name[name] for output, name in self._sources.items()}

    def sample_shapes(self, batch: Batch) -> Shapes:
        """Shape of what each head is differentiated from for one sample ``(1, ...)``, by output name."""
        key = (len(batch), *(array.shape[1:] for array in batch.feeds.values()))
        if key not in self._known:
            self._known[key] = {
                name: _per_sample(name, value.shape, len(batch)) for name, value in self.run(batch).items()
            }
        return self._known[key]

    def scaled_heads(self, numbered: Iterable[tuple[int, Batch]]) -> list[Head]:
        """The heads with the scales and weights by which several weigh alike.

        Quantities are in units of their standard deviation over the batches. Of several heads each is divided by the
        number of its decisions (positions of classes, else elements, of an embedding those of the mean) and multiplied
        by the mean of these numbers, so that a map of 10,000 positions weighs as much as 10 of them, and heads of one
        size stay as they are.
        """
        if len(self._heads) == 1 and not self._heads[0].quantity:
            return self._heads
        moments = {head.output: np.zeros(3) for head in self._heads}
        decisions = dict.fromkeys(moments, 0.0)
        for _, batch in numbered:
            values = self.run(batch)
            for head in self._heads:
                wide = values[head.output].astype(np.float64)
                moments[head.output] += (wide.size, wide.sum(), np.square(wide).sum())
                decisions[head.output] += _decisions(head, wide)
        mean = sum(decisions.values()) / len(decisions)
        scaled = [h.with_scale(_deviation(moments[h.output])) if h.quantity else h for h in self._heads]
        return [h.with_weight(mean / decisions[h.output]) if decisions[h.output] else h for h in scaled]


def _decisions(head: Head, value: np.ndarray) -> float:
    classes = value.shape[head.axis] if head.kind == "categorical" and value.ndim else 1
    return value.size / max(classes, 1)


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
