"""Allocation against brute force."""

from __future__ import annotations

import ctypes
import itertools
import re
from dataclasses import astuple, replace

import numpy as np
import pytest

from onnx_kfe.errors import BudgetError, KfeError
from onnx_kfe.planning import (
    DENSE,
    FORMS,
    Candidate,
    Cost,
    Latency,
    Macs,
    Milliseconds,
    Params,
    allocate,
    candidates,
    dense_cost,
)
from onnx_kfe.planning import _allocation as allocation
from onnx_kfe.planning._budget import Budget
from tests.planning.problems import SHAPES, problem_of

FIXED = Cost(macs=500, parameters=40, nanoseconds=300)  # what no candidate covers


def instance(seed: int, layers: int = 5, choices: int = 5) -> tuple[dict[str, list[Candidate]], Cost]:
    """Random candidates, dear ones losing little, and the cost of the whole model."""
    rng = np.random.default_rng(seed)
    options, total = {}, FIXED
    for layer in range(layers):
        dense = Cost(*(int(n) for n in rng.integers(50, 1000, 3)))
        total = Cost(*(a + b for a, b in zip(astuple(total), astuple(dense), strict=True)))
        found = [Candidate(DENSE, (), dense, 0.0)]
        for rank in range(1, choices):
            kept = rng.uniform([0.1, 0.1, 0.2], [0.95, 0.95, 1.3])  # some are slower than the layer
            cost = Cost(*(int(share * whole) for share, whole in zip(kept, astuple(dense), strict=True)))
            found.append(Candidate("two_factor", (rank,), cost, float(rng.exponential() * (1 - kept[:2].mean()) ** 2)))
        options[f"layer{layer}"] = found
    return options, total


def cost_of(chosen, options, original: Cost) -> Cost:
    saved = [(options[name][0].cost, choice.cost) for name, choice in chosen.items()]
    return Cost(
        original.macs - sum(a.macs - b.macs for a, b in saved),
        original.parameters - sum(a.parameters - b.parameters for a, b in saved),
        original.nanoseconds - sum(a.nanoseconds - b.nanoseconds for a, b in saved),
    )


def brute_force(options, budgets, original: Cost) -> float | None:
    """Least loss over all choices, None where none fits."""
    best = None
    for picks in itertools.product(*options.values()):
        cost = cost_of(dict(zip(options, picks, strict=True)), options, original)
        if all(budget.of(cost) <= budget.limit(budget.of(original)) for budget in budgets):
            loss = sum(pick.loss for pick in picks)
            best = loss if best is None else min(best, loss)
    return best


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kinds", [(Macs,), (Params,), (Macs, Params), (Latency,), (Macs, Params, Latency)])
def test_the_least_loss_is_found(seed, kinds):
    options, original = instance(seed)
    rng = np.random.default_rng(seed)
    budgets = [kind(float(rng.uniform(0.4, 0.9))) for kind in kinds]
    wanted = brute_force(options, budgets, original)
    if wanted is None:
        with pytest.raises(BudgetError):
            allocate(options, budgets, original)
        return
    chosen = allocate(options, budgets, original)
    assert list(chosen) == list(options)
    cost = cost_of(chosen, options, original)
    assert all(budget.of(cost) <= budget.limit(budget.of(original)) for budget in budgets)
    assert sum(choice.loss for choice in chosen.values()) == pytest.approx(wanted, rel=2e-4)


def stated(error: BudgetError, kind: type[Budget]) -> Budget:
    """The budget that the message says can be met."""
    *_, (_, amount) = re.findall(rf"({kind.option}) ([\d.]+)", str(error))
    return kind(float(amount))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("kind", "absolute"), [(Macs, False), (Macs, True), (Params, False), (Params, True), (Latency, False)]
)
def test_what_cannot_be_met_says_what_can(seed, kind, absolute):
    options, original = instance(seed, layers=3)
    impossible = kind(kind(0.9).of(FIXED) if absolute else 0.05)
    with pytest.raises(BudgetError, match=f"{kind.option} .* cannot be met: the smallest") as caught:
        allocate(options, [impossible], original)
    possible = stated(caught.value, kind)
    assert (possible.amount > 1) == absolute
    allocate(options, [possible], original)
    less = kind(possible.amount - 1) if absolute else kind(possible.amount - 0.001)
    with pytest.raises(BudgetError):
        allocate(options, [less], original)


@pytest.mark.parametrize("seed", range(4))
def test_milliseconds_that_cannot_be_met_say_how_many_can(seed):
    options, total = instance(seed, layers=3)
    options = {
        name: [replace(c, cost=replace(c.cost, nanoseconds=1017 * c.cost.nanoseconds)) for c in choices]
        for name, choices in options.items()
    }
    original = replace(total, nanoseconds=1017 * total.nanoseconds)
    with pytest.raises(BudgetError, match=r"--latency-ms 0.01 cannot be met: the smallest") as caught:
        allocate(options, [Milliseconds(0.01)], original)
    possible = stated(caught.value, Milliseconds)
    spent = cost_of(allocate(options, [possible], original), options, original).nanoseconds
    assert spent <= 1e6 * possible.amount < spent + 1000
    with pytest.raises(BudgetError):
        allocate(options, [Milliseconds(possible.amount - 0.001)], original)


