"""Metrics that compare both models sample by sample."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from onnx_kfe.errors import KfeError
from onnx_kfe.evaluation._fidelity import HeadSpec
from onnx_kfe.evaluation._scorers import Outputs, Scorer, Sums, class_labels, label_ranks, paired_interval

__all__ = ["Cosine", "MeanIou", "Psnr", "Spearman", "TopFive"]

_PSNR_CAP = 100.0  # dB; beyond what single precision distinguishes
_MOST_EMBEDDINGS = 2000  # whose pairs, and no more, are ranked


class TopFive(Sums):
    """Share of the labels that are among the best five classes; the interval is that of paired proportions."""

    def measured(self, old: np.ndarray, new: np.ndarray, labels: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Share of a sample's labels that a model has among the best five, and that it alone has, ``[n, 2]``."""
        index = class_labels(self.head, labels, old.shape)[..., None]
        before, after = (label_ranks(rows, index) < 5 for rows in (old, new))
        return (
            np.stack([before.mean(1), (before & ~after).mean(1)], 1),
            np.stack([after.mean(1), (after & ~before).mean(1)], 1),
        )

    def interval(self) -> tuple[float, float]:
        """That of paired proportions."""
        lost, gained = (float(np.concatenate(rows)[:, 1].mean()) for rows in self.rows)
        return paired_interval(lost, gained, self.samples)


class Cosine(Sums):
    """Mean cosine of the angle between a sample's output and the original's, over all its elements."""

    def measured(self, old: np.ndarray, new: np.ndarray, labels: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """1 and the cosine of each sample."""
        left, right = _flat(old), _flat(new)
        norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        same = np.where((left == right).all(1), 1.0, 0.0)
        cosines = np.divide((left * right).sum(1), norms, out=same, where=norms > 0)
        return np.ones(len(old)), cosines


class Psnr(Sums):
    """Mean peak signal-to-noise ratio of a sample in dB, at most 100; the peak is the range of what is compared with.

    That is the labels, arrays like the output, or where there are none the original's output, which then has 100 dB.
    """

    _low, _high = math.inf, -math.inf

    def measured(self, old: np.ndarray, new: np.ndarray, labels: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """The mean squared error of each sample."""
        wanted = _flat(old) if labels is None else self._targets(labels, old)
        self._low, self._high = min(self._low, wanted.min()), max(self._high, wanted.max())
        before, after = (np.square(_flat(rows) - wanted).mean(1) for rows in (old, new))
        return before, after

    def scores(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The mean ratios in dB."""
        peak = (self._high - self._low) ** 2 or 1.0
        count = weights.sum(1)
        old, new = (
            weights @ np.minimum(10 * np.log10(peak / np.maximum(np.concatenate(errors), 1e-300)), _PSNR_CAP)
            for errors in self.rows
        )
        return old[:, 0] / count, new[:, 0] / count

    def rows_of(self, output: np.ndarray) -> np.ndarray:
        """An output as ``[n, 1, elements]``, in the order of the labels."""
        return output.reshape(len(self.head.rows(output)), 1, -1)

    def _targets(self, labels: np.ndarray, like: np.ndarray) -> np.ndarray:
        if labels.dtype.kind not in "iuf" or labels.size != like.size:
            raise KfeError(
                f"--metric psnr: labels of output '{self.head.name}' must be arrays of its shape, {like.size} numbers "
                f"in this batch, not {labels.dtype} {list(labels.shape)}"
            )
        return labels.reshape(len(like), -1).astype(np.float64)


class MeanIou(Sums):
    """Mean over classes of intersection over union of positions, with the labels or the original's decisions.

    Classes that neither has are left out, and so are positions whose label is no class (often 255).
    """

    def measured(self, old: np.ndarray, new: np.ndarray, labels: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Intersections and unions of each sample and class, ``[n, 2, classes]``."""
        classes = old.shape[-1]
        before, after = old.argmax(-1), new.argmax(-1)
        truth = before if labels is None else class_labels(self.head, labels, old.shape, other=True)
        rows = [
            np.stack([_overlap(one, other, classes) for one, other in zip(truth, decided, strict=True)])
            for decided in (before, after)
        ]
        return rows[0], rows[1]

    def score(self, sums: np.ndarray, count: np.ndarray) -> np.ndarray:
        """The mean over the classes that there are."""
        intersection, union = np.split(sums, 2, axis=1)
        there = union > 0
        return np.asarray(np.divide(intersection, union, out=np.zeros_like(union), where=there).sum(1) / there.sum(1))


class Spearman(Scorer):
    """Spearman's rank correlation between the model's and the original's cosine similarities of all pairs of samples.

    Of more than 2,000 samples the first are taken. Ranks are those among all pairs, in resamples too.
    """

    resamples = 200

    def __init__(self, head: HeadSpec, metadata: Mapping[str, str]) -> None:
        super().__init__(head, metadata)
        self._embeddings: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        self._forms: list[np.ndarray] = []

    @property
    def samples(self) -> int:
        """Number of embeddings so far."""
        return min(sum(map(len, self._embeddings[0])), _MOST_EMBEDDINGS)

    def update(self, reference: Outputs, outputs: Outputs, labels: np.ndarray | None) -> None:
        """Keep the embeddings of a batch."""
        for kept, values in zip(self._embeddings, (reference, outputs), strict=True):
            kept.append(_flat(self.head.rows(values[self.head.name])))

    def scores(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """1, and the correlation of ranks where a pair counts as often as both its samples."""
        forms = self._forms = self._forms or self._quadratic_forms()
        pairs = weights.sum(1) ** 2 - np.square(weights).sum(1)
        old, new, product, squared_old, squared_new = (((weights @ form) * weights).sum(1) / pairs for form in forms)
        spread = np.sqrt(np.maximum((squared_old - old**2) * (squared_new - new**2), 0.0))
        correlation = np.divide(product - old * new, spread, out=np.zeros_like(spread), where=spread > 0)
        return np.ones(len(weights)), correlation

    def _quadratic_forms(self) -> list[np.ndarray]:
        """Ranks of the pairs in both models, centred, with their products: ``[n, n]`` each."""
        if self.samples < 3:
            raise KfeError(f"--metric spearman: {self.samples} samples have no pairs to rank; give at least 3")
        ranks = []
        for kept in self._embeddings:
            found = np.concatenate(kept)[:_MOST_EMBEDDINGS]
            unit = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-300)
            places = np.triu_indices(len(unit), 1)
            order = _ranks((unit @ unit.T)[places])
            square = np.zeros((len(unit), len(unit)))
            square[places] = order - order.mean()
            ranks.append(square + square.T)
        old, new = ranks
        return [old, new, old * new, old * old, new * new]


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 on, of equals their mean."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[place])


def _flat(rows: np.ndarray) -> np.ndarray:
    return rows.reshape(len(rows), -1).astype(np.float64)


def _overlap(truth: np.ndarray, decided: np.ndarray, classes: int) -> np.ndarray:
    """Positions in the intersection and in the union of each class, ``[2, classes]``."""
    known = (truth >= 0) & (truth < classes)
    truth, decided = truth[known], decided[known]
    both = np.bincount(truth[truth == decided], minlength=classes)
    either = np.bincount(truth, minlength=classes) + np.bincount(decided, minlength=classes) - both
    return np.stack([both, either])
