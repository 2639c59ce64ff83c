"""Recipes: which method prunes, how much of it by channels, in how many rounds; and the plans that come of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from onnx_kfe._latency_goal import Lap, Stadium, meet
from onnx_kfe._measure import Machine
from onnx_kfe.calibration import Statistics
from onnx_kfe.errors import UsageError
from onnx_kfe.graph import Network
from onnx_kfe.kfe import IMPORTANCES
from onnx_kfe.planning import (
    DEFAULT_ROUND_TO,
    AnyPlanner,
    Budget,
    ChannelPlanner,
    DirectionPlanner,
    Latency,
    Macs,
    Method,
    Params,
    Plan,
    Planner,
    find_method,
)
from onnx_kfe.progress import Progress
from onnx_kfe.recovery.schedules import find_schedule
from onnx_kfe.rewrite import narrow, rotate

__all__ = ["CURVATURES", "Planned", "Recipe", "make_plan", "make_planner", "plan_by", "stadium_for"]

CURVATURES = ("kfac", "ekfac")


class _Channels(Macs):
    """Share of the MACs until which channels go."""

    option = "--channels"


@dataclass(frozen=True)
class Recipe:
    """How a model is pruned.

    Attributes:
        method: What is pruned, and by what.
        channels: Remove channels first, until this share of the MACs is left, then choose forms; None for one or the
            other.
        rounds: In how many rounds, with statistics collected anew in each.
        curvature: ``kfac``, or ``ekfac`` for variances measured in the eigenbases.
        schedule: Key of `SCHEDULES`, which prunes while it trains; None for training behind pruning.
        epochs: Epochs of training, 0 for none.
    """

    method: Method = field(default_factory=Method)
    channels: float | None = None
    rounds: int = 1
    curvature: str = "kfac"
    schedule: str | None = None
    epochs: int = 0

    @staticmethod
    def of(
        method: str | None = None,
        basis: str | None = None,
        channels: float | None = None,
        rounds: int = 1,
        curvature: str = "kfac",
        schedule: str | None = None,
        epochs: int = 0,
    ) -> Recipe:
        """The recipe that the options describe.

        Raises:
            UsageError: They do not go together.
        """
        if channels is not None and method in (None, "forms"):
            method = "channels"
        if schedule is not None and method is None:
            method, basis = ("channels", None) if basis in (None, "channel") else ("c-obd", basis)
        chosen = find_method(basis=basis) if method is None else find_method(method, basis)
        if channels is not None and chosen.basis != "channel":
            raise UsageError(f"--channels: they go by channels or {', '.join(IMPORTANCES)}, not by {chosen.name}")
        if channels is not None:
            _Channels(channels)
        if rounds < 1:
            raise UsageError(f"--iterations {rounds}: give 1 or more")
        if rounds > 1 and (chosen.basis is None or channels is not None):
            raise UsageError("--iterations: forms are chosen at once; it goes with other methods, without --channels")
        if curvature not in CURVATURES:
            raise UsageError(f"--curvature {curvature}: it can be {', '.join(CURVATURES)}")
        if curvature == "ekfac" and (chosen.basis != "kfe" or IMPORTANCES[chosen.importance].needs != "variances"):
            raise UsageError(
                "--curvature ekfac: of the methods only eigendamage, eigendamage-depthwise and c-obd with --basis kfe "
                "look at variances of eigendirections"
            )
        recipe = Recipe(chosen, channels, rounds, curvature, schedule, epochs)
        recipe._check_training()
        return recipe

    def _check_training(self) -> None:
        if self.schedule is not None:
            find_schedule(self.schedule)
            if self.method.basis is None or self.method.name == "eigendamage-depthwise":
                raise UsageError("--schedule: channels go, or with --basis kfe directions; drop --method")
            if self.channels is not None or self.rounds > 1:
                raise UsageError("--schedule prunes while it trains: drop --channels and --iterations")
            if self.epochs < 2:
                raise UsageError("--schedule prunes in the first half of the epochs: give --finetune 2 or more")
        if 0 < self.epochs < self.rounds:
            raise UsageError(f"--finetune {self.epochs}: give an epoch at least for each of --iterations {self.rounds}")

    @property
    def refits(self) -> bool:
        """Whether the result is refitted: what is to be as published is not, nor what was trained between rounds."""
        return not self.method.name.startswith("eigendamage") and not (self.epochs and self.rounds > 1)


@dataclass(frozen=True)
class Planned:
    """A plan and where it comes from.

    Attributes:
        plan: The plan.
        laps: The models that were timed for it, where there is a budget of latency.
        planner: What made it.
    """

    plan: Plan
    laps: list[Lap]
    planner: AnyPlanner


def make_plan(
    network: Network,
    statistics: Statistics | None,
    budgets: Sequence[Budget],
    machine: Machine,
    progress: Progress,
    *,
    round_to: int | None = None,
    recipe: Recipe,
) -> Planned:
    """The plan of a recipe for budgets.

    Raises:
        BudgetError: The budgets cannot be met.
        UsageError: The recipe needs statistics, and there are none.
    """
    if recipe.channels is None:
        return _planned(network, statistics, budgets, machine, progress, round_to, recipe.method)
    planner = make_planner(network, statistics, recipe.method, Macs, round_to, None, progress)
    with progress.stage("planning channels"):
        first = planner.plan(_Channels(recipe.channels))
        narrowed = narrow(network, first, statistics)
    found = _planned(narrowed.network, narrowed.statistics, budgets, machine, progress, round_to, Method())
    choices = {
        name: replace(choice, loss=choice.loss + narrowed.losses.get(name, 0.0))
        for name, choice in found.plan.choices.items()
    }
    return replace(
        found,
        plan=replace(
            found.plan, choices=choices, channels=first.channels, compensates=first.compensates, rotates=first.rotates
        ),
    )


def _planned(
    network: Network,
    statistics: Statistics | None,
    budgets: Sequence[Budget],
    machine: Machine,
    progress: Progress,
    round_to: int | None,
    method: Method,
) -> Planned:
    stadium = stadium_for(network, machine, budgets)
    kind = type(budgets[0]) if budgets else Macs
    planner = make_planner(network, statistics, method, kind, round_to, stadium, progress)
    if isinstance(planner, Planner) and not budgets and statistics is None:
        with progress.stage("planning"):
            return Planned(planner.smallest(), [], planner)
    return plan_by(planner, network, budgets, stadium, progress)


def stadium_for(network: Network, machine: Machine, budgets: Sequence[Budget]) -> Stadium | None:
    """Where models are timed, if one of the budgets is of latency."""
    return Stadium(network, machine) if any(isinstance(budget, Latency) for budget in budgets) else None


def plan_by(
    planner: AnyPlanner, network: Network, budgets: Sequence[Budget], stadium: Stadium | None, progress: Progress
) -> Planned:
    """The plan of a planner for budgets, timed where there is a stadium.

    Raises:
        BudgetError: The budgets cannot be met.
    """
    if stadium is not None:
        plan, laps = meet(network, planner, budgets, stadium, progress)
        return Planned(plan, laps, planner)
    with progress.stage("planning"):
        return Planned(planner.plan(*budgets), [], planner)


def make_planner(
    network: Network,
    statistics: Statistics | None,
    method: Method,
    kind: type[Budget],
    round_to: int | None,
    stadium: Stadium | None,
    progress: Progress,
) -> AnyPlanner:
    """What makes the plans of a method for budgets of a kind; with measured latencies where there is a stadium."""
    if method.basis is None:
        latency = None if stadium is None else stadium.measure(round_to, progress)
        with progress.stage("planning"):
            return Planner(network, statistics, round_to=round_to or DEFAULT_ROUND_TO, latency=latency)
    nanoseconds = 0 if stadium is None else stadium.nanoseconds()
    with progress.stage("planning"):
        if method.form is None:
            spares = None if not method.weighs_costs else Params if kind is Params else Macs
            rotates = method.weighs_costs and statistics is not None
            if rotates and statistics is not None:
                network, statistics = rotate(network, statistics)
            return ChannelPlanner(
                network, statistics, method.importance, spares=spares, round_to=round_to or DEFAULT_ROUND_TO,
                nanoseconds=nanoseconds, rotates=rotates,
            )  # fmt: skip
        if statistics is None:
            raise UsageError(f"--method {method.name} needs statistics: give --data or --stats")
        return DirectionPlanner(network, statistics, method.form, round_to=round_to, nanoseconds=nanoseconds)
