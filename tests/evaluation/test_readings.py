"""Readings of lines: decoding and edit distances against brute force, character accuracies by hand."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest

from onnx_kfe.errors import KfeError, UsageError
from onnx_kfe.evaluation import HeadSpec, Score
from onnx_kfe.evaluation._drop import new_scorer
from onnx_kfe.evaluation._readings import edit_distance, greedy_reading


def brute_force(left: str, right: str) -> int:
    @functools.cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(
            distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (left[i - 1] != right[j - 1])
        )

    return distance(len(left), len(right))


def test_edit_distances():
    words = ["".join(letters) for n in range(4) for letters in itertools.product("ab", repeat=n)]
    for left, right in itertools.product([*words, "kitten", "sitting"], repeat=2):
        assert edit_distance(left, right) == brute_force(left, right)
    assert edit_distance("kitten", "sitting") == 3


@pytest.mark.parametrize(
    ("steps", "read"),
    [([0, 0], []), ([1, 1, 0, 1, 2, 2], [1, 1, 2]), ([3, 0, 0, 3], [3, 3]), ([2, 1, 2], [2, 1, 2]), ([], [])],
)
def test_greedy_readings(steps, read):
    assert greedy_reading(np.array(steps, int)) == read


OLD = [[1, 1, 0, 2, 0], [3, 0, 3, 3, 1]]  # ab, cca
NEW = [[1, 0, 0, 2, 2], [3, 3, 3, 0, 1]]  # ab, ca
CLASSES = 5


def scored(labels=None, metadata=None, old=OLD, new=NEW) -> Score:
    scorer = new_scorer("character-accuracy", HeadSpec("y", "categorical"), metadata or {})
    scorer.update({"y": np.eye(CLASSES)[old]}, {"y": np.eye(CLASSES)[new]}, labels)
    return scorer.result("character-accuracy")


def test_against_the_reading_of_the_original():
    found = scored()
    assert (found.original, found.model) == (1.0, pytest.approx(1 - 1 / 5))
    assert found.drop.value == pytest.approx(1 / 5)


@pytest.mark.parametrize(
    ("labels", "metadata"),
    [
        (np.array([[1, 2, 2, 0], [3, 1, -1, -1]]), {}),
        (np.array(["abb", "ca"]), {"character": "a\nb\nc\nd"}),
        (np.array(["abb", "ca"]), {"character": "a\nb\nc"}),
    ],
)
def test_against_labels(labels, metadata):
    found = scored(labels, metadata)
    assert found.original == pytest.approx(1 - 2 / 5)  # ab for abb, cca for ca
    assert found.model == pytest.approx(1 - 1 / 5)
    assert found.drop.value == pytest.approx(-1 / 5)


def test_spaces_and_characters_that_the_model_lacks():
    lines = [[1, 4, 2]]
    assert scored(np.array(["a b"]), {"character": "a\nb\nc"}, lines, lines).model == 1
    assert scored(np.array(["axb"]), {"character": "a\nb\nc"}, lines, lines).model == pytest.approx(2 / 3)


def test_labels_that_cannot_be_read():
    with pytest.raises(UsageError, match="labels are texts, and the model has no metadata 'character'"):
        scored(np.array(["abb", "ca"]))
    with pytest.raises(KfeError, match=r"one text or one row of classes for each of 2 samples, not int64 \[2\]"):
        scored(np.array([1, 2]))
