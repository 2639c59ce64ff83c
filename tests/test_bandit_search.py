"""Plans refined by measurements: the whole of it on a small network, and the options."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnx_kfe as kfe
from onnx_kfe import _bandit_search as search
from onnx_kfe._latency_goal import Stadium
from onnx_kfe._measure import Machine
from onnx_kfe.calibration import input_specs, open_dataset
from onnx_kfe.graph import open_network
from onnx_kfe.planning import Planner
from onnx_kfe.progress import Progress
from tests.networks import classifier, samples


class Notes(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def network():
    return open_network(classifier())


@pytest.fixture(scope="module")
def statistics(network):
    return kfe.collect(network, samples(96))


@pytest.fixture(scope="module")
def planner(network, statistics):
    return Planner(network, statistics, round_to=2)


def refined(network, planner, statistics, budgets, evaluations=60, plan=None):
    notes = Notes()
    plan = plan or planner.plan(*budgets)
    dataset = open_dataset({"x": samples(96)}, input_specs(network.model))
    found = search.refine_plan(
        network, planner, plan, budgets, statistics, dataset, Machine(), evaluations, notes
    )  # fmt: skip
    return plan, found, notes.notes


@pytest.mark.parametrize("budgets", [[kfe.Macs(0.6)], [kfe.Params(0.7), kfe.Macs(0.8)]])
def test_it_stays_within_the_budgets_and_the_evaluations(network, planner, statistics, budgets, monkeypatch):
    costs = []
    cost = search._Judge.cost
    monkeypatch.setattr(search._Judge, "cost", lambda self, *given: costs.append(given) or cost(self, *given))
    plan, found, (note,) = refined(network, planner, statistics, budgets)
    assert 0 < len(costs) <= 60
    assert Counter(number for _, number in costs).most_common(1)[0][1] > 1, "rounds compare on the same samples"
    assert re.match(r"bandit, \d+ evaluations: ", note)
    assert set(found.choices) == set(plan.choices)
    for budget in budgets:
        assert planner.fraction(found, type(budget)) <= budget.amount + 1e-9


def test_the_price_of_a_latency_does_not_depend_on_its_unit(network, statistics, known_machine):
    latency = Stadium(network, Machine()).measure(2, Progress())
    planner = Planner(network, statistics, latency=latency)
    dataset = open_dataset({"x": samples(96)}, input_specs(network.model))
    plan = planner.plan(kfe.Latency(0.8))
    prices = [
        search._Judge(network, planner, plan, [budget], statistics, dataset, Machine())._price
        for budget in (kfe.Latency(0.8), kfe.Milliseconds(0.8e-6 * latency.original))
    ]
    assert prices[0] == prices[1] > 0


def test_a_plan_that_wastes_is_bettered(network, planner, statistics):
    """Of a plan with the worst candidates that the budget allows."""
    budget = kfe.Macs(0.6)
    good = planner.plan(budget)
    wasteful = dict(good.choices)
    for name, choice in good.choices.items():
        worse = [
            other for other in planner.options[name]
            if other.form not in ("dense", "removed") and other.cost.macs <= choice.cost.macs
        ]  # fmt: skip
        wasteful[name] = max(worse, key=lambda other: other.loss, default=choice)
    start = kfe.Plan(good.model_hash, wasteful, good.original, good.budget)
    assert start.predicted_loss > 2 * good.predicted_loss
    _, found, (note,) = refined(network, planner, statistics, [budget], 160, start)
    assert "layers changed" in note
    assert found.predicted_loss < start.predicted_loss
    assert planner.fraction(found, kfe.Macs) <= 0.6


def test_the_command(cli, tmp_path: Path, monkeypatch, quick_benchmark):
    monkeypatch.chdir(tmp_path)
    onnx.save(classifier(), "net.onnx")
    np.savez("data.npz", x=samples(96))
    given = ("prune", "net.onnx", "--data", "data.npz", "-o", "small.onnx")
    outcome = cli(*given, "--macs", 0.6, "--search", "bandit", "--evaluations", 30, "--no-refit")
    assert outcome.code == 0, outcome.err
    assert re.search(r"^bandit, \d+ evaluations: ", outcome.err, re.MULTILINE)
    for options, message in (
        (("--search", "magic"), "--search magic: it can be bandit"),
        (("--evaluations", 10), "--evaluations is how much --search may measure: give --search bandit too"),
        (("--search", "bandit", "--max-drop", 0.1), "--search refines the forms of a plan for a budget on samples"),
        (("--minimize", "latency"), "--minimize says what --max-drop makes small: give --max-drop too"),
        (("--minimize", "size", "--max-drop", 0.1), "--minimize size: it can be macs, params, latency"),
    ):
        outcome = cli(*given, *options)
        assert (outcome.code, message in outcome.err) == (2, True), outcome.err


def test_the_fastest_model_above_a_floor(known_machine, quick_benchmark):
    x, unseen = samples(96), samples(60, seed=1)
    result = kfe.prune(
        classifier(), {"x": x}, max_drop=0.2, minimize=kfe.Latency, evaluation_data={"x": unseen}, round_to=2,
        refit=False, measure=False,
    )  # fmt: skip
    assert result.floor is not None
    assert result.floor.size == "latency"
    assert result.floor.chosen.fraction < 1
    assert result.floor.chosen.drop <= 0.2
    assert known_machine.asked
