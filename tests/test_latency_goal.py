"""Goals of latency on stadiums where it is known what each plan takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import numpy as np
import onnx_ir as ir
import pytest

from onnx_kfe import _latency_goal as goals
from onnx_kfe import evaluation
from onnx_kfe._latency_goal import Lap, Stadium, meet
from onnx_kfe._measure import Machine
from onnx_kfe.errors import BudgetError
from onnx_kfe.graph import Network, count_macs, open_network
from onnx_kfe.planning import (
    REMOVED,
    Budget,
    Latency,
    LatencyModel,
    Macs,
    Milliseconds,
    Params,
    Plan,
    Planner,
    measure_latency_model,
)
from onnx_kfe.planning import _latency as latency
from onnx_kfe.progress import Progress
from tests.planning.clocks import Clock
from tests.planning.problems import statistics_of
from tests.tiny import node, serialized, tiny, weights

SECONDS = 1e-3  # that the original takes, 80 % of it in the layers
MOST = 6


class Notes(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class Known:
    """A stadium in which each plan, its own sketch here, takes a function of what is predicted.

    Args:
        planner: Predicts.
        truth: Latency over the original's, by predicted latency.
        spread: Of the ratios around it.
    """

    def __init__(self, planner: Planner, truth: Callable[[float], float], spread: float = 0.0) -> None:
        self.planner, self.truth, self.spread = planner, truth, spread
        self.plans: list[Plan] = []

    def time(self, plan: Plan) -> np.ndarray:
        assert isinstance(plan, Plan)
        self.plans.append(plan)
        return self.truth(self.planner.fraction(plan, Latency)) + self.spread * np.linspace(-1, 1, 9)


@pytest.fixture(scope="module")
def network() -> Network:
    """Four convolutions wide enough for many plans."""
    nodes, value, constants = [], "x", {}
    for place, (inputs, outputs) in enumerate(pairwise((16, 24, 32, 24, 16))):
        nodes.append(node("Conv", [value, f"w{place}"], [f"c{place}"], f"conv{place}", pads=[1, 1, 1, 1]))
        constants[f"w{place}"] = weights(outputs, inputs, 3, 3, seed=place) / np.float32(np.sqrt(9 * inputs))
        value = f"c{place}"
    return open_network(tiny(nodes, {"x": ["n", 16, 8, 8]}, {value: ["n", 16, 8, 8]}, constants))


def planner_of(network: Network) -> Planner:
    """A planner for a machine on which the layers take 80 % of the model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "Stopwatch", Clock(share=0.8))
        model = measure_latency_model(network, SECONDS, SECONDS, {}, {}, round_to=2)
    alone = sum(map(replace(model, scale=1.0).dense, network.layers))
    model = replace(model, scale=0.8 * model.original / alone)
    return Planner(network, statistics_of(network), latency=model)


@pytest.fixture(scope="module")
def planner(network: Network) -> Planner:
    return planner_of(network)


