"""Depthwise-separable chains against planted ones, a plain CP decomposition and numerical perturbation."""

import numpy as np
import pytest

from onnx_kfe.kfe import Separable, predicted_loss, separable, separable_losses, whiten


def covariance(rng: np.random.Generator, size: int) -> np.ndarray:
    root = rng.normal(size=(size, 2 * size)) * np.geomspace(3, 0.1, size)[:, None]
    return root @ root.T / root.shape[1]


def composed(left: np.ndarray, depthwise: np.ndarray, encoder: np.ndarray) -> np.ndarray:
    return np.einsum("or,r...,rc->oc...", left, depthwise, encoder)


def rebuilt(chain: Separable) -> np.ndarray:
    return composed(chain.left, chain.depthwise, chain.encoder)


def plain_cp(tensor: np.ndarray, rank: int, rng: np.random.Generator, sweeps: int = 200) -> np.ndarray:
    """CP decomposition in the Euclidean norm by textbook alternating least squares, the best of three starts."""
    best = np.zeros_like(tensor)
    for _ in range(3):
        factors = [rng.normal(size=(size, rank)) for size in tensor.shape]
        for _ in range(sweeps):
            for mode in range(3):
                first, second = (factor for other, factor in enumerate(factors) if other != mode)
                khatri_rao = np.einsum("ir,jr->ijr", first, second).reshape(-1, rank)
                unfolded = np.moveaxis(tensor, mode, 0).reshape(len(factors[mode]), -1)
                factors[mode] = np.linalg.lstsq(khatri_rao, unfolded.T, rcond=None)[0].T
        found = np.einsum("ir,jr,kr->ijk", *factors)
        best = min(best, found, key=lambda candidate: float(np.square(candidate - tensor).sum()))
    return best


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize(("out", "inside", "rank"), [(10, 8, 3), (4, 12, 2), (12, 4, 2)])
def test_a_planted_chain_is_recovered(rng, out, inside, rank):
    weight = composed(rng.normal(size=(out, rank)), rng.normal(size=(rank, 3, 3)), rng.normal(size=(rank, inside)))
    a, white = covariance(rng, 9 * inside), whiten(covariance(rng, out))
    total = predicted_loss(weight, a, white.root @ white.root)
    assert separable(weight, a, white, rank).loss < 1e-4 * total
    assert separable(weight, a, white, rank - 1).loss > 1e-3 * total


def test_loss_is_that_of_the_composed_weight(rng):
    weight, a, white = rng.normal(size=(7, 5, 3, 3)), covariance(rng, 45), whiten(covariance(rng, 7))
    for rank in (1, 4, 9):  # narrower and wider than the layer
        chain = separable(weight, a, white, rank)
        assert (chain.encoder.shape, chain.depthwise.shape) == ((rank, 5), (rank, 3, 3))
        expected = predicted_loss(rebuilt(chain) - weight, a, white.root @ white.root)
        assert chain.loss == pytest.approx(expected, rel=1e-6)


def test_chain_is_exact_at_full_rank(rng):
    weight, a, white = rng.normal(size=(7, 3, 4)), covariance(rng, 12), whiten(covariance(rng, 7))
    assert separable(weight, a, white, 12).loss < 1e-6 * predicted_loss(weight, a, white.root @ white.root)


def test_without_curvature_it_is_as_good_as_plain_cp(rng):
    weight = rng.normal(size=(6, 5, 4)) * np.geomspace(3, 0.3, 6)[:, None, None]
    for rank in (2, 4):
        loss = separable(weight, np.eye(20), whiten(np.eye(6)), rank).loss
        assert loss <= 0.5 * np.square(plain_cp(weight, rank, rng) - weight).sum() * 1.05


def test_with_curvature_it_beats_plain_cp(rng):
    weight, a, white = rng.normal(size=(6, 5, 4)), covariance(rng, 20), whiten(covariance(rng, 6))
    g = white.root @ white.root
    for rank in (2, 4, 8):
        assert separable(weight, a, white, rank).loss < 0.7 * predicted_loss(plain_cp(weight, rank, rng) - weight, a, g)


def test_left_is_optimal_for_its_codes(rng):
    weight, a, white = rng.normal(size=(6, 5, 4)), covariance(rng, 20), whiten(covariance(rng, 6))
    g = white.root @ white.root
    chain = separable(weight, a, white, 4)
    for size in (1e-3, 1e-1):
        for _ in range(50):
            other = composed(chain.left + size * rng.normal(size=chain.left.shape), chain.depthwise, chain.encoder)
            assert predicted_loss(other - weight, a, g) > chain.loss


def test_losses_for_planning_bound_what_is_attained_and_never_rise(rng):
    weight, a, white = rng.normal(size=(12, 10, 9)), covariance(rng, 90), whiten(covariance(rng, 12))
    total = predicted_loss(weight, a, white.root @ white.root)
    ranks = [2, 4, 8, 16]
    losses = separable_losses(weight, a, white, ranks)
    assert losses[0] < total
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.1 * losses[0]
    for rank, loss in zip(ranks, losses, strict=True):
        attained = separable(weight, a, white, rank).loss
        assert attained <= loss * 1.05
        assert loss <= attained * 2
    assert separable_losses(weight, a, white, []) == []


def test_stages_are_balanced_and_components_do_not_diverge():
    """The symmetric tensor of border rank 2 that no best approximation of rank 2 exists for (de Silva & Lim 2008)."""
    weight = np.zeros((2, 2, 2))
    weight[1, 0, 0] = weight[0, 1, 0] = weight[0, 0, 1] = 1.0
    chain = separable(weight, np.eye(4), whiten(np.eye(2)), 2)
    norms = [np.linalg.norm(stage, axis=1) for stage in (chain.encoder, chain.depthwise, chain.left.T)]
    np.testing.assert_allclose(norms, np.broadcast_to(norms[0], (3, 2)))
    assert norms[0].max() ** 3 < 20 * np.linalg.norm(weight)
    assert chain.loss < 0.05 * 0.5 * np.square(weight).sum()


def test_dead_channels_and_dead_weights_stay_finite(rng):
    weight, a = rng.normal(size=(4, 5, 3)), covariance(rng, 15)
    a[3:6] = a[:, 3:6] = 0
    white = whiten(covariance(rng, 4), 1e-2)
    for other in (weight, np.zeros_like(weight)):
        chain = separable(other, a, white, 6)
        assert np.isfinite(rebuilt(chain)).all()
        assert np.isfinite(chain.loss)
