"""The plan: form and ranks of each layer, as a file that a person can read and edit."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnx_kfe.calibration import Statistics
from onnx_kfe.errors import BudgetError, KfeError, UsageError
from onnx_kfe.graph import Layer, Network, count_parameters, replace_whole
from onnx_kfe.kfe import Array
from onnx_kfe.planning._allocation import DENSE, Candidate, allocate, candidates, frontier
from onnx_kfe.planning._budget import Budget, describe
from onnx_kfe.planning._chain import Cost, dense_cost
from onnx_kfe.planning._forms import FORMS
from onnx_kfe.planning._problem import LayerProblem

__all__ = ["DEFAULT_ROUND_TO", "Plan", "Planner", "make_plan", "network_cost", "plan_from_weights"]

_FORMAT = "onnx-kfe plan 1"
DEFAULT_ROUND_TO = 16
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
    if not layer.prunable or layer.geometry is None:
        raise UsageError(f"{where} cannot be pruned: {layer.reason}")
    if not isinstance(form, str) or form not in FORMS:
        raise UsageError(f"{where}: unknown form {form!r}; it can be {', '.join((DENSE, *FORMS))}")
    limits = FORMS[form].limits(layer.geometry)
    if not limits:
        fitting = [name for name, other in FORMS.items() if other.limits(layer.geometry)]
        raise UsageError(f"{where}: form '{form}' does not apply to it; it can be {', '.join((DENSE, *fitting))}")
    if not isinstance(ranks, list) or len(ranks) != len(limits) or any(type(rank) is not int for rank in ranks):
        raise UsageError(f"{where}: form '{form}' takes a list of {len(limits)} whole rank(s), found {ranks!r}")
    for rank, limit in zip(ranks, FORMS[form].limits(layer.geometry, ranks), strict=True):
        if not 1 <= rank <= limit:
            raise UsageError(f"{where}: rank {rank} of form '{form}' must be from 1 to {limit}")
    loss = entry.get("predicted_loss")
    known = float(loss) if isinstance(loss, int | float) else math.nan
    return Candidate(form, tuple(ranks), FORMS[form].cost(layer.geometry, ranks), known)


def network_cost(network: Network) -> Cost:
    """MACs and parameters of the whole model."""
    return Cost(sum(layer.macs for layer in network.layers), count_parameters(network.model))


class Planner:
    """Plans of one model under several budgets; the candidates of its layers are made once.

    Args:
        network: The model.
        statistics: Collected on this very model.
        round_to: Ranks are multiples of this (smaller ones for small layers).

    Raises:
        KfeError: The statistics are of another model.
    """

    def __init__(self, network: Network, statistics: Statistics, *, round_to: int = DEFAULT_ROUND_TO) -> None:
        statistics.check_model(network.fingerprint, network.name)
        self._network = network
        self._skipped = {layer.name: layer.reason for layer in network.layers if layer.reason is not None}
        self._options: dict[str, Sequence[Candidate]] = {}
        for layer in network.prunable:
            if layer.name in statistics.layers:
                self._options[layer.name] = candidates(LayerProblem(layer, statistics.layers[layer.name]), round_to)
            else:
                self._skipped[layer.name] = statistics.skipped.get(layer.name, "no statistics were collected")

    def plan(self, *budgets: Budget) -> Plan:
        """Choose form and ranks of each layer: least predicted loss under the budgets.

        Raises:
            BudgetError: The budgets cannot be met.
        """
        return _allocated(self._network, self._options, budgets, self._skipped)

    def frontier(self) -> tuple[Array, Array]:
        """Fractions of the MACs, rising, and about the least predicted loss at each; see `frontier`."""
        original = network_cost(self._network)
        macs, losses = frontier(self._options, original)
        return macs / max(original.macs, 1), losses


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


def plan_from_weights(network: Network, budgets: Sequence[Budget], *, round_to: int = DEFAULT_ROUND_TO) -> Plan:
    """Choose what the weights alone justify: forms that change a weight by next to nothing, whatever the inputs.

    Raises:
        BudgetError: The budgets cannot be met so; data are needed.
    """
    options: dict[str, Sequence[Candidate]] = {}
    for layer in network.prunable:
        problem = LayerProblem(layer, None)
        allowed = _JUSTIFIED * 0.5 * float((problem.weight**2).sum())
        options[layer.name] = [c for c in candidates(problem, round_to) if c.loss <= allowed]
    skipped = {layer.name: layer.reason for layer in network.layers if layer.reason is not None}
    if not budgets:
        choices = {name: min(found, key=lambda c: (c.cost.macs, c.loss)) for name, found in options.items()}
        return Plan(network.fingerprint, choices, network_cost(network), "", skipped)
    try:
        return _allocated(network, options, budgets, skipped)
    except BudgetError as error:
        raise BudgetError(f"without data, {error}; give --data so that more can be justified") from error


def _allocated(
    network: Network,
    options: Mapping[str, Sequence[Candidate]],
    budgets: Sequence[Budget],
    skipped: dict[str, str],
) -> Plan:
    if not budgets:
        raise UsageError("give a budget: --macs or --params")
    original = network_cost(network)
    choices = allocate(options, budgets, original)
    return Plan(network.fingerprint, choices, original, describe(budgets), skipped)
