"""Coordinates and importances against loops, explicit Kronecker products and constrained minimisation."""

import itertools

import numpy as np
import pytest

from onnx_kfe.errors import KfeError
from onnx_kfe.kfe import BASES, IMPORTANCES, Coordinates, EigenMoments, predicted_loss
from tests.kfe.quadratics import Problem, constrained_minimum, problem

SHAPES = [(4, 3, 2), (3, 4, 1), (2, 2, 3)]
EXACT = dict.fromkeys(("c-obd", "kron-obd"), 1e-10) | dict.fromkeys(("c-obs", "kron-obs"), 1e-4)  # damped


def coordinates_of(given: Problem, basis: str) -> Coordinates:
    return BASES[basis](given.weight, given.input_factor, given.output_factor)


def change_basis(given: Problem, coordinates: Coordinates) -> np.ndarray:
    """The weight that the coordinates stand for."""
    return np.einsum("po,oct,dc->pdt", coordinates.output_basis, coordinates.weight, coordinates.input_basis)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_basis_changes_neither_the_weight_nor_the_loss(shape, basis):
    given = problem(*shape)
    there = coordinates_of(given, basis)
    np.testing.assert_allclose(change_basis(given, there), given.weight, atol=1e-12)
    for matrix in (there.input_basis, there.output_basis):
        np.testing.assert_allclose(matrix.T @ matrix, np.eye(len(matrix)), atol=1e-12)
    change = np.random.default_rng(1).normal(size=shape)
    back = np.einsum("po,oct,dc->pdt", there.output_basis, change, there.input_basis)
    expected = predicted_loss(back, given.input_factor, given.output_factor)
    assert predicted_loss(change, there.input_factor, there.output_factor) == pytest.approx(expected)


def test_eigenvalues_fall_and_factors_are_diagonal():
    given = problem(5, 4, 3)
    there = coordinates_of(given, "kfe")
    values = np.linalg.eigvalsh(given.output_factor)[::-1]
    np.testing.assert_allclose(there.output_factor, np.diag(values), atol=1e-12)
    by_tap = [given.input_factor[k::3, k::3] for k in range(3)]
    channels = sum(by_tap) / 3
    np.testing.assert_allclose(np.linalg.eigvalsh(channels)[::-1] * values[0], there.variances[0, :, 1])
    rotated = there.input_basis.T @ channels @ there.input_basis
    np.testing.assert_allclose(rotated, np.diag(np.diag(rotated)), atol=1e-12)


def test_measured_bases_and_variances_are_taken():
    given = problem(4, 3, 2)
    rng = np.random.default_rng(2)
    bases = [np.linalg.qr(rng.normal(size=(size, size)))[0] for size in (3, 4)]
    moments = EigenMoments(*bases, rng.random((4, 3, 2)))
    there = BASES["kfe"](given.weight, given.input_factor, given.output_factor, eigen=moments)
    np.testing.assert_allclose(change_basis(given, there), given.weight, atol=1e-12)
    np.testing.assert_array_equal(there.input_basis, bases[0])
    rows, columns = IMPORTANCES["c-obd"](there)
    np.testing.assert_allclose(rows, [0.5 * (moments.second_moment[i] * there.weight[i] ** 2).sum() for i in range(4)])
    np.testing.assert_allclose(columns.sum(), rows.sum())


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["kron-obd", "kron-obs"])
def test_kronecker_scores_are_the_quadratic_after_deletion(name, shape, basis):
    """Of every row and column, without and with the optimal compensation, which the KKT system of the entries gives."""
    there = coordinates_of(problem(*shape), basis)
    scores = IMPORTANCES[name](there)
    for side, size in (("rows", shape[0]), ("columns", shape[1])):
        for index in range(size):
            kept = np.ones(shape, bool)
            kept[index if side == "rows" else (slice(None), index)] = False
            left = there.weight * kept
            if name == "kron-obs":
                left = constrained_minimum(there.weight, there.input_factor, there.output_factor, kept)
            expected = predicted_loss(left - there.weight, there.input_factor, there.output_factor)
            assert getattr(scores, side)[index] == pytest.approx(expected, rel=EXACT[name])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["c-obd", "c-obs"])