def test_what_normalising_saved_counts_but_the_fraction_is_of_the_original():
    options, dense = instance(3, layers=3)
    original = replace(dense, nanoseconds=dense.nanoseconds + 1000)
    budget = Latency(0.7)
    chosen = allocate(options, [budget], original, dense)
    spent = cost_of(chosen, options, dense).nanoseconds
    assert spent <= 0.7 * original.nanoseconds
    wanted = brute_force(options, [Milliseconds(1e-6 * budget.limit(original.nanoseconds))], dense)
    assert sum(choice.loss for choice in chosen.values()) == pytest.approx(wanted, rel=2e-4)
    assert wanted < sum(choice.loss for choice in allocate(options, [budget], dense).values())
    cheapest = sum(min(choice.cost.nanoseconds for choice in choices) for choices in options.values())
    assert allocation.least(options, budget, original, dense) == FIXED.nanoseconds + cheapest


@pytest.mark.parametrize("seed", range(6))
def test_the_least_of_one_resource_within_a_budget_of_another(seed):
    options, original = instance(seed)
    held = Macs(0.6)
    costs = [
        cost_of(dict(zip(options, picks, strict=True)), options, original)
        for picks in itertools.product(*options.values())
    ]
    within = [cost.nanoseconds for cost in costs if cost.macs <= held.limit(original.macs)]
    free = min(cost.nanoseconds for cost in costs)
    assert allocation.least(options, Latency(1), original, original) == free
    assert allocation.least(options, Latency(1), original, original, [held]) == pytest.approx(min(within), rel=1e-3)
    together = [Macs(min(cost.macs for cost in costs)), Params(min(cost.parameters for cost in costs))]
    assert allocation.least(options, Latency(1), original, original, together) == free, "nothing is within both"


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("fraction", [0.55, 0.75, 0.95])
def test_losses_of_all_sizes_are_told_apart(seed, fraction):
    """From 1e-12 to 1 nats: HiGHS alone sees nothing below a millionth of the largest."""
    options, original = instance(seed)
    rng = np.random.default_rng(100 + seed)
    options = {
        name: [
            choice if choice.form == DENSE else replace(choice, loss=10 ** rng.uniform(-12, 0)) for choice in choices
        ]
        for name, choices in options.items()
    }
    losses = [choice.loss for choices in options.values() for choice in choices if choice.loss]
    assert min(losses) < 1e-9 < 1e-2 < max(losses)
    budgets = [Macs(fraction)]
    wanted = brute_force(options, budgets, original)
    if wanted is None:
        with pytest.raises(BudgetError):
            allocate(options, budgets, original)
        return
    chosen = allocate(options, budgets, original)
    assert cost_of(chosen, options, original).macs <= fraction * original.macs
    assert sum(choice.loss for choice in chosen.values()) == pytest.approx(wanted, rel=3e-4)


def test_choices_that_lose_nothing_are_found():
    dense = Candidate(DENSE, (), Cost(100, 100), 0.0)
    free, dear = Candidate("two_factor", (1,), Cost(50, 50), 0.0), Candidate("two_factor", (2,), Cost(10, 10), 1.0)
    faint = Candidate("two_factor", (3,), Cost(40, 40), 1e-14)
    chosen = allocate({"a": [dense, dear, faint, free], "b": [dense, dear, free]}, [Macs(0.5)], Cost(200, 200))
    assert set(chosen.values()) == {free}


def test_what_saves_too_little_time_is_not_worth_its_place():
    dense = Candidate(DENSE, (), Cost(1000, 1000, 1000), 0.0)
    little = Candidate("two_factor", (1,), Cost(1000, 1000, 971), 1.0)
    enough = Candidate("two_factor", (2,), Cost(1000, 1000, 969), 1.0)
    slower = Candidate("two_factor", (3,), Cost(999, 1000, 2000), 1.0)
    smaller = Candidate("two_factor", (4,), Cost(1000, 999, 1000), 1.0)
    choices = [little, enough, dense, slower, smaller]
    assert allocation.worthwhile(choices, [Latency(0.5)]) == [enough, dense]
    assert allocation.worthwhile(choices, [Milliseconds(0.5)]) == [enough, dense]
    assert allocation.worthwhile(choices, [Macs(0.5)]) == [dense, slower]
    assert allocation.worthwhile(choices, [Params(0.5)]) == [dense, smaller]
    assert allocation.worthwhile(choices, [Latency(0.5), Macs(0.5)]) == [enough, dense, slower]


