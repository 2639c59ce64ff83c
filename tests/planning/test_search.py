"""The search against curves whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_kfe.planning import Attempt, meets, search
from onnx_kfe.planning._search import MOST_ATTEMPTS, TOLERANCE

FRACTIONS = np.linspace(0.1, 1, 200)
LOSSES = 0.3 * (1 / FRACTIONS - 1) ** 2
FRONTIER = (FRACTIONS, LOSSES)


def predicted(fraction):
    return float(np.interp(fraction, *FRONTIER))


def attempted(drop, step=1e-9):
    """Models that come out a little smaller than their budget, in steps, and what they were asked for."""
    asked = []

    def attempt(budget):
        asked.append(budget)
        fraction = max(np.floor(budget / step + 1e-6) * step, FRACTIONS[0])
        return Attempt(fraction, predicted(fraction), drop(fraction))

    return attempt, asked


CURVES = {
    "as predicted": predicted,
    "twenty times the predicted": lambda fraction: 20 * predicted(fraction),
    "a hundredth of the predicted": lambda fraction: predicted(fraction) / 100,
    "share of decisions": lambda fraction: min(0.3 * predicted(fraction) ** 0.5, 1),
    "grows faster than predicted": lambda fraction: predicted(fraction) + 100 * predicted(fraction) ** 2,
    "steps of one decision in 200": lambda fraction: np.floor(200 * 0.3 * predicted(fraction) ** 0.5) / 200,
    "a cliff": lambda fraction: 0.0 if fraction > 0.5123 else 0.9,
}


@pytest.mark.parametrize("floor", [0.005, 0.05])
@pytest.mark.parametrize("name", CURVES)
def test_the_smallest_model_is_found_with_few_attempts(name, floor):
    drop = CURVES[name]
    fine = np.linspace(FRACTIONS[0], 1, 20001)
    answer = fine[[drop(fraction) <= floor for fraction in fine]].min()
    attempt, asked = attempted(drop)
    attempts, best = search(attempt, FRONTIER, floor)
    assert best is not None
    assert meets(best, floor)
    assert answer - 1e-4 <= best.fraction <= answer + TOLERANCE
    assert len(attempts) <= MOST_ATTEMPTS
    assert attempts == [attempt(budget) for budget in asked[: len(attempts)]]
    assert (attempts, best) == search(attempt, FRONTIER, floor)


def test_a_drop_that_follows_the_prediction_takes_less_attempts_than_bisection():
    for name, curve in list(CURVES.items())[:5]:
        attempts, _ = search(attempted(curve)[0], FRONTIER, 0.02)
        assert len(attempts) <= 5, name  # bisection to 2 % of 90 % takes 6


@pytest.mark.parametrize("seed", range(10))
def test_noise_misleads_but_never_past_what_was_measured(seed):
    def drop(fraction):
        noise = np.random.default_rng([seed, int(1e6 * fraction)]).standard_normal()
        return max(0.3 * predicted(fraction) ** 0.5 + 0.01 * noise, 0.0)

    attempts, best = search(attempted(drop)[0], FRONTIER, 0.05)
    assert best is not None
    assert best.fraction == min(tried.fraction for tried in attempts if tried.drop <= 0.05)
    assert predicted(best.fraction) == pytest.approx((0.05 / 0.3) ** 2, rel=1.5)


@pytest.mark.parametrize("answer", [0.985, 0.99, 0.995])
def test_a_little_smaller_is_found_where_more_is_too_much(answer):
    attempts, best = search(attempted(lambda fraction: 0.0 if fraction > answer else 0.9)[0], FRONTIER, 0.01)
    assert best is not None
    assert answer < best.fraction < 1
    assert len(attempts) <= MOST_ATTEMPTS


def test_a_plateau_at_the_very_floor_takes_hardly_more_than_bisection():
    attempt, asked = attempted(lambda fraction: 0.05 if fraction > 0.606 else 0.2)
    _, best = search(attempt, FRONTIER, 0.05)
    assert best is not None
    assert best.fraction <= 0.606 + TOLERANCE
    assert len(asked) <= 7  # the first, and bisection from there


def test_coarse_models_are_not_measured_twice():
    attempts, best = search(attempted(predicted, step=0.15)[0], FRONTIER, 0.05)
    assert best is not None
    assert best.fraction == pytest.approx(0.75)
    assert len({tried.fraction for tried in attempts}) == len(attempts)


def test_a_floor_that_every_model_meets_gives_the_smallest_one():
    attempts, best = search(attempted(lambda fraction: 0.0)[0], FRONTIER, 0.05)
    assert best is not None
    assert best.fraction == FRACTIONS[0]
    assert len(attempts) <= 4


def test_a_floor_that_no_model_meets_is_tried_up_to_the_largest_one():
    attempts, best = search(attempted(lambda fraction: 0.06 if fraction < 1 else 0.0)[0], FRONTIER, 0.05)
    assert best is None
    assert max(tried.fraction for tried in attempts) >= 1 - 2 * TOLERANCE
    assert len(attempts) <= MOST_ATTEMPTS


def test_a_model_that_nothing_was_taken_from_is_no_answer():
    attempt, _ = attempted(lambda fraction: 0.06 if fraction < 1 else 0.0, step=0.5)

    def whole_or_half(budget):
        return attempt(budget) if budget < 0.8 else Attempt(1.0, 0.0, 0.0)

    _, best = search(whole_or_half, FRONTIER, 0.05)
    assert best is None


def test_nothing_to_save():
    attempts, best = search(lambda budget: Attempt(1.0, 0.0, 0.0), (np.ones(1), np.zeros(1)), 0.05)
    assert len(attempts) == 1
    assert best is None


def test_one_decision_in_fifty_meets_a_floor_of_2_percent():
    assert 1 - 0.98 > 0.02
    assert meets(Attempt(0.5, 0.1, 1 - 0.98), 0.02)
    assert not meets(Attempt(0.5, 0.1, 0.021), 0.02)
