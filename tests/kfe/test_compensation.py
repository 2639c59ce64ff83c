"""Compensation against the KKT system over the entries of the weight."""

import numpy as np
import pytest

from onnx_kfe.kfe import BASES, IMPORTANCES, compensate, predicted_loss
from tests.kfe.quadratics import constrained_minimum, problem

MASKS = {
    "one row": ([1, 0, 1, 1], [1, 1, 1]),
    "one column": ([1, 1, 1, 1], [1, 0, 1]),
    "two rows": ([0, 1, 1, 0], [1, 1, 1]),
    "rows and columns": ([1, 0, 0, 1], [0, 1, 1]),
    "one of each left": ([0, 0, 1, 0], [0, 1, 0]),
}


def scattered(part: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    whole = np.zeros((len(rows), len(columns), *part.shape[2:]))
    whole[np.ix_(rows, columns)] = part
    return whole


@pytest.mark.parametrize("taps", [1, 3])
@pytest.mark.parametrize("name", MASKS)
def test_what_stays_is_the_constrained_minimum(name, taps):
    given = problem(4, 3, taps)
    rows, columns = (np.array(mask, bool) for mask in MASKS[name])
    kept = np.broadcast_to(np.outer(rows, columns)[:, :, None], given.weight.shape)
    expected = constrained_minimum(given.weight, given.input_factor, given.output_factor, kept)
    found = scattered(compensate(given.weight, given.input_factor, given.output_factor, rows, columns), rows, columns)
    assert np.linalg.norm(found - expected) < 1e-6 * np.linalg.norm(expected)
    assert np.linalg.norm(found - scattered(given.weight[np.ix_(rows, columns)], rows, columns)) > 1e-2


def test_each_side_can_be_left_out():
    given = problem(4, 3, 2)
    rows, columns = np.array([1, 0, 1, 1], bool), np.array([1, 1, 0], bool)
    factors, whole = (given.input_factor, given.output_factor), (np.ones(4, bool), np.ones(3, bool))
    only_rows = compensate(given.weight, *factors, rows, columns, input_side=False)
    only_columns = compensate(given.weight, *factors, rows, columns, output_side=False)
    neither = compensate(given.weight, *factors, rows, columns, input_side=False, output_side=False)
    np.testing.assert_allclose(only_rows, compensate(given.weight, *factors, rows, whole[1])[:, columns])
    np.testing.assert_allclose(only_columns, compensate(given.weight, *factors, whole[0], columns)[rows])
    np.testing.assert_array_equal(neither, given.weight[np.ix_(rows, columns)])
    losses = [
        predicted_loss(scattered(part, rows, columns) - given.weight, *factors)
        for part in (compensate(given.weight, *factors, rows, columns), only_rows, only_columns, neither)
    ]
    assert losses[0] < min(losses[1:])


@pytest.mark.parametrize("basis", BASES)
def test_its_loss_is_what_the_surgeon_predicts(basis):
    given = problem(4, 3, 2)
    there = BASES[basis](given.weight, given.input_factor, given.output_factor)
    scores = IMPORTANCES["kron-obs"](there)
    for gone in range(4):
        rows, columns = np.arange(4) != gone, np.ones(3, bool)
        left = scattered(
            compensate(there.weight, there.input_factor, there.output_factor, rows, columns), rows, columns
        )
        loss = predicted_loss(left - there.weight, there.input_factor, there.output_factor)
        assert loss == pytest.approx(scores.rows[gone], rel=1e-5)


def test_kernels_keep_their_shape_and_nothing_can_be_left():
    weight = np.random.default_rng(0).normal(size=(4, 3, 1, 2))
    given = problem(4, 3, 2)
    rows, columns = np.array([1, 0, 1, 1], bool), np.array([1, 1, 0], bool)
    found = compensate(weight, given.input_factor, given.output_factor, rows, columns)
    flat = compensate(weight.reshape(4, 3, 2), given.input_factor, given.output_factor, rows, columns)
    assert found.shape == (3, 2, 1, 2)
    np.testing.assert_array_equal(found[:, :, 0], flat)
    nothing = compensate(weight, given.input_factor, given.output_factor, rows, np.zeros(3, bool))
    assert nothing.shape == (3, 0, 1, 2)


def test_dead_channels_do_no_harm():
    given = problem(4, 3, 2)
    dead = np.kron(np.array([1.0, 0.0, 1.0]), np.ones(2))
    factor = given.input_factor * np.outer(dead, dead)
    kept = np.array([1, 1, 0], bool)
    found = compensate(given.weight, factor, given.output_factor, np.ones(4, bool), kept)
    np.testing.assert_array_equal(found[:, 1], given.weight[:, 1])
    assert np.isfinite(found).all()
