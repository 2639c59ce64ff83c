"""The plan: form and ranks of each layer, as a file that a person can read and edit."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_kfe.errors import KfeError, UsageError
from onnx_kfe.graph import ChannelGroups, Layer, Network, count_parameters, find_branches, find_groups, replace_whole
from onnx_kfe.planning._allocation import DENSE, REMOVED, Candidate
from onnx_kfe.planning._chain import Cost, layer_cost
from onnx_kfe.planning._forms import FORMS
from onnx_kfe.planning._latency import DEFAULT_ROUND_TO

__all__ = ["DEFAULT_ROUND_TO", "Plan", "network_cost"]

_FORMAT = "onnx-kfe plan 1"


@dataclass(frozen=True)
class Plan:
    """What to do with each layer.

    Attributes:
        model_hash: Fingerprint of the model it is for.
        choices: Candidate by layer name, layers that stay as they are included.
        original: Cost of the whole model before.
        budget: The budgets as typed.
        skipped: Reason by layer name for layers that could not be considered.
        channels: The units that are kept of channel groups of which some are removed, by name of the group; `choices`
            are for the layers that are left then.
        compensates: Whether the weights that stay make up for the channels that go.
        rotates: Whether the channels are those of rotated heads, see `rewrite.rotate`.
    """

    model_hash: str
    choices: dict[str, Candidate]
    original: Cost
    budget: str = ""
    skipped: dict[str, str] = field(default_factory=dict)
    channels: dict[str, tuple[int, ...]] = field(default_factory=dict)
    compensates: bool = False
    rotates: bool = False

    @property
    def changed(self) -> dict[str, Candidate]:
        """The layers that get another form."""
        return {name: choice for name, choice in self.choices.items() if choice.form != DENSE}

    @property
    def changes(self) -> bool:
        """Whether anything is changed."""
        return bool(self.changed or self.channels)

    def masks(self, groups: ChannelGroups) -> dict[str, npt.NDArray[np.bool_]]:
        """Which units are kept of the groups in `channels`.

        Raises:
            UsageError: A group or unit that is not in the model.
        """
        sizes = {group.name: group.size for group in groups.groups}
        masks = {}
        for name, kept in self.channels.items():
            if name not in sizes:
                raise UsageError(f"channels of '{name}': no such group; see onnx-kfe inspect --groups")
            if stray := [unit for unit in kept if not 0 <= unit < sizes[name]]:
                raise UsageError(f"channels of '{name}': {stray[0]} is not one of 0 to {sizes[name] - 1}")
            masks[name] = np.isin(np.arange(sizes[name]), kept)
        return masks

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
            **({"compensates": self.compensates, "rotates": self.rotates} if self.channels else {}),
            **({"channels": {name: _ranges(kept) for name, kept in self.channels.items()}} if self.channels else {}),
        }  # fmt: skip

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON. ``form``, ``ranks`` and the channels kept are for editing; costs are counted anew."""
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
        plan = cls(
            network.fingerprint, {}, network_cost(network), data.get("budget", ""), data.get("skipped", {}),
            _channels(path, network, data.get("channels", {})), bool(data.get("compensates", False)),
            bool(data.get("rotates", False)),
        )  # fmt: skip
        try:
            layers = {layer.name: layer for layer in plan.cut_layers(network)}
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from error
        choices = {
            name: _checked(f"{path}: layer '{name}'", layers.get(name), entry) for name, entry in data["layers"].items()
        }
        _check_removals(path, network, choices)
        return replace(plan, choices=choices)

    def cut_layers(self, network: Network) -> list[Layer]:
        """The layers of a network with the shapes that they have once the channels are removed."""
        if not self.channels:
            return network.layers
        groups = find_groups(network)
        cuts = groups.cut(self.masks(groups))
        return [
            layer if layer.geometry is None else replace(layer, geometry=cuts[layer.name].geometry(layer.geometry))
            for layer in network.layers
        ]


def _ranges(indices: tuple[int, ...]) -> str:
    """``0-3,7``."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _channels(path: str | os.PathLike[str], network: Network, entries: Any) -> dict[str, tuple[int, ...]]:
    """The channels kept that a file lists."""
    if not isinstance(entries, dict):
        raise UsageError(f"{path}: channels: give those kept by group, as 0-3,7")
    sizes = {group.name: group.size for group in find_groups(network).groups} if entries else {}
    return {name: _indices(f"{path}: channels of '{name}'", text, sizes.get(name)) for name, text in entries.items()}


def _indices(where: str, text: Any, size: int | None) -> tuple[int, ...]:
    """What `_ranges` wrote, edited or not, of a group of so many; None where there is no such group."""
    if size is None:
        raise UsageError(f"{where}: no such group; see onnx-kfe inspect --groups")
    found: set[int] = set()
    for part in str(text).split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part, re.ASCII)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise UsageError(f"{where}: {text!r}: write the channels kept as 0-3,7")
        if int(last := match[2] or match[1]) >= size:
            raise UsageError(f"{where}: {last} is not one of 0 to {size - 1}")
        found.update(range(int(match[1]), int(last) + 1))
    return tuple(sorted(found))


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
    loss = entry.get("predicted_loss") if isinstance(entry, dict) else None
    known = float(loss) if isinstance(loss, int | float) else math.nan
    if form == DENSE and layer.geometry is not None:
        return Candidate(DENSE, (), layer_cost(layer), 0.0 if math.isnan(known) else known)
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
    return Candidate(form, tuple(ranks), layer_cost(layer, partial(FORMS[form].cost, ranks=ranks)), known)


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
