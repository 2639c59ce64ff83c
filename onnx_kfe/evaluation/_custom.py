"""A metric of the user's own: ``package.module:function``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from onnx_kfe.errors import KfeError
from onnx_kfe.evaluation._scorers import Outputs, Scorer

__all__ = ["CustomScorer"]

Given = dict[str, Any]


class CustomScorer(Scorer):
    """Calls ``function(outputs, original, labels)`` for a number, higher for a better model.

    `outputs` and `original` map the names of all outputs to their values over all samples: an array with the samples
    on the first axis, or a list of one array a sample where their shapes differ; an embedding is its mean over the
    positions. `labels` are likewise, or None. The score of the original is ``function(original, original, labels)``,
    the interval is from 100 resamples.

    Args:
        name: Name of the function, for messages.
        function: The function.
    """

    resamples = 100

    def __init__(self, name: str, function: Callable[..., object]) -> None:
        self._name, self._function = name, function
        self._original: dict[str, list[np.ndarray]] = {}
        self._outputs: dict[str, list[np.ndarray]] = {}
        self._labels: list[np.ndarray] = []
        self._samples = 0

    @property
    def samples(self) -> int:
        """Number of samples so far."""
        return self._samples

    def update(self, reference: Outputs, outputs: Outputs, labels: np.ndarray | None) -> None:
        """Keep what the models gave for one sample."""
        for kept, values in ((self._original, reference), (self._outputs, outputs)):
            for name, value in values.items():
                kept.setdefault(name, []).append(value)
        if labels is not None:
            self._labels.append(labels)
        self._samples += 1

    def scores(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The scores of samples taken so many times."""
        pairs = [self._scored(np.repeat(np.arange(self.samples), row.astype(int))) for row in weights]
        old, new = np.array(pairs).T
        return old, new

    def _scored(self, chosen: np.ndarray) -> tuple[float, float]:
        original, outputs = (
            {name: _taken(values, chosen) for name, values in kept.items()} for kept in (self._original, self._outputs)
        )
        labels = _taken(self._labels, chosen) if self._labels else None
        return self._call(original, original, labels), self._call(outputs, original, labels)

    def _call(self, outputs: Given, original: Given, labels: Any) -> float:
        try:
            score = float(self._function(outputs, original, labels))  # type: ignore[arg-type]
        except Exception as error:
            raise KfeError(f"--metric {self._name} raised {type(error).__name__}: {error}") from error
        if not np.isfinite(score):
            raise KfeError(f"--metric {self._name} returned {score}; it must be a finite number, higher for better")
        return score


def _taken(values: list[np.ndarray], chosen: np.ndarray) -> np.ndarray | list[np.ndarray]:
    """Some of the samples, along the first axis where that is of size 1 and all have one shape."""
    some = [values[i] for i in chosen]
    alike = len({value.shape for value in values}) == 1 and values[0].shape[:1] == (1,)
    return np.concatenate(some) if alike else some
