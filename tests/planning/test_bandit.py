"""The bandit against brute force over all joint actions and against exact costs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest

from onnx_kfe.planning import DENSE, Candidate, Cost, Refinement, arms_around, refine

Choices = Mapping[str, Candidate]
_FEWEST = 12  # evaluations that the comparison takes


class Problem:
    """Layers with arms whose exact costs are known, measured with noise that a round mostly has in common.

    Args:
        values: ``[layers, arms]``, what each arm adds to the cost.
        interaction: Size of what any two layers add together, depending on the arms of both.
        noise: Standard deviation of what an evaluation has for itself.
        failing: Layer and arm that make a model fail, with what its cost is then.
    """

    def __init__(self, values, *, interaction=0.0, noise=0.01, seed=0, failing=None):
        rng = np.random.default_rng(seed)
        self.values, self.noise, self.rng = np.asarray(values, float), noise, rng
        self.failing = failing or {}
        layers, count = self.values.shape
        self.damage = interaction**0.5 * rng.normal(size=(layers, count))
        self.couplings = np.triu(rng.normal(size=(layers, layers)), 1)
        self.arms = {
            f"layer{layer}": [Candidate("two_factor", (arm + 1,), Cost(arm + 1, arm + 1), 0.0) for arm in range(count)]
            for layer in range(layers)
        }
        self.start = {name: arms[0] for name, arms in self.arms.items()}
        self.rounds: list[int] = []
        self.played: list[dict[str, Candidate]] = []

    def indices(self, choices: Choices) -> list[int]:
        return [choices[name].ranks[0] - 1 for name in self.arms]

    def exact(self, choices: Choices) -> float:
        indices = self.indices(choices)
        layers = np.arange(len(indices))
        damage = self.damage[layers, indices]
        return float(self.values[layers, indices].sum() + damage @ self.couplings @ damage)

    def __call__(self, choices: Choices, number: int) -> float:
        self.rounds.append(number)
        self.played.append(dict(choices))
        for layer, arm in enumerate(self.indices(choices)):
            if (layer, arm) in self.failing:
                return self.failing[layer, arm]
        in_common = np.random.default_rng(number).normal()  # far more than arms differ
        return self.exact(choices) + in_common + self.noise * self.rng.normal()

    def optimum(self, feasible: Callable[[Choices], bool] = lambda choices: True) -> dict[str, Candidate]:
        """By brute force over the product."""
        everything = (dict(zip(self.arms, picks, strict=True)) for picks in itertools.product(*self.arms.values()))
        return min(filter(feasible, everything), key=self.exact)


def separable(seed: int, layers: int = 4, arms: int = 3, **kwargs) -> Problem:
    """Arms whose costs are at least 0.03 apart, three times the noise, and any of them the best."""
    rng = np.random.default_rng(seed)
    values = 0.03 * rng.permuted(np.tile(np.arange(arms), (layers, 1)), axis=1)
    return Problem(values, seed=seed, **kwargs)


@pytest.mark.parametrize("seed", range(8))
def test_the_optimum_of_a_separable_problem_is_found(seed):
    problem = separable(seed)
    found = refine(problem.start, problem.arms, problem, 400, seed=seed)
    assert problem.optimum() != problem.start
    assert found.choices == problem.optimum()
    assert not found.is_start
    gain = problem.exact(problem.start) - problem.exact(found.choices)
    assert abs(found.gain - gain) < 4 * found.error < gain


def test_an_optimal_start_is_kept():
    for seed in range(20):
        problem = separable(seed)
        start = problem.optimum()
        found = refine(start, problem.arms, problem, 200, seed=seed)
        assert found.choices == start
        assert found.is_start


def refined(seed: int, interaction: float, noise: float) -> tuple[Problem, Refinement]:
    """A start that is the best arm of most layers by itself, among layers that interact."""
    values = np.random.default_rng(seed).normal(0.01, 0.01, size=(8, 3))
    values[:, 0] = 0.0
    problem = Problem(values, interaction=interaction, noise=noise, seed=seed)
    return problem, refine(problem.start, problem.arms, problem, 120, seed=seed)


@pytest.mark.parametrize(("interaction", "noise"), [(0.0, 0.03), (0.003, 0.03), (0.03, 0.03), (0.03, 0.3)])
def test_the_result_is_no_worse_than_the_start_though_layers_interact(interaction, noise):
    """A worse plan passes the comparison with a probability of 5 % at most: more than 8 of 60 do in one case in 350."""
    runs = [refined(seed, interaction, noise) for seed in range(60)]
    gains = [problem.exact(problem.start) - problem.exact(found.choices) for problem, found in runs]
    assert sum(gain < 0 for gain in gains) <= 8
    assert sum(not math.isnan(found.gain) for _, found in runs) >= 20  # there was something to be refused
    for (problem, found), gain in zip(runs, gains, strict=True):
        assert found.is_start == (found.choices == problem.start) == (gain == 0)


def test_layers_that_interact_are_improved():
    gains = [
        problem.exact(problem.start) - problem.exact(found.choices)
        for problem, found in (refined(seed, 0.03, 0.01) for seed in range(30))
    ]
    assert sum(gain > 0 for gain in gains) >= 20


@pytest.mark.parametrize("evaluations", [0, 1, 11, 12, 13, 15, 20, 50, 101])
def test_no_more_evaluations_than_allowed(evaluations):
    problem = separable(1)
    found = refine(problem.start, problem.arms, problem, evaluations)
    assert found.evaluations == len(problem.rounds) <= evaluations


def test_too_few_evaluations_return_the_start_without_a_comparison():
    problem = separable(1)
    found = refine(problem.start, problem.arms, problem, _FEWEST + 3)  # one round
    assert found.choices == problem.start
    assert found.is_start
    assert math.isnan(found.gain)
    assert found.evaluations == 3


def test_rounds_are_played_in_order_and_the_comparison_has_its_own():
    problem = separable(2)
    found = refine(problem.start, problem.arms, problem, 200)
    assert problem.rounds == sorted(problem.rounds)
    assert set(problem.rounds) == set(range(max(problem.rounds) + 1))
    pairs = 25
    last = range(max(problem.rounds) - pairs + 1, max(problem.rounds) + 1)
    assert problem.rounds[-2 * pairs :] == [number for number in last for _ in range(2)]
    assert problem.rounds[-2 * pairs - 1] == last[0] - 1
    assert problem.played[-2 * pairs :] == [problem.start, found.choices] * pairs


def test_every_active_arm_of_the_exploring_layers_is_played_in_a_round():
    problem = separable(3, layers=9)
    refine(problem.start, problem.arms, problem, 60)
    first = [played for played, number in zip(problem.played, problem.rounds, strict=True) if number == 0]
    changing = [name for name in problem.arms if len({played[name] for played in first}) > 1]
    assert len(first) == 3
    assert len(changing) == 3  # the square root of the layers
    for name, arms in problem.arms.items():
        assert {played[name] for played in first} == set(arms if name in changing else [problem.start[name]])


def test_a_bad_arm_is_out_for_a_while_and_comes_back():
    """The other two are alike, so that the layer is never settled."""
    problem = Problem([[0.0, 0.0, 0.02]], noise=0.02)
    found = refine(problem.start, problem.arms, problem, 2000)
    explored = problem.rounds[-1 if math.isnan(found.gain) else -2 * 250 - 1]
    times = [
        number
        for number, played in zip(problem.rounds, problem.played, strict=True)
        if problem.indices(played) == [2] and number <= explored
    ]
    assert explored > 400
    assert len(times) < explored / 5
    assert max(np.diff(times)) > 5


def test_deterministic_for_a_seed():
    one, same, other = separable(5), separable(5), separable(5)
    assert refine(one.start, one.arms, one, 150, seed=7) == refine(same.start, same.arms, same, 150, seed=7)
    assert one.played == same.played
    refine(other.start, other.arms, other, 150, seed=8)
    assert one.played != other.played


def test_layers_with_one_arm_or_none_stay():
    problem = separable(0)
    arms = {**problem.arms, "layer1": [problem.start["layer1"]]}
    del arms["layer2"]
    found = refine(problem.start, arms, problem, 300)
    assert not found.is_start
    assert all(played[name] == problem.start[name] for played in problem.played for name in ("layer1", "layer2"))
    only = {name: [choice] for name, choice in problem.start.items()}
    assert refine(problem.start, only, problem, 300) == refine(problem.start, {}, problem, 300)
    assert refine(problem.start, only, problem, 300).evaluations == 0


def test_a_start_that_is_no_arm_is_refused():
    problem = separable(0)
    with pytest.raises(ValueError):
        refine(problem.start, {"layer0": problem.arms["layer0"][1:]}, problem, 100)


@pytest.mark.parametrize("seed", range(4))
def test_a_budget_that_the_best_arms_exceed_keeps_the_surest_that_meet_it(seed):
    """Each layer has one arm to gain by, of cost 3; a budget of two such arms allows the best two."""
    values = np.zeros((4, 3))
    values[:, 1:] = np.array([0.04, -0.04]) * np.random.default_rng(seed).permutation([1, 2, 3, 4])[:, None]
    problem = Problem(values, seed=seed)

    def feasible(choices: Choices) -> bool:
        return sum(choice.cost.macs for choice in choices.values()) <= 2 * 3 + 2 * 1

    assert not feasible(problem.optimum())
    found = refine(problem.start, problem.arms, problem, 300, seed=seed)
    assert found.choices == problem.optimum()
    found = refine(problem.start, problem.arms, problem, 300, seed=seed, feasible=feasible)
    assert feasible(found.choices)
    assert sum(found.choices[name] != problem.start[name] for name in problem.arms) == 2
    assert problem.exact(found.choices) < problem.exact(problem.start)


def test_a_dearer_arm_is_taken_where_a_cheaper_one_pays_for_it():
    """The surer gain is infeasible by itself; a third one stays so."""
    problem = Problem([[0.0, 0.1, -0.3], [0.0, 0.1, 0.2], [0.0, 0.1, -0.05]])
    problem.start = {**problem.start, "layer1": problem.arms["layer1"][2]}

    def feasible(choices: Choices) -> bool:
        return sum(choice.cost.macs for choice in choices.values()) <= 5

    found = refine(problem.start, problem.arms, problem, 200, feasible=feasible)
    assert found.choices == problem.optimum(feasible)
    assert problem.indices(found.choices) == [2, 0, 0]


def test_nothing_feasible_but_the_start_needs_no_comparison():
    problem = separable(0)
    found = refine(problem.start, problem.arms, problem, 200, feasible=lambda choices: choices == problem.start)
    assert found.choices == problem.start
    assert found.is_start
    assert found.evaluations <= 150


@pytest.mark.parametrize("cost", [math.inf, -math.inf, math.nan, 1e30, 50.0])
def test_arms_of_failing_and_wild_models_are_left_out(cost):
    for seed in range(4):
        problem = separable(seed)
        best = problem.indices(problem.optimum())[0]
        arm = next(arm for arm in (1, 2) if arm != best)
        problem = separable(seed, failing={(0, arm): cost})
        found = refine(problem.start, problem.arms, problem, 400, seed=seed)
        assert found.choices == problem.optimum()
        played = [problem.indices(choices)[0] for choices in problem.played]
        assert 0 < played.count(arm) < 0.1 * len(played)


def test_models_that_all_fail_return_the_start():
    problem = separable(0)
    for cost in (math.nan, math.inf):
        found = refine(problem.start, problem.arms, lambda choices, number, cost=cost: cost, 100)
        assert found.choices == problem.start
        assert found.is_start


def test_a_proposal_that_fails_in_the_comparison_is_refused():
    problem = separable(0)
    proposal = refine(problem.start, problem.arms, problem, 400).choices
    explored = max(problem.rounds) - 50
    assert proposal != problem.start
    problem = separable(0)

    def fails_late(choices: Choices, number: int) -> float:
        return math.nan if number == explored + 10 and choices == proposal else problem(choices, number)

    found = refine(problem.start, problem.arms, fails_late, 400)
    assert found.is_start
    assert found.choices == problem.start
    assert math.isnan(found.gain)


def test_measurements_without_noise():
    problem = separable(6, noise=0.0)
    found = refine(problem.start, problem.arms, problem, 200)
    assert found.choices == problem.optimum()
    assert found.gain == pytest.approx(problem.exact(problem.start) - problem.exact(found.choices))
    assert found.error == pytest.approx(0, abs=1e-12)


def layer(losses: dict[int, float]) -> list[Candidate]:
    """Candidates by MACs, the first the layer as it is."""
    (dense, *others) = losses
    found = [Candidate("two_factor", (macs,), Cost(macs, macs), losses[macs]) for macs in others]
    return [Candidate(DENSE, (), Cost(dense, dense), 0.0), *found]


def test_arms_around_are_the_nearest_on_the_hull_on_both_sides():
    """The losses of the hull are squares; 65 and 35 lie above it."""
    convex = {macs: (100 - macs) ** 2 / 1e4 for macs in (100, 90, 70, 60, 50, 40, 20)}
    options = layer(convex | {65: 0.9, 35: 0.9})
    start = {choice.cost.macs: choice for choice in options}

    def around(macs: int, count: int) -> list[int]:
        return [choice.cost.macs for choice in arms_around(options, start[macs], count)]

    assert around(60, 4) == [60, 50, 70, 40, 90]
    assert around(60, 3) == [60, 50, 70, 40]
    assert around(60, 0) == [60]
    assert around(65, 2) == [65, 60, 70]  # the start stays, on the hull or not
    assert around(100, 2) == [100, 90, 70]
    assert around(20, 3) == [20, 40, 50, 60]
    assert around(50, 99) == [50, 40, 60, 20, 70, 90, 100]
