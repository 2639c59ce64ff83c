"""The mathematics against brute force: explicit Kronecker products, numerical minimisation, random search."""

import numpy as np
import pytest
import scipy.linalg
from scipy.optimize import minimize

from onnx_kfe.kfe import (
    centre,
    channel_covariance,
    input_directions,
    predicted_loss,
    refine_subspace,
    solve_core,
    tucker_losses,
    two_factor,
    whiten,
)


def covariance(rng: np.random.Generator, size: int, rank: int | None = None) -> np.ndarray:
    root = rng.normal(size=(size, rank or 2 * size)) * np.geomspace(3, 0.1, size)[:, None]
    return root @ root.T / root.shape[1]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_predicted_loss_is_the_quadratic_form_of_the_kronecker_fisher(rng):
    a, g, change = covariance(rng, 6), covariance(rng, 4), rng.normal(size=(4, 2, 3))
    vector = change.reshape(4, -1).flatten(order="F")  # vec stacks columns, so the Fisher block is A (x) G
    assert predicted_loss(change, a, g) == pytest.approx(0.5 * vector @ np.kron(a, g) @ vector)


def test_whitening_whitens_and_drops_what_is_singular(rng):
    c = covariance(rng, 5, rank=3)
    white = whiten(c)
    assert white.rank == 3
    np.testing.assert_allclose(white.root @ white.root, c, atol=1e-12)
    np.testing.assert_allclose(
        white.root @ white.inverse_root, scipy.linalg.orth(c) @ scipy.linalg.orth(c).T, atol=1e-6
    )


def test_damping_is_relative(rng):
    c = covariance(rng, 5)
    for scale in (1e-12, 1e12):
        np.testing.assert_allclose(whiten(scale * c, 0.1).root, np.sqrt(scale) * whiten(c, 0.1).root, rtol=1e-9)


@pytest.mark.parametrize(("out", "inside"), [(5, 8), (8, 5)])
def test_two_factor_is_optimal(rng, out, inside):
    weight, a, g = rng.normal(size=(out, inside)), covariance(rng, inside), covariance(rng, out)
    form = two_factor(weight, a, whiten(g))
    for rank in range(1, 6):
        left, right = form.truncated(rank)
        loss = predicted_loss(left @ right - weight, a, g)
        assert loss == pytest.approx(form.losses[rank], rel=1e-8, abs=1e-12)
        singular = scipy.linalg.svdvals(scipy.linalg.sqrtm(g).real @ weight @ scipy.linalg.sqrtm(a).real)
        assert loss == pytest.approx(0.5 * (singular[rank:] ** 2).sum(), rel=1e-6, abs=1e-12)
    assert form.losses[0] == pytest.approx(predicted_loss(weight, a, g))


def test_two_factor_beats_what_numerical_minimisation_finds(rng):
    weight, a, g, rank = rng.normal(size=(4, 5)), covariance(rng, 5), covariance(rng, 4), 2

    def objective(theta: np.ndarray) -> float:
        left, right = theta[: 4 * rank].reshape(4, rank), theta[4 * rank :].reshape(rank, 5)
        return predicted_loss(left @ right - weight, a, g)

    found = min(minimize(objective, rng.normal(size=9 * rank)).fun for _ in range(5))
    assert two_factor(weight, a, whiten(g)).losses[rank] <= found * (1 + 1e-4)
    assert two_factor(weight, a, whiten(g)).losses[rank] == pytest.approx(found, rel=1e-3)


def test_channel_covariance_averages_over_taps(rng):
    patches = rng.normal(size=(50, 3, 4))  # positions, channels, taps
    full = np.einsum("nck,ndl->ckdl", patches, patches).reshape(12, 12)
    expected = np.einsum("nck,ndk->cd", patches, patches) / 4
    np.testing.assert_allclose(channel_covariance(full, 4), expected)


def test_centring_is_what_the_best_bias_leaves(rng):
    x = rng.normal(size=(200, 6)) + rng.normal(size=6)
    weight, other = rng.normal(size=(3, 6)), rng.normal(size=(3, 6))
    moment, mean = x.T @ x / 40, x.mean(0)  # 40 samples of 5 positions
    error = x @ (other - weight).T
    best = 0.5 * np.square(error - error.mean(0)).sum() / 40
    assert predicted_loss(other - weight, centre(moment, mean, 5), np.eye(3)) == pytest.approx(best)


