"""Texts that a recogniser of lines reads (connectionist temporal classification), and how right they are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnx_kfe.errors import KfeError, UsageError
from onnx_kfe.evaluation._scorers import Sums

__all__ = ["CharacterAccuracy", "edit_distance", "greedy_reading"]

_BLANK = 0
_UNKNOWN = -1
_ALPHABET = "character"  # metadata of the model, one character a line


class CharacterAccuracy(Sums):
    """1 less the edit distance in characters, over all samples, by the length of what should be read.

    That is the labels, classes padded with 0 or -1, or texts where the model's metadata have its ``character``s (a
    line for each class from 1 on); without labels what the original reads.
    """

    def measured(self, old: np.ndarray, new: np.ndarray, labels: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Edit distance and length of each sample, ``[n, 2]``."""
        before, after = ([greedy_reading(row) for row in rows.argmax(-1)] for rows in (old, new))
        wanted = before if labels is None else self._wanted(labels, old.shape)
        found = [
            np.array([[edit_distance(read, text), len(text)] for read, text in zip(readings, wanted, strict=True)])
            for readings in (before, after)
        ]
        return found[0], found[1]

    def score(self, sums: np.ndarray, count: np.ndarray) -> np.ndarray:
        """1 less distance over length."""
        return np.asarray(1 - sums[:, 0] / np.maximum(sums[:, 1], 1))

    def _wanted(self, labels: np.ndarray, shape: Sequence[int]) -> list[list[int]]:
        samples, _, classes = shape
        texts = labels.dtype.kind in "UTO" and labels.ndim == 1
        if len(labels) != samples or not (texts or (labels.dtype.kind in "iu" and labels.ndim == 2)):
            raise KfeError(
                f"--metric character-accuracy: labels must be one text or one row of classes for each of {samples} "
                f"samples, not {labels.dtype} {list(labels.shape)}"
            )
        if not texts:
            return [[int(c) for c in row if c > _BLANK] for row in labels]
        if _ALPHABET not in self.metadata:
            raise UsageError(
                f"--metric character-accuracy: labels are texts, and the model has no metadata '{_ALPHABET}' that says "
                "which class is which character; give rows of classes"
            )
        characters = self.metadata[_ALPHABET].split("\n")
        if len(characters) + 2 == classes:  # the last class is the space, which is not listed
            characters.append(" ")
        place = {character: index + 1 for index, character in enumerate(characters)}
        return [[place.get(character, _UNKNOWN) for character in str(text)] for text in labels]


def greedy_reading(decisions: np.ndarray) -> list[int]:
    """The classes read from the best class of each time step: repeats are one, blanks (0) are none."""
    first = np.flatnonzero(np.diff(decisions, prepend=_UNKNOWN))
    return [int(c) for c in decisions[first] if c != _BLANK]


def edit_distance(left: Sequence[int], right: Sequence[int]) -> int:
    """Fewest insertions, deletions and replacements from one to the other (Levenshtein 1966)."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left):
        before, row = row, [i + 1]
        for j, b in enumerate(right):
            row.append(min(before[j] + (a != b), before[j + 1] + 1, row[j] + 1))
    return row[-1]
