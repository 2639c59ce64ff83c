"""One threshold for all sides, against trying every one of them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from onnx_kfe.errors import BudgetError, UsageError
from onnx_kfe.planning import Candidate, Cost, Latency, Macs, Milliseconds, Params, Plan, ThresholdPlanner, rank_grid
from onnx_kfe.planning._threshold import Masks, check_any, keep_above

SIZES = {"wide": 40, "narrow": 6, "single": 1}
MACS = {"wide": 7, "narrow": 50, "single": 3}
PARAMETERS = {"wide": 30, "narrow": 2, "single": 5}
NANOSECONDS = 10_000


class Sides(ThresholdPlanner):
    """What is kept of each side costs in proportion; of what goes the scores are the loss."""

    def cost(self, masks: Masks) -> Cost:
        return cost_of(masks)

    def planned(self, plan: Plan) -> Cost:
        return plan.original

    def written(self, masks: Masks, budget: str) -> Plan:
        kept = {name: tuple(map(int, np.flatnonzero(mask))) for name, mask in masks.items()}
        return Plan("", {}, self.cost(masks), budget, channels=kept)


def cost_of(masks: Masks) -> Cost:
    kept = {name: int(mask.sum()) for name, mask in masks.items()}
    return Cost(sum(MACS[n] * k for n, k in kept.items()), sum(PARAMETERS[n] * k for n, k in kept.items()))


WHOLE = cost_of({name: np.ones(size, bool) for name, size in SIZES.items()})


def scores_of(seed: int, ties: bool = False) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    scores = {
        name: random.random(size) * scale for (name, size), scale in zip(SIZES.items(), (1, 2, 0.01), strict=True)
    }
    return {name: np.round(each, 1) for name, each in scores.items()} if ties else scores


def planner_of(scores: dict[str, np.ndarray], round_to: int | None = None) -> Sides:
    return Sides(scores, WHOLE, WHOLE, round_to, NANOSECONDS)


def kept_of(scores: dict[str, np.ndarray], threshold: float, round_to: int | None = None) -> dict[str, set[int]]:
    """What is kept, unit by unit: the best first, until all above the threshold, a twentieth and the grid are met."""
    kept = {}
    for name, side in scores.items():
        best = sorted(range(len(side)), key=lambda unit: (-side[unit], unit))
        allowed = range(1, len(side) + 1) if round_to is None else [*rank_grid(len(side), round_to), len(side)]
        least = next(
            n for n in allowed
            if 20 * n >= len(side) and all(side[unit] <= threshold for unit in best[n:])
        )  # fmt: skip
        kept[name] = set(best[:least])
    return kept


@pytest.mark.parametrize("round_to", [None, 1, 4, 16])
@pytest.mark.parametrize("ties", [False, True])
def test_what_is_above_is_kept(ties: bool, round_to: int | None) -> None:
    scores = scores_of(0, ties)
    for threshold in (-np.inf, 0.0, 0.1, 0.5, 0.97, 1.5, np.inf):
        masks = keep_above(scores, threshold, round_to)
        found = {name: set(np.flatnonzero(mask)) for name, mask in masks.items()}
        assert found == kept_of(scores, threshold, round_to)
    everything, nothing = keep_above(scores, -np.inf, round_to), keep_above(scores, np.inf, round_to)
    assert all(mask.all() for mask in everything.values())
    assert {name: int(mask.sum()) for name, mask in nothing.items()} == {
        "wide": 2 if round_to in (None, 1) else rank_grid(40, round_to)[0],
        "narrow": 1 if round_to in (None, 1) else rank_grid(6, round_to)[0],
        "single": 1,
    }


@pytest.mark.parametrize("round_to", [None, 4])
@pytest.mark.parametrize("budgets", [[Macs(0.6)], [Params(0.4)], [Macs(0.6), Params(0.4)], [Macs(350), Params(0.9)]])
@pytest.mark.parametrize("ties", [False, True])
def test_no_more_goes_than_the_budgets_take(ties: bool, budgets: list, round_to: int | None) -> None:
    for seed in range(3):
        scores = scores_of(seed, ties)
        values = sorted({value for side in scores.values() for value in side})

        def within(masks: dict) -> bool:
            return all(budget.of(cost_of(masks)) <= budget.limit(budget.of(WHOLE)) for budget in budgets)

        def meets(threshold: float, scores=scores) -> dict[str, set[int]] | None:
            kept = kept_of(scores, threshold, round_to)
            masks = {name: np.isin(np.arange(SIZES[name]), [*units]) for name, units in kept.items()}
            return kept if within(masks) else None

        wanted = next(kept for kept in map(meets, [-math.inf, *values]) if kept is not None)
        plan = planner_of(scores, round_to).plan(*budgets)
        found = {name: set(kept) for name, kept in plan.channels.items()}
        if round_to is None:
            assert found == wanted
        else:  # beyond the threshold no side can be kept a step of the grid wider
            assert all(wanted[name] <= found[name] for name in SIZES)
            for name, size in SIZES.items():
                wider = [step for step in [*rank_grid(size, round_to), size] if step > len(found[name])][:1]
                best = set(np.argsort(-scores[name], kind="stable")[: (wider or [size])[0]].tolist())
                masks = {other: np.isin(np.arange(SIZES[other]), [*kept]) for other, kept in found.items()}
                assert within(masks)
                assert not wider or not within({**masks, name: np.isin(np.arange(size), [*best])})
        assert 1 < sum(map(len, wanted.values())) < sum(SIZES.values())
        assert plan.budget == " ".join(map(str, budgets))


def test_nothing_goes_where_nothing_need_go() -> None:
    plan = planner_of(scores_of(0)).plan(Macs(1.0), Params(1.0))
    assert {name: len(kept) for name, kept in plan.channels.items()} == SIZES


def test_what_cannot_be_met_is_answered_with_what_can() -> None:
    planner = planner_of(scores_of(0))
    least = 2 * 7 + 50 + 3
    with pytest.raises(BudgetError, match=r"^--macs 0\.05 --params 0\.9 cannot be met") as caught:
        planner.plan(Macs(0.05), Params(0.9))
    possible = math.ceil(1000 * least / WHOLE.macs) / 1000
    assert f"the smallest this model can become is --macs {possible}" in str(caught.value)
    assert planner.bounds in str(caught.value)
    assert planner.least(Macs(1)) == least
    assert planner.plan(Macs(possible)).original.macs == least
    with pytest.raises(BudgetError, match=f"can become is --macs {least}"):
        planner.plan(Macs(least - 1))
    assert planner.plan(Macs(least)).original.macs == least


def test_a_budget_is_needed_and_something_to_drop() -> None:
    with pytest.raises(UsageError, match="give a budget"):
        planner_of(scores_of(0)).plan()
    with pytest.raises(BudgetError, match=r"^nothing in the model can be pruned: a: b; c: d; e: f$"):
        check_any({}, {"a": "b", "c": "d", "e": "f", "g": "h"})
    check_any(scores_of(0), {"a": "b"})


def test_latency_goes_with_the_operations() -> None:
    planner = planner_of(scores_of(0))
    plan = planner.plan(Latency(0.5))
    assert plan.original == planner.plan(Macs(0.5)).original
    assert planner.fraction(plan, Latency) == pytest.approx(plan.original.macs / WHOLE.macs, abs=1e-4)
    assert planner.fraction(plan, Macs) == plan.original.macs / WHOLE.macs
    assert planner.fraction(plan, Params) == plan.original.parameters / WHOLE.parameters
    assert planner.plan(Milliseconds(5e-3)).original == plan.original
    assert [cost.nanoseconds for cost in planner.costs()] == [NANOSECONDS] * 2


class Lossy(Sides):
    """As `Sides`, with the share that went as the predicted loss of a plan."""

    def written(self, masks: Masks, budget: str) -> Plan:
        cost = self.cost(masks)
        return Plan("", {"layer": Candidate("dense", (), cost, 1 - cost.macs / WHOLE.macs)}, cost, budget)


@pytest.mark.parametrize("kind", [Macs, Params, Latency])
def test_the_frontier_falls_to_no_loss_at_full_size(kind) -> None:
    planner = Lossy(scores_of(0), WHOLE, WHOLE, None, NANOSECONDS)
    fractions, losses = planner.frontier(kind)
    assert fractions[-1] == 1
    assert losses[-1] == 0
    assert np.all(np.diff(fractions) > 0)
    assert np.all(np.diff(losses) <= 0)
    for fraction, loss in zip(fractions, losses, strict=True):
        assert loss == pytest.approx(planner.plan(kind(float(fraction))).predicted_loss, abs=1e-12) or fraction == 1
    assert losses[0] > 0.5