def least_squares_core(weight, a, encoder, taps):
    """Brute force: every core weight a free parameter of one linear least-squares problem."""
    out = len(weight)
    root = scipy.linalg.sqrtm(a).real
    encode = np.kron(encoder, np.eye(taps))
    solution, *_ = np.linalg.lstsq((encode @ root).T, (weight.reshape(out, -1) @ root).T, rcond=None)
    return solution.T.reshape(out, len(encoder), taps), encode


def test_core_is_the_least_squares_solution(rng):
    weight, taps = rng.normal(size=(5, 6, 2, 2)), 4
    a, g = covariance(rng, 24), covariance(rng, 5)
    encoder = rng.normal(size=(3, 6))
    core, encode = least_squares_core(weight, a, encoder, taps)
    found = solve_core(weight, a, g, encoder)
    np.testing.assert_allclose(found.core.reshape(core.shape), core, rtol=1e-4, atol=1e-5)
    change = core.reshape(5, -1) @ encode - weight.reshape(5, -1)
    assert found.loss == pytest.approx(predicted_loss(change, a, g), rel=1e-5)


def test_losses_of_input_subspaces_are_true_and_fall_with_rank(rng):
    weight = rng.normal(size=(5, 6, 3))
    a, white = covariance(rng, 18), whiten(covariance(rng, 5))
    g = white.root @ white.root
    directions = input_directions(weight, a, white.root)
    losses = []
    for rank, found in zip([1, 3, 6], tucker_losses(weight, a, white, directions, [1, 3, 6]), strict=True):
        subspace = solve_core(weight, a, g, directions[:rank])
        factors = subspace.output_factors(white)
        rebuilt = np.einsum("ort,rc->oct", subspace.core, subspace.encoder)
        assert len(found) == min(5, 3 * rank) + 1
        assert found[-1] == pytest.approx(predicted_loss(rebuilt - weight, a, g), rel=1e-5, abs=1e-7)
        assert found[0] == pytest.approx(predicted_loss(weight, a, g))
        for output_rank in range(1, len(found)):
            left, right = factors.truncated(output_rank)
            rebuilt = np.einsum("os,srt,rc->oct", left, right.reshape(output_rank, rank, 3), subspace.encoder)
            assert found[output_rank] == pytest.approx(predicted_loss(rebuilt - weight, a, g), rel=1e-5, abs=1e-7)
        losses.append(found[-1])
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] == pytest.approx(0, abs=1e-5 * losses[0])


def test_tucker_loss_is_the_sum_of_its_parts_and_refining_lowers_it(rng):
    weight = rng.normal(size=(6, 6, 3))
    a, g = covariance(rng, 18), covariance(rng, 6)
    white = whiten(g)
    plain = solve_core(weight, a, g, input_directions(weight, a, white.root)[:3])
    before = plain.loss + plain.output_factors(white).losses[2]
    subspace, factors = refine_subspace(weight, a, white, 3, 2)
    left, right = factors.truncated(2)
    rebuilt = np.einsum("os,srt,rc->oct", left, right.reshape(2, 3, 3), subspace.encoder)
    loss = predicted_loss(rebuilt - weight, a, g)
    assert loss == pytest.approx(subspace.loss + factors.losses[2], rel=1e-5)
    assert loss <= before * (1 + 1e-6)


def test_input_subspace_is_exact_when_the_covariance_is_separable(rng):
    """With A = A_c (x) A_k the truncation is the higher-order SVD: no random subspace may do better at one mode."""
    weight = rng.normal(size=(4, 5, 3))
    channels, taps, g = covariance(rng, 5), np.eye(3), covariance(rng, 4)
    a = np.kron(channels, taps)
    best = solve_core(weight, a, g, input_directions(weight, a, whiten(g).root, damping=0.0)[:2]).loss
    assert all(solve_core(weight, a, g, rng.normal(size=(2, 5))).loss >= best for _ in range(200))


def test_a_dead_channel_does_not_break_the_solve(rng):
    weight = rng.normal(size=(4, 5, 3))
    a = covariance(rng, 15)
    a[3:6] = a[:, 3:6] = 0
    subspace, _ = refine_subspace(weight, a, whiten(covariance(rng, 4), 1e-2), 3, 4)
    assert np.isfinite(subspace.core).all()
    assert np.isfinite(subspace.loss)
