"""The regression of one layer against least squares by numpy, and behind an activation against its own error."""

import numpy as np
import pytest

from onnx_kfe.recovery._samples import Activation, Block, Samples
from onnx_kfe.recovery._solve import InputMoments, fit

LINEAR = Activation()
RANDOM = np.random.default_rng(0)


def solved(
    weight: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    output_factor: np.ndarray | None = None,
    *,
    activation: Activation = LINEAR,
    beside: np.ndarray | None = None,
    steps: int = 1,
    bias: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias for rows x and y: even rows are fitted to, in two blocks, odd ones held out."""

    def block(rows: slice) -> Block:
        columns = [None if a is None else a[rows].T.astype(np.float32) for a in (x, y, beside)]
        return Block(*columns)

    samples = Samples([block(slice(0, None, 4)), block(slice(2, None, 4))], [block(slice(1, None, 2))], activation)
    moments = InputMoments.of(samples.fitted), InputMoments.of(samples.held_out)
    outputs = y.shape[1]
    factor = np.eye(outputs) if output_factor is None else output_factor
    return fit(weight, np.zeros(outputs) if bias is None else bias, samples, moments, factor, steps)


def test_a_linear_map_is_found_whatever_the_weight_was():
    x = RANDOM.standard_normal((500, 6)) * np.geomspace(3, 1, 6) + 2
    true = RANDOM.standard_normal((4, 6))
    weight, bias = solved(RANDOM.standard_normal((4, 6)), x, x @ true.T + 5)
    assert np.allclose(weight, true, atol=5e-3)
    assert np.allclose(bias, 5, atol=2e-2)


def test_with_much_data_it_is_least_squares():
    x = RANDOM.standard_normal((20_000, 5)) * np.geomspace(2, 1, 5) + 1
    y = x @ RANDOM.standard_normal((5, 3)) + RANDOM.standard_normal((20_000, 3))
    weight, bias = solved(RANDOM.standard_normal((3, 5)), x, y)
    expected = np.linalg.lstsq(np.c_[x, np.ones(len(x))][::2], y[::2], rcond=None)[0].T
    assert np.allclose(np.c_[weight, bias], expected, atol=2e-2)


def test_with_too_little_data_it_stays_near_the_old_weight():
    """Twelve positions for forty inputs, outputs that the old weight gives up to noise."""
    old = RANDOM.standard_normal((8, 40))
    x = RANDOM.standard_normal((24, 40))
    y = x @ old.T + 3 * RANDOM.standard_normal((24, 8))
    weight, _ = solved(old, x, y)
    unseen = RANDOM.standard_normal((2000, 40))
    free = np.linalg.lstsq(x[::2], y[::2], rcond=None)[0].T

    def error(w: np.ndarray) -> float:
        return float(np.square(unseen @ (w - old).T).mean())

    assert error(weight) < 0.3 * error(free)


def test_the_output_factor_decides_between_outputs():
    """Both outputs share one strength: it is the one that suits the output that counts."""
    x = RANDOM.standard_normal((120, 20))
    signal = x @ RANDOM.standard_normal(20)
    y = np.c_[signal, 30 * RANDOM.standard_normal(120)]
    first, second = (solved(np.zeros((2, 20)), x, y, np.diag(g))[0] for g in ([1.0, 1e-9], [1e-9, 1.0]))
    assert np.linalg.norm(first[1]) > 2 * np.linalg.norm(second[1])


@pytest.mark.parametrize("dead", [0, 3])
def test_a_constant_input_does_no_harm(dead: int):
    x = RANDOM.standard_normal((400, 5))
    x[:, dead] = 7
    y = x @ RANDOM.standard_normal((5, 3))
    weight, bias = solved(RANDOM.standard_normal((3, 5)), x, y)
    assert np.allclose(x @ weight.T + bias, y, atol=2e-2)


def test_what_is_added_beside_is_made_up_for():
    x = RANDOM.standard_normal((400, 5))
    true, beside = RANDOM.standard_normal((3, 5)), RANDOM.standard_normal((400, 3))
    weight, bias = solved(RANDOM.standard_normal((3, 5)), x, x @ true.T + 1 + beside, beside=beside)
    assert np.allclose(weight, true, atol=5e-3)
    assert np.allclose(bias, 1, atol=5e-3)


@pytest.mark.parametrize(("low", "high"), [(0.0, np.inf), (0.0, 2.0), (-np.inf, 1.0)])
def test_behind_an_activation_it_is_better_than_plain_least_squares(low: float, high: float):
    """Outputs that fewer inputs cannot give: what is clipped anyway need not be met."""
    hidden = RANDOM.standard_normal((8_000, 12))
    y = hidden @ RANDOM.standard_normal((12, 6)) - 1
    x = hidden[:, :6]
    start = RANDOM.standard_normal((6, 6))
    plain = solved(start, x, y, steps=5)
    aware = solved(start, x, y, activation=Activation(low, high), steps=5)

    def error(solution: tuple[np.ndarray, np.ndarray]) -> float:
        weight, bias = solution
        return float(np.square(np.clip(x @ weight.T + bias, low, high) - np.clip(y, low, high)).mean())

    assert error(aware) < 0.98 * error(plain)


def test_reachable_values_are_the_nearest_with_the_same_activation():
    wanted = np.array([-3.0, -3.0, 0.5, 9.0, 9.0])
    given = np.array([-1.0, 2.0, 7.0, 8.0, 1.0])
    assert Activation(0.0, 6.0).reachable(wanted, given).tolist() == [-1.0, 0.0, 0.5, 8.0, 6.0]
    assert LINEAR.reachable(wanted, given) is wanted