def test_budgets_that_cannot_be_met_together_say_what_can():
    one_or_other = [
        Candidate(DENSE, (), Cost(100, 100), 0.0),
        Candidate("two_factor", (1,), Cost(20, 100), 1.0),
        Candidate("two_factor", (2,), Cost(100, 20), 1.0),
    ]
    options, original = {"a": one_or_other, "b": one_or_other}, Cost(200, 200)
    with pytest.raises(BudgetError, match=r"--macs 0\.2 --params 0\.2 cannot be met together: under --macs 0\.2") as e:
        allocate(options, [Macs(0.2), Params(0.2)], original)
    possible = stated(e.value, Params)
    assert possible.amount == 1
    assert {c.ranks for c in allocate(options, [Macs(0.2), possible], original).values()} == {(1,)}
    chosen = allocate(options, [Macs(0.6), Params(0.6)], original)
    assert {c.ranks for c in chosen.values()} == {(1,), (2,)}


def test_nothing_to_prune():
    with pytest.raises(BudgetError, match="nothing in the model can be pruned"):
        allocate({}, [Macs(0.5)], FIXED)


def test_a_budget_of_everything_changes_nothing():
    options, original = instance(0)
    assert {choice.form for choice in allocate(options, [Macs(1)], original).values()} == {DENSE}


def test_a_tight_budget_is_met_exactly():
    options, original = instance(1)
    least = Cost(
        original.macs - sum(v[0].cost.macs - min(c.cost.macs for c in v) for v in options.values()), original.parameters
    )
    chosen = allocate(options, [Macs(least.macs)], original)
    assert cost_of(chosen, options, original).macs == least.macs


def test_huge_costs_are_kept_to_the_last_unit():
    """HiGHS takes a bound to be met within 1e-6 of its scale: 10,000 of these."""
    big = 10**10
    options = {
        name: [
            Candidate(DENSE, (), Cost(big, big), 0.0),
            Candidate("two_factor", (1,), Cost(big // 2 + 1, big), 1.0),
            Candidate("two_factor", (2,), Cost(big // 4, big), 1.5),
        ]
        for name in ("a", "b")
    }
    original = Cost(2 * big, 2 * big)
    chosen = allocate(options, [Macs(big + 1)], original)
    assert sum(choice.cost.macs for choice in chosen.values()) <= big + 1


def test_the_solver_giving_up_is_reported(monkeypatch):
    class Result:
        x, status, message = None, 1, "time limit reached"

    monkeypatch.setattr(allocation, "milp", lambda *args, **options: Result)
    with pytest.raises(KfeError, match="time limit reached"):
        allocate(*(lambda o, c: (o, [Macs(0.7)], c))(*instance(0)))


def test_what_the_solver_prints_stays_off_stdout(monkeypatch, capfd):
    """HiGHS prints from C++ now and then, which would end up in the middle of ``--json``."""
    milp = allocation.milp

    def noisy(*args, **options):
        ctypes.CDLL(None).puts(b"HighsMipSolverData::transformNewIntegerFeasibleSolution tmpSolver.run();")
        return milp(*args, **options)

    monkeypatch.setattr(allocation, "milp", noisy)
    print("before", flush=True)
    options, original = instance(0)
    allocate(options, [Macs(0.7)], original)
    print("after", flush=True)
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr().out == "before\nafter\n"


@pytest.mark.parametrize("name", SHAPES)
def test_candidates_are_cheaper_and_undominated(name):
    problem = problem_of(name)
    dense, *found = candidates(problem, 1)
    assert dense == Candidate(DENSE, (), dense_cost(problem.geometry), 0.0)
    assert all(c.cost.saves(dense.cost) and c.loss >= 0 for c in found)

    def beats(a: Candidate, b: Candidate) -> bool:
        return a.loss <= b.loss and a.cost.macs <= b.cost.macs and a.cost.parameters <= b.cost.parameters

    assert not any(beats(a, b) for a, b in itertools.permutations(found, 2))
    for form in FORMS.values():
        for ranks, loss in form.losses(problem, 1) if form.limits(problem.geometry) else ():
            other = Candidate(form.name, ranks, form.cost(problem.geometry, ranks), loss)
            if other.cost.saves(dense.cost):
                assert any(beats(c, other) for c in found)


def test_a_weight_of_low_rank_is_found_to_be_one():
    """A candidate that loses nothing does not hide what the layer costs as it is."""
    problem = problem_of("1x1")
    left, right = np.ones((10, 1)), np.arange(6.0)[None]
    problem.groups[0].weight[...] = (left @ right).reshape(10, 6, 1, 1)
    dense, *found = candidates(problem, 1)
    assert dense.form == DENSE
    assert found[-1].ranks == (1,)
    assert found[-1].loss == pytest.approx(0, abs=1e-12)
    chosen = allocate({"a": [dense, *found]}, [Macs(0.5)], dense.cost)
    assert chosen["a"].ranks == (1,)
