"""The plan: form and ranks of each layer, as a file that a person can read and edit."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from onnx_kfe.calibration import Statistics
from onnx_kfe.errors import BudgetError, KfeError, UsageError
from onnx_kfe.graph import Layer, Network, count_parameters, find_branches, replace_whole
from onnx_kfe.kfe import Array
from onnx_kfe.planning._allocation import DENSE, REMOVED, Candidate, allocate, candidates, least, worthwhile
from onnx_kfe.planning._budget import Budget, Latency, describe
from onnx_kfe.planning._chain import Cost, dense_cost
from onnx_kfe.planning._forms import FORMS
from onnx_kfe.planning._latency import DEFAULT_ROUND_TO, LatencyModel
from onnx_kfe.planning._problem import LayerProblem
from onnx_kfe.planning._removal import removal_loss, removals

__all__ = ["DEFAULT_ROUND_TO", "Plan", "Planner", "make_plan", "network_cost"]

_FORMAT = "onnx-kfe plan 1"
_FRONTIER_POINTS = 17
_ROOM = 1e-6  # above the least, so that rounding does not take it away
_JUSTIFIED = 1e-3  # share of a weight's energy that may go when nothing but the weights is known


@dataclass(frozen=True)
class Plan:
    """What to do with each layer.

    Attributes:
        model_hash: Fingerprint of the model it is for.
        choices: Candidate by layer name, layers that stay as they are included.
        original: Cost of the whole model before.
        budget: The budgets as typed.
        skipped: Reason by layer name for layers that could not be considered.
    """

    model_hash: str
    choices: dict[str, Candidate]
    original: Cost
    budget: str = ""
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def changed(self) -> dict[str, Candidate]:
        """The layers that get another form."""
        return {name: choice for name, choice in self.choices.items() if choice.form != DENSE}

    @property
    def removed(self) -> list[str]:
        """The last layers of the residual branches that are left out."""
        covered = {name for choice in self.choices.values() for name in choice.removes}
        return [name for name, choice in self.choices.items() if choice.form == REMOVED and name not in covered]

    @property
    def predicted_loss(self) -> float:
        """Summed predicted loss in nats per sample."""
        return sum(choice.loss for choice in self.choices.values())

    def as_dict(self) -> dict[str, Any]:
        """What `save` writes."""
        return {
            "format": _FORMAT, "model_hash": self.model_hash, "budget": self.budget,
            "original": {"macs": self.original.macs, "parameters": self.original.parameters},
            "predicted_loss": self.predicted_loss,
            "layers": {
                name: {
                    "form": choice.form, "ranks": list(choice.ranks), "macs": choice.cost.macs,
                    "parameters": choice.cost.parameters, "predicted_loss": choice.loss,
                    **({"removes": list(choice.removes)} if choice.removes else {}),
                }
                for name, choice in self.choices.items()
            },
            "skipped": self.skipped,
        }  # fmt: skip

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON. ``form`` and ``ranks`` of a layer are for editing; its costs are counted anew."""
        replace_whole(path, (json.dumps(self.as_dict(), indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str], network: Network) -> Plan:
        """Read a plan, edited or not, and check it against the model.

        Raises:
            KfeError: No plan, or a plan for another model.
            UsageError: A layer, form or rank that cannot be.
        """
        data = _read(path)
        if data.get("model_hash") != network.fingerprint:
            raise KfeError(f"{path}: the plan is for another model than {network.name}")
        layers = {layer.name: layer for layer in network.layers}
        choices = {
            name: _checked(f"{path}: layer '{name}'", layers.get(name), entry) for name, entry in data["layers"].items()
        }
        _check_removals(path, network, choices)
        return cls(network.fingerprint, choices, network_cost(network), data.get("budget", ""), data.get("skipped", {}))


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise KfeError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise KfeError(f"{path}: not a plan ({type(error).__name__}: {error})") from error
    if not isinstance(data, dict) or data.get("format") != _FORMAT or not isinstance(data.get("layers"), dict):
        raise KfeError(f"{path}: not a plan of this version")
    return data


def _checked(where: str, layer: Layer | None, entry: Any) -> Candidate:
    """The candidate that an entry of the file describes, its costs counted anew."""
    if layer is None:
        raise UsageError(f"{where} is not in the model")
    form, ranks = (entry.get("form"), entry.get("ranks", [])) if isinstance(entry, dict) else (None, [])
    if form == DENSE and layer.geometry is not None:
        return Candidate(DENSE, (), dense_cost(layer.geometry), 0.0)
    loss = entry.get("predicted_loss") if isinstance(entry, dict) else None
    known = float(loss) if isinstance(loss, int | float) else math.nan
    if form == REMOVED:
        return Candidate(REMOVED, (), Cost(0, 0), known, tuple(entry.get("removes", [])))
    if not layer.prunable or layer.geometry is None:
        raise UsageError(f"{where} cannot be pruned: {layer.reason}")
    if not isinstance(form, str) or form not in FORMS:
        raise UsageError(f"{where}: unknown form {form!r}; it can be {', '.join((DENSE, REMOVED, *FORMS))}")
    limits = FORMS[form].limits(layer.geometry)
    if not limits:
        fitting = [name for name, other in FORMS.items() if other.limits(layer.geometry)]
        raise UsageError(f"{where}: form '{form}' does not apply to it; it can be {', '.join((DENSE, *fitting))}")
    if not isinstance(ranks, list) or len(ranks) != len(limits) or any(type(rank) is not int for rank in ranks):
        raise UsageError(f"{where}: form '{form}' takes a list of {len(limits)} whole rank(s), found {ranks!r}")
    for rank, limit in zip(ranks, FORMS[form].limits(layer.geometry, ranks), strict=True):
        if not 1 <= rank <= limit:
            raise UsageError(f"{where}: rank {rank} of form '{form}' must be from 1 to {limit}")
    if misfit := FORMS[form].misfit(layer.geometry, ranks):
        raise UsageError(f"{where}: form '{form}': {misfit}")
    return Candidate(form, tuple(ranks), FORMS[form].cost(layer.geometry, ranks), known)


def _check_removals(path: str | os.PathLike[str], network: Network, choices: Mapping[str, Candidate]) -> None:
    """What is removed makes up whole residual branches."""
    gone = {name for name, choice in choices.items() if choice.form == REMOVED}
    if not gone:
        return
    branches = {branch.layer: set(branch.layers) for branch in find_branches(network)}
    covered = {name for choice in choices.values() for name in choice.removes}
    known = {layer.name for layer in network.layers}
    for name in sorted(gone - covered):
        wanted = {name, *choices[name].removes}
        if branches.get(name) != wanted or not wanted & set(choices) <= gone or not wanted <= known:
            raise UsageError(f"{path}: layer '{name}': removed and its 'removes' must be a whole residual branch")
    if stray := sorted(covered & set(choices) - gone):
        raise UsageError(f"{path}: layer '{stray[0]}' vanishes with another: its form must be '{REMOVED}'")


def network_cost(network: Network) -> Cost:
    """MACs and parameters of the whole model."""
    return Cost(sum(layer.macs for layer in network.layers), count_parameters(network.model))


class Planner:
    """Plans of one model under several budgets; the candidates of its layers are made once.

    Args:
        network: The model.
        statistics: Collected on this very model; None for what the weights alone justify: forms that change a weight by
            next to nothing, whatever the inputs.
        round_to: Ranks are multiples of this (smaller ones for small layers).
        latency: Measured latencies, which budgets of latency need; their grid is the one that `round_to` gave there.

    Raises:
        KfeError: The statistics are of another model.
    """

    def __init__(
        self,
        network: Network,
        statistics: Statistics | None,
        *,
        round_to: int = DEFAULT_ROUND_TO,
        latency: LatencyModel | None = None,
    ) -> None:
        if statistics is not None:
            statistics.check_model(network.fingerprint, network.name)
        self._network, self._latency, self._proven = network, latency, statistics is not None
        self._skipped = {layer.name: layer.reason for layer in network.layers if layer.reason is not None}
        self.options: dict[str, Sequence[Candidate]] = {}
        """Candidates by layer, the layer as it is first."""
        losses = {}
        for layer in network.prunable:
            grid = round_to if latency is None else latency.round_to(layer)
            if statistics is None:
                self.options[layer.name] = _justified(LayerProblem(layer, None), grid, latency)
            elif layer.name in statistics.layers:
                problem = LayerProblem(layer, statistics.layers[layer.name])
                self.options[layer.name] = candidates(problem, grid, latency)
                losses[layer.name] = removal_loss(problem)
            else:
                self._skipped[layer.name] = statistics.skipped.get(layer.name, "no statistics were collected")
        for name, removal in removals(network, losses, latency).items():
            self.options[name] = [*self.options[name], removal]

    def plan(self, *budgets: Budget) -> Plan:
        """Choose form and ranks of each layer: least predicted loss under the budgets.

        Raises:
            UsageError: There is no budget, or one of latency where none was measured.
            BudgetError: The budgets cannot be met.
        """
        if not budgets:
            raise UsageError("give a budget: --macs, --params or --latency")
        if self._latency is None and any(isinstance(budget, Latency) for budget in budgets):
            raise UsageError(f"{describe(budgets)}: no latency was measured")
        options = {name: worthwhile(choices, budgets) for name, choices in self.options.items()}
        try:
            choices = allocate(options, budgets, *self.costs())
        except BudgetError as error:
            if self._proven:
                raise
            raise BudgetError(f"without data, {error}; give --data so that more can be justified") from error
        return self._plan(choices, describe(budgets))

    def smallest(self) -> Plan:
        """Of each layer what has the fewest MACs."""
        choices = {name: min(found, key=lambda c: (c.cost.macs, c.loss)) for name, found in self.options.items()}
        return self._plan(choices, "")

    def frontier(self, kind: type[Budget]) -> tuple[Array, Array]:
        """The least predicted loss at every size of the model.

        Args:
            kind: The budget that sizes are fractions of.

        Returns:
            Fractions of the original, rising to 1 from the least that there is, and the losses, falling to 0.
        """
        original, _ = self.costs()
        smallest = self.least(kind(1)) / max(kind(1).of(original), 1)
        fractions = np.linspace(min(smallest + _ROOM, 1.0), 1.0, _FRONTIER_POINTS)
        losses = [self.plan(kind(float(fraction))).predicted_loss for fraction in fractions[:-1]]
        return fractions, np.maximum.accumulate([0.0, *reversed(losses)])[::-1]

    def fraction(self, plan: Plan, kind: type[Budget]) -> float:
        """Size of a plan's model as a fraction of the original's, counted or predicted."""
        original, dense = self.costs()
        changed = sum(
            kind(1).of(choice.cost) - kind(1).of(self.options[name][0].cost) for name, choice in plan.changed.items()
        )
        return (kind(1).of(dense) + changed) / max(kind(1).of(original), 1)

    def least(self, budget: Budget, *held: Budget) -> int:
        """The least of a budget's resource that any plan is predicted to take, of those within the budgets held."""
        options = {name: worthwhile(choices, [budget, *held]) for name, choices in self.options.items()}
        return least(options, budget, *self.costs(), held)

    def costs(self) -> tuple[Cost, Cost]:
        """Of the original, and of the normalised model."""
        cost = network_cost(self._network)
        if self._latency is None:
            return cost, cost
        original, normalized = self._latency.original, self._latency.normalized
        return replace(cost, nanoseconds=original), replace(cost, nanoseconds=normalized)

    def _plan(self, choices: dict[str, Candidate], budget: str) -> Plan:
        original, _ = self.costs()
        return Plan(self._network.fingerprint, choices, original, budget, self._skipped)

    @property
    def bounds(self) -> str:
        """What bounds a latency."""
        assert self._latency is not None
        return (
            f"of the {1e-6 * self._latency.original:.3g} ms that the model takes, "
            f"{self._latency.prunable_share:.0%} are in layers that can be pruned"
            f"{'' if self._proven else '; give --data so that more can be justified'}"
        )


def make_plan(
    network: Network, statistics: Statistics, budgets: Sequence[Budget], *, round_to: int = DEFAULT_ROUND_TO
) -> Plan:
    """Choose form and ranks of each layer: least predicted loss under the budgets.

    Args:
        network: The model.
        statistics: Collected on this very model.
        budgets: One or more bounds, all to be met.
        round_to: Ranks are multiples of this (smaller ones for small layers).

    Raises:
        KfeError: The statistics are of another model.
        BudgetError: The budgets cannot be met.
    """
    return Planner(network, statistics, round_to=round_to).plan(*budgets)


def _justified(problem: LayerProblem, round_to: int, latency: LatencyModel | None) -> list[Candidate]:
    allowed = _JUSTIFIED * 0.5 * float((problem.weight**2).sum())
    return [choice for choice in candidates(problem, round_to, latency) if choice.loss <= allowed]
