"""What a metric keeps of every sample, and the scores of both models from that.

A score is higher for a better model. Its drop is that of the original less that of the model, with a 95 % interval from
samples drawn with replacement (Efron's percentile bootstrap) where there is no closed form.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_kfe.errors import KfeError
from onnx_kfe.evaluation._fidelity import Z95, HeadSpec

__all__ = ["Drop", "Outputs", "Score", "Scorer", "Sums", "class_labels", "label_ranks", "paired_interval"]

Outputs = Mapping[str, np.ndarray]
_RESAMPLES = 1000
_CHUNK = 20  # resamples computed together


@dataclass(frozen=True)
class Drop:
    """How much worse than the original a model was on some samples.

    Attributes:
        value: The drop, 0 for the original itself; below 0 where a model is better, by labels, than the original.
        low: Lower end of its 95 % interval.
        high: Upper end of it.
        samples: Number of samples.
    """

    value: float
    low: float
    high: float
    samples: int


@dataclass(frozen=True)
class Score:
    """What a metric says of a model and of the original.

    Attributes:
        metric: Name of the metric.
        original: Score of the original; None where the metric is itself a difference.
        model: Score of the model; None likewise.
        drop: How much worse the model is.
    """

    metric: str
    original: float | None
    model: float | None
    drop: Drop


class Scorer(ABC):
    """Takes in the outputs of both models batch by batch and scores them in the end.

    Args:
        head: The output that is scored.
        metadata: Metadata of the original model.
    """

    resamples = _RESAMPLES

    def __init__(self, head: HeadSpec, metadata: Mapping[str, str]) -> None:
        self.head = head
        self.metadata = metadata

    @property
    @abstractmethod
    def samples(self) -> int:
        """Number of samples so far."""

    @abstractmethod
    def update(self, reference: Outputs, outputs: Outputs, labels: np.ndarray | None) -> None:
        """Add a batch: the outputs of both models, and the labels where there are any.

        Raises:
            KfeError: The labels are not such as the metric takes.
        """

    @abstractmethod
    def scores(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores of the original and of the model, each sample counted so many times: ``[b, n]`` to twice ``[b]``."""

    def interval(self) -> tuple[float, float]:
        """95 % interval of the drop."""
        count = self.samples
        if count < 2:
            return -math.inf, math.inf
        random, even = np.random.default_rng(0), np.full(count, 1 / count)
        drops = []
        for _ in range(self.resamples // _CHUNK):
            old, new = self.scores(random.multinomial(count, even, _CHUNK).astype(np.float64))
            drops.append(old - new)
        low, high = np.quantile(np.concatenate(drops), [0.025, 0.975])
        return float(low), float(high)

    def result(self, metric: str) -> Score:
        """The scores over all samples so far."""
        old, new = (float(score[0]) for score in self.scores(np.ones((1, self.samples))))
        return Score(metric, old, new, Drop(old - new, *self.interval(), self.samples))


class Sums(Scorer):
    """A score of sums over the samples of a few numbers each; by default the mean of the first of them."""

    def __init__(self, head: HeadSpec, metadata: Mapping[str, str]) -> None:
        super().__init__(head, metadata)
        self.rows: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])

    @property
    def samples(self) -> int:
        """Number of rows so far."""
        return sum(map(len, self.rows[0]))

    def update(self, reference: Outputs, outputs: Outputs, labels: np.ndarray | None) -> None:
        """Add the rows of a batch."""
        old, new = (self.rows_of(values[self.head.name]) for values in (reference, outputs))
        for rows, added in zip(self.rows, self.measured(old, new, labels), strict=True):
            rows.append(added.astype(np.float64).reshape(len(old), -1))

    def rows_of(self, output: np.ndarray) -> np.ndarray:
        """An output as ``[n, positions, classes]``."""
        return self.head.rows(output)

    @abstractmethod
    def measured(self, old: np.ndarray, new: np.ndarray, labels: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of each sample for the original and the model, ``[n, ...]``, from ``[n, positions, classes]``."""

    def score(self, sums: np.ndarray, count: np.ndarray) -> np.ndarray:
        """The score of sums ``[b, k]`` over so many samples ``[b]``."""
        return np.asarray(sums[:, 0] / count)

    def scores(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The scores of the weighted sums."""
        old, new = (np.concatenate(rows) for rows in self.rows)
        count = weights.sum(1)
        return self.score(weights @ old, count), self.score(weights @ new, count)


def paired_interval(lost: float, gained: float, samples: int) -> tuple[float, float]:
    """Interval of the difference of paired proportions (Agresti and Min, Statistics in Medicine 2005).

    Only samples on which the two models differ tell them apart. Half a sample is added to each of the four cells, so
    that the interval is sound for few of them too.

    Args:
        lost: Share that the original has right and the model wrong.
        gained: Share that the model has right and the original wrong.
        samples: Number of samples.
    """
    total = samples + 2
    lost, gained = ((share * samples + 0.5) / total for share in (lost, gained))
    half = Z95 * math.sqrt((lost + gained - (lost - gained) ** 2) / total)
    return max(lost - gained - half, -1.0), min(lost - gained + half, 1.0)


def class_labels(head: HeadSpec, labels: np.ndarray | None, shape: Sequence[int], *, other: bool = False) -> np.ndarray:
    """Labels as classes ``[samples, positions]``.

    Args:
        head: The head that they belong to.
        labels: The labels of a batch.
        shape: ``[samples, positions, classes]`` of its output.
        other: Whether labels may be no class.

    Raises:
        KfeError: They are no integers, too many or too few, or no class.
    """
    samples, positions, classes = shape
    if labels is None or labels.dtype.kind not in "iu" or labels.size != samples * positions:
        found = "none" if labels is None else f"{labels.dtype} {list(labels.shape)}"
        raise KfeError(
            f"labels of head '{head.name}' must be {samples * positions} integers in this batch, not {found}"
        )
    index = labels.reshape(samples, positions).astype(np.int64)
    if not other and index.size and not (index.min() >= 0 and index.max() < classes):
        wrong = index.max() if index.max() >= classes else index.min()
        raise KfeError(f"label {wrong} is no class of head '{head.name}', which has {classes}")
    return index


def label_ranks(rows: np.ndarray, index: np.ndarray) -> np.ndarray:
    """How many classes are before the labelled one, of equals the first being first: ``[samples, positions]``.

    Args:
        rows: Scores ``[samples, positions, classes]``.
        index: Labels ``[samples, positions, 1]``.
    """
    own = np.take_along_axis(rows, index, -1)
    earlier = np.arange(rows.shape[-1]) < index
    return np.asarray(((rows > own) | ((rows == own) & earlier)).sum(-1))