@pytest.fixture(autouse=True)
def sketches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are their own sketches."""
    monkeypatch.setattr(goals, "sketch_plan", lambda network, plan: plan)


def met(network, planner, stadium, *budgets: Budget) -> tuple[Plan, list[Lap], list[str]]:
    shown = Notes()
    plan, laps = meet(network, planner, budgets, stadium, shown)
    assert 1 <= len(laps) == len(stadium.plans) <= MOST
    assert len({tuple(tried.changed.items()) for tried in stadium.plans}) == len(laps), "none is timed twice"
    assert sum(note.startswith("timed: ") for note in shown.notes) == len(laps)
    return plan, laps, shown.notes


TRUTHS: dict[str, Callable[[float], float]] = {
    "as predicted": lambda p: p,
    "half of what was saved": lambda p: 1 - 0.5 * (1 - p),
    "more than was saved": lambda p: 1 - 1.25 * (1 - p),
    "an overhead": lambda p: 1.0 if p == 1 else min(p + 0.15, 1.2),
    "late": lambda p: 1 - (1 - p) ** 2 * 1.5,
    "early": lambda p: 1 - 0.55 * (1 - p) ** 0.5,
    "in steps": lambda p: math.ceil(p * 12) / 12,
    "a cliff": lambda p: 0.98 if p > 0.55 else 0.6,
}


@pytest.fixture(scope="module")
def frontier(planner: Planner) -> list[tuple[float, float]]:
    """Predicted latency and loss of plans on a fine grid."""
    original, _ = planner.costs()
    low = planner.least(Latency(1)) / original.nanoseconds
    plans = [planner.plan(Latency(aim)) for aim in np.linspace(low + 1e-5, 1, 60)]
    return [(planner.fraction(plan, Latency), plan.predicted_loss) for plan in plans]


def test_the_planner_has_much_to_choose_from(planner, frontier):
    original, dense = planner.costs()
    assert original.nanoseconds == dense.nanoseconds == 1_000_000
    predicted, losses = np.array(frontier).T
    assert predicted[0] < 0.4
    assert (predicted[-1], losses[-1]) == (1, 0)
    assert (np.diff(predicted) >= 0).all()
    assert len(set(predicted)) > 50
    assert (np.diff(losses) <= 0).all()


@pytest.mark.parametrize("goal", [0.7, 0.8, 0.9])
@pytest.mark.parametrize("name", TRUTHS)
def test_goals_are_met_at_little_loss(network, planner, frontier, name, goal):
    """Little is twice what the best plan loses that is a little faster; a cliff is not found so soon."""
    truth = TRUTHS[name]
    stadium = Known(planner, truth)
    plan, laps, _ = met(network, planner, stadium, Latency(goal))
    measured = truth(planner.fraction(plan, Latency))
    assert measured in {lap.measured for lap in laps}
    assert measured <= goal * 1.0501
    assert plan.budget == f"--latency {goal}"
    least = min(loss for predicted, loss in frontier if truth(predicted) <= 0.97 * goal)
    assert plan.predicted_loss <= (3 if name == "a cliff" else 2) * least


@pytest.mark.parametrize("goal", [0.6, 0.75, 0.9])
def test_a_prediction_that_holds_needs_few_tries(network, planner, goal):
    plan, laps, _ = met(network, planner, Known(planner, lambda p: p), Latency(goal))
    assert len(laps) <= 2
    assert 0.9 * goal < laps[-1].measured <= goal * 1.001
    for lap in laps:
        assert lap.measured == lap.low == lap.high == lap.predicted
    assert plan.predicted_loss == min(lap.predicted_loss for lap in laps)


def test_a_model_faster_than_need_be_is_made_slower(network, planner):
    """Predictions that promise too little cost loss, were the first plan taken."""
    truth = TRUTHS["more than was saved"]
    plan, laps, _ = met(network, planner, Known(planner, truth), Latency(0.75))
    assert laps[0].measured < 0.7
    assert plan.predicted_loss < 0.8 * laps[0].predicted_loss
    assert truth(planner.fraction(plan, Latency)) > laps[0].measured


def test_milliseconds_are_of_the_original_that_was_measured(network, planner):
    plan, laps, _ = met(network, planner, Known(planner, lambda p: p), Milliseconds(0.7))
    assert laps[0].predicted == pytest.approx(0.7, abs=0.05)
    assert planner.fraction(plan, Latency) <= 0.7 * 1.01
    assert plan.budget == "--latency-ms 0.7"


def test_the_tighter_of_two_goals_counts(network, planner):
    budgets = Milliseconds(0.9), Latency(0.6), Milliseconds(0.95)
    plan, *_ = met(network, planner, Known(planner, lambda p: p), *budgets)
    assert planner.fraction(plan, Latency) <= 0.6 * 1.01
    assert plan.budget == "--latency-ms 0.9 --latency 0.6 --latency-ms 0.95"


@pytest.mark.parametrize(("macs", "goal"), [(0.5, 0.85), (0.9, 0.6)])
def test_other_budgets_are_met_as_well(network, planner, macs, goal):
    """Either of the two may be what binds."""
    stadium = Known(planner, lambda p: p)
    plan, *_ = met(network, planner, stadium, Macs(macs), Latency(goal))
    original, _ = planner.costs()
    spent = sum(choice.cost.macs for choice in plan.choices.values())
    assert spent <= macs * original.macs
    assert planner.fraction(plan, Latency) <= goal * 1.01
    assert plan.budget == f"--macs {macs} --latency {goal}"
    alone, *_ = met(network, planner, Known(planner, lambda p: p), Latency(goal))
    assert (sum(choice.cost.macs for choice in alone.choices.values()) > macs * original.macs) == (macs == 0.5)


def test_a_goal_that_needs_nothing(network, planner):
    plan, laps, _ = met(network, planner, Known(planner, lambda p: p), Latency(1))
    assert plan.changed == {}
    assert len(laps) == 1
    assert plan.predicted_loss == 0


def test_a_model_that_is_slower_than_predicted_as_it_is_gets_smaller(network, planner):
    plan, laps, _ = met(network, planner, Known(planner, lambda predicted: 1.1 * predicted), Latency(0.9999))
    assert plan.changed
    assert laps[0].measured > 1
    assert 0.9 < laps[-1].measured <= 1.01


# What cannot be


@pytest.mark.parametrize(
    ("truth", "goal"), [(lambda p: p, 0.05), (lambda p: 1.1, 0.9), (lambda p: 2 - p, 0.7), (lambda p: p + 0.3, 0.5)]
)
def test_an_impossible_goal_says_the_floor_and_what_bounds_it(network, planner, truth, goal):
    stadium = Known(planner, truth)
    with pytest.raises(BudgetError) as caught:
        meet(network, planner, [Latency(goal)], stadium, Notes())
    assert len(stadium.plans) <= MOST
    fastest = min(truth(planner.fraction(plan, Latency)) for plan in stadium.plans)
    assert str(caught.value) == (
        f"--latency {goal}: of the 1 ms that the model takes, 80% are in layers that can be pruned; cannot be met: "
        f"the fastest of {len(stadium.plans)} models timed took {fastest:.1%} of the original's latency"
    )


def test_the_smallest_that_there_is_was_tried_before_giving_up(network, planner):
    stadium = Known(planner, TRUTHS["half of what was saved"])
    with pytest.raises(BudgetError):
        meet(network, planner, [Latency(0.6)], stadium, Notes())
    original, _ = planner.costs()
    low = planner.least(Latency(1)) / original.nanoseconds
    tried = [planner.fraction(plan, Latency) for plan in stadium.plans]
    assert min(tried) == pytest.approx(low, abs=2e-3)


def test_what_will_do_is_not_lost_where_nothing_faster_has_so_few_parameters(network, planner):
    """The first plan takes 3 % more than the goal, and the budgets together allow no faster one."""
    original, _ = planner.costs()
    params = Params(round(planner.least(Params(1)) / original.parameters + 2e-3, 4))
    alone = planner.fraction(planner.plan(params), Latency)
    low = planner.least(Latency(1)) / original.nanoseconds
    with pytest.raises(BudgetError, match=r"cannot be met together: .* the smallest is") as caught:
        planner.plan(params, Latency(round(low + 1e-3, 4)))
    goal = float(str(caught.value).rpartition(" ")[2])
    assert low + 2e-3 < goal <= alone + 1e-3
    stadium = Known(planner, lambda p: 1.03 * p)
    plan, laps, _ = met(network, planner, stadium, params, Latency(goal))
    assert len(laps) == 1
    assert plan.predicted_loss == laps[0].predicted_loss
    assert goal * 1.01 < laps[0].measured <= goal * 1.05


# Noise


def test_a_noisy_machine_is_spoken_of(network, planner):
    """Quartiles lie half way from the middle to the ends."""
    truth = TRUTHS["half of what was saved"]
    *_, quiet = met(network, planner, Known(planner, truth, spread=0.07), Latency(0.8))
    assert not any("noisy" in note for note in quiet)
    plan, laps, notes = met(network, planner, Known(planner, truth, spread=0.2), Latency(0.8))
    chosen = truth(planner.fraction(plan, Latency))
    assert notes[-1] == (f"the machine is noisy: ratios of latency from {chosen - 0.1:.1%} to {chosen + 0.1:.1%}")
    assert all(lap.high - lap.low == pytest.approx(0.2) for lap in laps)


def test_noise_is_spoken_of_where_the_goal_is_missed(network, planner):
    with pytest.raises(
        BudgetError, match=r"fastest of \d models timed took 100.0% .*; the machine is noisy, that was 90"
    ) as e:
        meet(network, planner, [Latency(0.5)], Known(planner, lambda p: 1.0, spread=0.2), Notes())
    assert str(e.value).endswith("that was 90.0% to 110.0%")


def test_what_was_timed_is_told(network, planner):
    _, laps, notes = met(network, planner, Known(planner, TRUTHS["late"], spread=0.02), Latency(0.8))
    for lap, note in zip(laps, notes, strict=True):
        shown = f"timed: {lap.measured:.1%} of the original's latency ({lap.low:.1%} to {lap.high:.1%}), predicted "
        assert note == f"{shown}{lap.predicted:.1%}; predicted loss {lap.predicted_loss:.2g}"
        assert set(lap.as_dict()) == {"predicted", "measured", "low", "high", "predicted_loss"}


# Which lap is taken


def lap(measured: float, loss: float) -> Lap:
    return Lap(measured, measured, measured, measured, loss)


def test_the_least_loss_of_those_that_meet_the_goal_is_taken():
    laps = [lap(0.70, 3.0), lap(0.80, 2.0), lap(0.805, 1.5), lap(0.83, 1.0), lap(0.9, 0.5)]
    assert goals._chosen(laps, 0.8, "") == laps[2], "1 % above it is as good as met"
    assert goals._chosen(laps[:2], 0.8, "") == laps[1]
    assert goals._chosen(laps[3:], 0.8, "") == laps[3], "and 5 % will do where nothing else does"
    with pytest.raises(BudgetError, match=r"^why; cannot be met: the fastest of 1 models timed took 90.0%"):
        goals._chosen(laps[4:], 0.8, "why")


def test_the_next_aim_lies_between_what_was_measured_around_the_goal():
    assert goals._next_aim({1.0: 1.0, 0.8: 0.9}, 0.85) == pytest.approx(0.7), "in proportion below"
    assert goals._next_aim({1.0: 1.0, 0.8: 0.9, 0.6: 0.7}, 0.8) == pytest.approx(0.7), "half way between"
    assert goals._next_aim({1.0: 1.0, 0.8: 0.9, 0.6: 0.7}, 0.705) == pytest.approx(0.62), "away from what is known"
    assert goals._next_aim({0.7: 0.7}, 0.8) == 0.8, "nothing slower is known"
    assert goals._next_aim({0.6: 0.75}, 0.7) == pytest.approx(0.56), "the model as it is was slower than predicted"
    assert goals._next_aim({1.0: 1.0, 0.8: 1.0}, 0.9) < 0.7, "no gain so far: further down"


# The stadium itself


@pytest.fixture
def raced(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """What races were asked for; the second model takes 0.8, 0.9 and 1.0 of the first."""
    asked: list[dict[str, object]] = []

    def race(models, feeds, **options):
        asked.append({"models": models, "feeds": feeds, **options})
        return np.array([[2e-3, 1.6e-3], [4e-3, 3.6e-3], [1e-3, 1e-3]])

    monkeypatch.setattr(evaluation, "race", race)
    return asked


@pytest.mark.parametrize(("batch", "fixed"), [(1, None), (4, None), (4, 2)])
def test_models_race_against_the_original_at_the_batch_that_counts(network, raced, batch, fixed):
    if fixed:
        model = ir.to_proto(network.original)
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = fixed
        network = open_network(model)
    stadium = Stadium(network, Machine(["CPUExecutionProvider"], 3, batch))
    assert stadium.batch == (fixed or batch)
    np.testing.assert_allclose(stadium.time(network.model), [0.8, 0.9, 1.0])
    (asked,) = raced
    assert {name: array.shape for name, array in asked["feeds"].items()} == {"x": (fixed or batch, 16, 8, 8)}
    assert list(asked["models"].values()) == [serialized(network.original), serialized(network.model)]
    assert (asked["providers"], asked["threads"]) == (["CPUExecutionProvider"], 3)


def test_layers_are_measured_for_what_the_whole_model_takes(network, raced, monkeypatch):
    monkeypatch.setattr(latency, "Stopwatch", clock := Clock())
    model = Stadium(network, Machine((), 3, 4)).measure(2, Progress())
    assert isinstance(model, LatencyModel)
    assert (model.batch, model.original, model.normalized) == (4, 2_000_000, 1_800_000)
    assert set(model.units.values()) == {2}
    assert clock.machines == [((), 3)]
    assert {workload.leading[0] for workload in clock.asked} == {4}


def test_progress_ends_at_all_of_it(network, raced, monkeypatch):
    monkeypatch.setattr(latency, "Stopwatch", Clock())
    steps: list[int] = []

    class Bars(Progress):
        @contextmanager
        def stage(self, title, total=None):
            assert (title, total) in (("measuring the model", None), ("measuring layers", 100))
            yield steps.append

    Stadium(network, Machine()).measure(2, Bars())
    assert len(steps) > 20
    assert min(steps) >= 0
    assert sum(steps) == 100


def test_a_branch_saves_what_the_whole_model_takes_less_without_it(monkeypatch):
    """The sum and whatever else vanishes with it included."""
    arrays = {"w": weights(4, 4, 3, 3), "v": weights(4, 4, 3, 3, seed=1)}
    nodes = [
        node("Conv", ["x", "w"], ["h"], "first", pads=[1] * 4),
        node("Conv", ["h", "v"], ["b"], "second", pads=[1] * 4),
        node("Add", ["h", "b"], ["s"], "sum"),
        node("Relu", ["s"], ["y"], "relu"),
    ]
    network = open_network(tiny(nodes, {"x": ["n", 4, 8, 8]}, {"y": ["n", 4, 8, 8]}, arrays))
    raced = []

    def race(models, feeds, **options):
        raced.append(list(models))
        return np.tile([2e-3, 1.8e-3, 1.1e-3], (5, 1))

    monkeypatch.setattr(evaluation, "race", race)
    monkeypatch.setattr(latency, "Stopwatch", Clock())
    model = Stadium(network, Machine()).measure(2, Progress())
    assert model.savings == {"second": 700_000}
    assert len(raced) == 1
    planner = Planner(network, statistics_of(network), latency=model)
    (removal,) = (choice for choice in planner.options["second"] if choice.form == REMOVED)
    assert planner.options["second"][0].cost.nanoseconds - removal.cost.nanoseconds == 700_000


def test_it_is_the_sketch_that_is_timed(network, planner, monkeypatch):
    monkeypatch.undo()
    timed: list[int] = []

    class Counting:
        def time(self, model: ir.Model) -> np.ndarray:
            timed.append(count_macs(model))
            return np.array([timed[-1] / count_macs(network.model)])

    plan, laps = meet(network, planner, [Latency(0.7)], Counting(), Progress())
    assert len(timed) == len(laps)
    assert min(timed) < count_macs(network.model)
    assert laps[-1].measured <= 0.7 * 1.05 or plan.changed
