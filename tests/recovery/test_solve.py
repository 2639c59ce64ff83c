"""The ridge of one layer against least squares by numpy."""

import numpy as np
import pytest

from onnx_kfe.recovery._solve import JointMoments, solve

RANDOM = np.random.default_rng(0)


def moments(x: np.ndarray, y: np.ndarray) -> JointMoments:
    z = np.concatenate([x, y], 1)
    return JointMoments(z.T @ z, z.sum(0), len(z))


def halves(x: np.ndarray, y: np.ndarray) -> tuple[JointMoments, JointMoments]:
    return moments(x[::2], y[::2]), moments(x[1::2], y[1::2])


def test_a_linear_map_is_found_whatever_the_weight_was():
    x = RANDOM.standard_normal((500, 6)) * np.geomspace(3, 1, 6) + 2
    true = RANDOM.standard_normal((4, 6))
    found = solve(RANDOM.standard_normal((4, 6)), halves(x, x @ true.T + 5), np.eye(4))
    assert np.allclose(found, true, atol=5e-3)


def test_with_much_data_it_is_least_squares():
    x = RANDOM.standard_normal((20_000, 5)) * np.geomspace(2, 1, 5) + 1
    y = x @ RANDOM.standard_normal((5, 3)) + RANDOM.standard_normal((20_000, 3))
    found = solve(RANDOM.standard_normal((3, 5)), halves(x, y), np.eye(3))
    design = np.c_[x, np.ones(len(x))]
    expected = np.linalg.lstsq(design, y, rcond=None)[0][:5].T
    assert np.allclose(found, expected, atol=5e-3)


def test_with_too_little_data_it_stays_near_the_old_weight():
    """Twelve positions for forty inputs, outputs that the old weight gives up to noise."""
    old = RANDOM.standard_normal((8, 40))
    x = RANDOM.standard_normal((12, 40))
    y = x @ old.T + 3 * RANDOM.standard_normal((12, 8))
    found = solve(old, halves(x, y), np.eye(8))
    unseen = RANDOM.standard_normal((2000, 40))
    free = np.linalg.lstsq(x, y, rcond=None)[0].T

    def error(w: np.ndarray) -> float:
        return float(np.square(unseen @ (w - old).T).mean())

    assert error(found) < 0.3 * error(free)


def test_the_output_factor_decides_between_outputs():
    """Both outputs share one strength: it is the one that suits the output that counts."""
    x = RANDOM.standard_normal((60, 20))
    old = np.zeros((2, 20))
    signal = x @ RANDOM.standard_normal(20)
    y = np.c_[signal, 30 * RANDOM.standard_normal(60)]
    first, second = (solve(old, halves(x, y), np.diag(g)) for g in ([1.0, 1e-9], [1e-9, 1.0]))
    assert np.linalg.norm(first[1]) > 2 * np.linalg.norm(second[1])


@pytest.mark.parametrize("dead", [0, 3])
def test_a_constant_input_does_no_harm(dead: int):
    x = RANDOM.standard_normal((200, 5))
    x[:, dead] = 7
    y = x @ RANDOM.standard_normal((5, 3))
    found = solve(RANDOM.standard_normal((3, 5)), halves(x, y), np.eye(3))
    bias = y.mean(0) - found @ x.mean(0)
    assert np.allclose(x @ found.T + bias, y, atol=2e-2)
