"""Joint low rank of two layers against the decomposition of their whitened product and against descents."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize

from onnx_kfe.kfe import Array, balance


def covariance(size: int, random: np.random.Generator) -> Array:
    """Far from diagonal, and well conditioned."""
    mixed = random.normal(size=(size, 3 * size)) * np.geomspace(2, 0.5, size)[:, None]
    return mixed @ mixed.T / (3 * size)


def product(seed: int, channels: int = 6) -> tuple[Array, Array, Array, Array]:
    """W_1 ``[d, i]`` with A, W_2 ``[o, d]`` with G."""
    random = np.random.default_rng(seed)
    first, second = random.normal(size=(channels, 9)), random.normal(size=(7, channels))
    return first, covariance(9, random), second, covariance(7, random)


def root(matrix: Array) -> Array:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values)) @ vectors.T


@pytest.mark.parametrize("seed", range(3))
def test_strengths_are_those_of_the_whitened_product(seed) -> None:
    first, inputs, second, outputs = product(seed)
    found = balance(first @ inputs @ first.T, second.T @ outputs @ second)
    wanted = np.linalg.svd(root(outputs) @ second @ first @ root(inputs), compute_uv=False)[:6]
    np.testing.assert_allclose(found.strengths, wanted, rtol=1e-3)
    np.testing.assert_allclose(found.forward @ found.backward, np.eye(6), atol=1e-9)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_first_channels_are_the_best_product_of_their_rank(rank) -> None:
    """Against factors that a descent finds, from several starts."""
    first, inputs, second, outputs = product(3)
    found = balance(first @ inputs @ first.T, second.T @ outputs @ second)
    turned, back = found.forward @ first, second @ found.backward
    left, right = root(outputs), root(inputs)
    target = left @ second @ first @ right

    def loss(one: Array, other: Array) -> float:
        return float(np.square(left @ one @ other @ right - target).sum())

    def descended(factors: Array) -> tuple[float, Array]:
        """Loss and gradient of the two factors in one vector."""
        one, other = factors[: 7 * rank].reshape(7, rank), factors[7 * rank :].reshape(rank, 9)
        error = left @ (left @ one @ other @ right - target) @ right
        return loss(one, other), 2 * np.concatenate([(error @ other.T).reshape(-1), (one.T @ error).reshape(-1)])

    ours = loss(back[:, :rank], turned[:rank])
    assert ours == pytest.approx(np.square(found.strengths[rank:]).sum(), rel=1e-3)
    random = np.random.default_rng(rank)
    starts = random.normal(size=(5, 16 * rank))
    found_by = [scipy.optimize.minimize(descended, start, jac=True, options={"maxiter": 2_000}) for start in starts]
    assert ours == pytest.approx(min(each.fun for each in found_by), rel=1e-3)
    assert ours < 0.9 * min(loss(second[:, kept], first[kept]) for kept in (slice(rank), slice(6 - rank, 6)))


def test_both_sides_are_diagonal_and_alike() -> None:
    first, inputs, second, outputs = product(4)
    computed, read = first @ inputs @ first.T, second.T @ outputs @ second
    found = balance(computed, read)
    here, there = found.forward @ computed @ found.forward.T, found.backward.T @ read @ found.backward
    factor = np.trace(computed) / found.strengths.sum()
    np.testing.assert_allclose(here, factor * np.diag(found.strengths), atol=1e-4 * np.trace(here))
    np.testing.assert_allclose(there, np.diag(found.strengths) / factor, atol=1e-4 * np.trace(there))
    assert np.trace(here) == pytest.approx(np.trace(computed), rel=1e-4)  # as large on the whole as before
    assert np.all(np.diff(found.strengths) < 0)


def test_channels_that_hardly_vary_stay_invertible() -> None:
    random = np.random.default_rng(5)
    computed = covariance(6, random)[:, :2] @ random.normal(size=(2, 6))
    found = balance(computed @ computed.T, covariance(6, random))
    np.testing.assert_allclose(found.forward @ found.backward, np.eye(6), atol=1e-9)
    assert np.all(found.strengths[2:] < 1e-2 * found.strengths[1])


@pytest.mark.parametrize("dead", ["computed", "read", "both"])
def test_what_is_dead_is_left_alone(dead) -> None:
    alive, nothing = covariance(4, np.random.default_rng(6)), np.zeros((4, 4))
    found = balance(alive if dead == "read" else nothing, alive if dead == "computed" else nothing)
    np.testing.assert_array_equal(found.forward, np.eye(4))
    np.testing.assert_array_equal(found.backward, np.eye(4))
