"""Pivoted blocks against planted ones, every balanced assignment and one large least-squares problem."""

from itertools import combinations

import numpy as np
import pytest
import scipy.linalg

from onnx_kfe.kfe import BlockDiagonal, block_diagonal, predicted_loss, whiten


def covariance(rng: np.random.Generator, size: int) -> np.ndarray:
    root = rng.normal(size=(size, 2 * size)) * np.geomspace(3, 0.1, size)[:, None]
    return root @ root.T / root.shape[1]


def blocks(form: BlockDiagonal) -> list[tuple[np.ndarray, np.ndarray]]:
    """Output and input channels of each group."""
    groups = len(form.weight)
    return list(zip(form.rows.reshape(groups, -1), form.columns.reshape(groups, -1), strict=True))


def scattered(form: BlockDiagonal) -> np.ndarray:
    """The weight in the layer's own channels, one element at a time."""
    _, _, _, *kernel = form.weight.shape
    weight = np.zeros((len(form.rows), len(form.columns), *kernel))
    for block, (rows, columns) in zip(form.weight, blocks(form), strict=True):
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                weight[row, column] = block[i, j]
    return weight


def support(form: BlockDiagonal) -> np.ndarray:
    kept = np.zeros((len(form.rows), len(form.columns)), dtype=bool)
    for rows, columns in blocks(form):
        kept[np.ix_(rows, columns)] = True
    return kept


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize(("out", "inside", "groups", "kernel"), [(8, 12, 2, (3, 3)), (16, 8, 4, (2,)), (24, 24, 8, ())])
def test_planted_blocks_are_found(rng, out, inside, groups, kernel):
    weight = np.zeros((out, inside, *kernel))
    rows, columns = (rng.permutation(size).reshape(groups, -1) for size in (out, inside))
    for own, seen in zip(rows, columns, strict=True):
        weight[np.ix_(own, seen)] = rng.normal(size=(len(own), len(seen), *kernel))
    a, white = covariance(rng, inside * int(np.prod(kernel))), whiten(covariance(rng, out))
    form = block_diagonal(weight, a, white, groups)
    assert form.loss < 1e-6 * predicted_loss(weight, a, white.root @ white.root)
    assert {frozenset(own) for own, _ in blocks(form)} == {frozenset(own) for own in rows}
    np.testing.assert_allclose(scattered(form), weight, atol=1e-3)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_permutations_and_loss(rng, groups):
    weight, a, white = rng.normal(size=(6, 12, 3)), covariance(rng, 36), whiten(covariance(rng, 6))
    form = block_diagonal(weight, a, white, groups)
    assert form.weight.shape == (groups, 6 // groups, 12 // groups, 3)
    assert (sorted(form.rows), sorted(form.columns)) == (list(range(6)), list(range(12)))
    total = predicted_loss(weight, a, white.root @ white.root)
    expected = predicted_loss(scattered(form) - weight, a, white.root @ white.root)
    assert form.loss == pytest.approx(expected, rel=1e-6, abs=1e-9 * total)
    assert form.loss < total
    if groups == 1:
        assert form.loss < 1e-6 * total


@pytest.mark.parametrize("seed", range(10))
def test_kept_energy_is_the_most_that_any_balanced_assignment_keeps(seed):
    """Without curvature the loss is half the energy outside the blocks."""
    weight = np.random.default_rng(seed).normal(size=(4, 4, 2))
    energy = np.square(weight).sum(axis=2)
    halves = [np.isin(range(4), half) for half in combinations(range(4), 2)]
    best = max(energy[rows[:, None] == columns].sum() for rows in halves for columns in halves)
    loss = block_diagonal(weight, np.eye(8), whiten(np.eye(4)), 2).loss
    assert loss == pytest.approx(0.5 * (energy.sum() - best))


def test_pivoting_pays(rng):
    weight, a, white = rng.normal(size=(16, 16, 3)), covariance(rng, 48), whiten(covariance(rng, 16), 0.1)
    g = white.root @ white.root
    losses = []
    for _ in range(20):
        rows, columns = (rng.permutation(16) // 4 for _ in range(2))
        losses.append(best_in_support(weight, a, g, rows[:, None] == columns)[0])
    assert block_diagonal(weight, a, white, 4).loss < min(losses)


def best_in_support(weight, a, g, kept) -> tuple[float, np.ndarray]:
    """Every kept weight a free parameter of one least-squares problem in ``G^(1/2) (x) A^(1/2)``."""
    design = np.kron(scipy.linalg.sqrtm(g).real, scipy.linalg.sqrtm(a).real)
    free = np.repeat(kept.reshape(-1), weight[0, 0].size)
    solution, *_ = np.linalg.lstsq(design[:, free], design @ weight.reshape(-1), rcond=None)
    found = np.zeros(weight.size)
    found[free] = solution
    found = found.reshape(weight.shape)
    return predicted_loss(found - weight, a, g), found


def test_weights_are_the_least_squares_solution_within_the_blocks(rng):
    weight, a, white = rng.normal(size=(8, 8, 2)), covariance(rng, 16), whiten(covariance(rng, 8), 0.05)
    g = white.root @ white.root
    form = block_diagonal(weight, a, white, 4)
    kept = support(form)
    best, _ = best_in_support(weight, a, g, kept)
    assert best * (1 - 1e-6) <= form.loss <= best * 1.01
    truncated = predicted_loss(np.where(kept[:, :, None], 0.0, weight), a, g)
    assert form.loss < 0.95 * truncated
    for _ in range(50):
        other = scattered(form) + 0.1 * kept[:, :, None] * rng.normal(size=weight.shape)
        assert predicted_loss(other - weight, a, g) > form.loss


def test_groups_are_solved_apart_where_outputs_are_uncorrelated(rng):
    weight, a = rng.normal(size=(6, 4, 3)), covariance(rng, 12)
    form = block_diagonal(weight, a, whiten(np.diag(rng.uniform(1, 9, size=6))), 2)
    for block, (rows, columns) in zip(form.weight, blocks(form), strict=True):
        places = (3 * columns[:, None] + np.arange(3)).reshape(-1)
        expected = weight.reshape(6, -1)[rows] @ a[:, places] @ np.linalg.inv(a[np.ix_(places, places)])
        np.testing.assert_allclose(block.reshape(len(rows), -1), expected, rtol=1e-5, atol=1e-6)


def test_dead_channels_and_dead_weights_stay_finite(rng):
    weight, a, white = rng.normal(size=(4, 6, 3)), covariance(rng, 18), whiten(covariance(rng, 4), 1e-2)
    a[3:6] = a[:, 3:6] = 0
    for other in (weight, np.zeros_like(weight)):
        form = block_diagonal(other, a, white, 2)
        assert np.isfinite(form.weight).all()
        assert np.isfinite(form.loss)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dead", ["weight", "inputs", "outputs"])
def test_a_dead_layer_loses_nothing(rng, dead):
    weight = rng.normal(size=(8, 8, 3, 3)) * (dead != "weight")
    input_factor, output_factor = covariance(rng, 72) * (dead != "inputs"), covariance(rng, 8) * (dead != "outputs")
    found = block_diagonal(weight, input_factor, whiten(output_factor), 2)
    assert found.loss == 0
    assert not found.weight.any()