def test_scores_of_weights_are_those_of_the_explicit_fisher(name, shape):
    given = problem(*shape)
    fisher = np.kron(given.output_factor, given.input_factor)  # rows of the weight one after the other
    curvature = np.diag(fisher) if name == "c-obd" else 1 / np.diag(np.linalg.inv(fisher))
    scores = (0.5 * given.weight.reshape(-1) ** 2 * curvature).reshape(shape)
    rows, columns = IMPORTANCES[name](coordinates_of(given, "channel"))
    np.testing.assert_allclose(rows, scores.sum((1, 2)), rtol=EXACT[name])
    np.testing.assert_allclose(columns, scores.sum((0, 2)), rtol=EXACT[name])


def test_in_the_eigenbasis_c_obd_is_half_of_eigendamage():
    """Written out from the paper: ``I_ij = l^g_i l^a_j sum_k W*_ijk^2`` in the eigenbases of both factors."""
    out, channels, taps = 4, 3, 2
    given = problem(out, channels, taps)
    inside = np.zeros((channels, channels))
    for c, d, k in itertools.product(range(channels), range(channels), range(taps)):
        inside[c, d] += given.input_factor[c * taps + k, d * taps + k] / taps
    (values_a, vectors_a), (values_g, vectors_g) = np.linalg.eigh(inside), np.linalg.eigh(given.output_factor)
    rows, columns = np.zeros(out), np.zeros(channels)
    for i, j, k in itertools.product(range(out), range(channels), range(taps)):
        rotated = vectors_g[:, i] @ given.weight[:, :, k] @ vectors_a[:, j]
        rows[i] += values_g[i] * values_a[j] * rotated**2
        columns[j] += values_g[i] * values_a[j] * rotated**2
    found = IMPORTANCES["c-obd"](coordinates_of(given, "kfe"))
    np.testing.assert_allclose(2 * found.rows, rows[::-1])
    np.testing.assert_allclose(2 * found.columns, columns[::-1])


def test_nothing_makes_up_for_a_row_of_the_eigenbasis():
    there = coordinates_of(problem(4, 3, 2), "kfe")
    obd, obs = IMPORTANCES["kron-obd"](there), IMPORTANCES["kron-obs"](there)
    np.testing.assert_allclose(obs.rows, obd.rows, rtol=1e-5)
    assert (obs.columns < 0.99 * obd.columns).any()


def test_a_row_that_another_repeats_is_free_to_the_surgeon():
    given = problem(4, 3, 2)
    doubled = np.r_[given.output_factor, given.output_factor[:1]][:, [0, 1, 2, 3, 0]]
    weight = np.r_[given.weight, given.weight[:1]]
    there = BASES["channel"](weight, given.input_factor, doubled)
    damage, surgeon = IMPORTANCES["kron-obd"](there).rows, IMPORTANCES["kron-obs"](there).rows
    assert damage[0] == pytest.approx(damage[4])
    assert surgeon[0] < 1e-4 * damage[0]
    assert surgeon[1] > 1e-2 * damage[1]


@pytest.mark.parametrize(("name", "basis"), [(n, b) for n, entry in IMPORTANCES.items() for b in entry.bases])
def test_scores_are_not_negative_even_where_factors_are_singular(name, basis):
    given = problem(5, 4, 2)
    flat, thin = (np.outer(v, v) for v in (np.arange(8.0), np.arange(5.0)))
    there = BASES[basis](given.weight, flat, thin, saliency=np.ones(5))
    for scores, size in zip(IMPORTANCES[name](there), (5, 4), strict=True):
        assert scores.shape == (size,)
        assert scores.dtype == np.float64
        assert np.isfinite(scores).all()
        assert (scores >= 0).all()


def test_magnitudes_are_norms():
    weight = problem(4, 3, 2).weight
    there = BASES["channel"](weight, np.eye(6), np.eye(4))
    for order in (1, 2):
        rows, columns = IMPORTANCES[f"magnitude-l{order}"](there)
        np.testing.assert_allclose(rows, np.linalg.norm(weight.reshape(4, -1), order, axis=1))
        np.testing.assert_allclose(columns, [np.linalg.norm(weight[:, j].reshape(-1), order) for j in range(3)])


def test_taylor_is_half_of_the_saliency_and_asks_for_it():
    there = BASES["channel"](problem(4, 3, 2).weight, np.eye(6), np.eye(4), saliency=np.arange(4.0))
    rows, columns = IMPORTANCES["taylor"](there)
    np.testing.assert_array_equal(rows, [0, 0.5, 1, 1.5])
    np.testing.assert_array_equal(columns, np.zeros(3))
    with pytest.raises(KfeError, match="collect the statistics again"):
        IMPORTANCES["taylor"](coordinates_of(problem(4, 3, 2), "channel"))
