"""What a schedule works on: a graph whose channel groups have the units, and how many of each are to go."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_kfe.calibration import Statistics
from onnx_kfe.graph import Geometry, Network, find_groups, open_network
from onnx_kfe.kfe import Array, channel_covariance
from onnx_kfe.planning import DirectionChain, Directions, LayerProblem, Plan
from onnx_kfe.rewrite import Chain, ChannelPass, FactorizePass, Merge, MergePass, is_smaller, write_chains

__all__ = ["Subject", "of_channels", "of_directions"]

_DAMPING = 0.05  # of the mean eigenvalue, so that no direction is scaled by more than about four


@dataclass(frozen=True)
class Subject:
    """A graph to be trained and pruned.

    Attributes:
        network: Its network.
        plan: How much is to go.
        targets: How many units are to go, by name of the channel group.
        cores: The layers that are cores of chains.
        chained: The layers that became chains.
    """

    network: Network
    plan: Plan
    targets: dict[str, int]
    cores: frozenset[str] = frozenset()
    chained: tuple[str, ...] = field(default=())

    def without(self, model: ir.Model, kept: Mapping[str, npt.NDArray[np.bool_]]) -> tuple[ir.Model, Plan]:
        """The trained model without the units that go, and the plan that it is of.

        Stages of chains that cost less as one become one, so that a chain that does not pay is a dense layer again.

        Args:
            model: The trained model of the network.
            kept: Which units ``[size]`` are kept, by name of the group.
        """
        left = ChannelPass(self.network, kept)(model.clone()).model
        left = MergePass(self._pays)(left).model if self.chained else left
        plan = self.plan
        if not self.chained:
            plan = replace(plan, compensates=False, channels={
                name: tuple(map(int, np.flatnonzero(mask))) for name, mask in kept.items()
            })  # fmt: skip
        return write_chains(dataclasses.replace(self.network, model=left), plan, None, {}), plan

    def _pays(self, merge: Merge) -> bool:
        names = (merge.first.name or "", merge.second.name or "")
        return is_smaller(merge) and all(any(name.startswith(each) for each in self.chained) for name in names)


def of_channels(network: Network, plan: Plan) -> Subject:
    """The network itself, of which a plan keeps fewer channels."""
    masks = plan.masks(find_groups(network))
    return Subject(network, plan, {name: int((~mask).sum()) for name, mask in masks.items()})


def of_directions(network: Network, statistics: Statistics, plan: Plan, form: DirectionChain) -> Subject:
    """The network with chains of full rank in the place of the layers of which a plan keeps fewer directions.

    Its outputs are the same. In the cores, directions are scaled by the square roots of their eigenvalues, so that the
    square of a norm there is EigenDamage's importance of the direction.

    Args:
        network: The network.
        statistics: Their eigenbases.
        plan: The ranks.
        form: What the plan was made for.
    """
    layers = {layer.name: layer for layer in network.layers}
    chains: dict[str, Chain] = {}
    targets: dict[str, int] = {}
    cores = set()
    for name, choice in plan.changed.items():
        problem = LayerProblem(layers[name], statistics.layers[name])
        stages = form.written(_full_rank(problem, form), problem.geometry)
        chains[name] = Chain(layers[name], form.name, stages, problem.bias(problem.weight))
        stem = f"{name}/{form.name}_"
        targets |= {f"{stem}{n}": count for n, count in enumerate(_targets(problem.geometry, choice.ranks))}
        cores.add(f"{stem}{_core(problem.geometry)}")
    model = FactorizePass(chains)(network.model.clone()).model
    inner = open_network(model, input_shapes=network.input_shapes)
    chained = tuple(f"{name}/{form.name}_" for name in chains)
    return Subject(inner, plan, {name: n for name, n in targets.items() if n}, frozenset(cores), chained)


def _targets(geometry: Geometry, ranks: tuple[int, ...]) -> list[int]:
    """How many directions are to go between each stage of a chain and the next."""
    inside, outside = ranks
    if geometry.taps == 1:
        return [min(geometry.in_channels, geometry.out_channels) - min(ranks)]
    return [geometry.in_channels - inside, geometry.out_channels - outside]


def _core(geometry: Geometry) -> int:
    """The stage that is the core or, where the kernel is 1 wide, has become one with it."""
    return 1 if geometry.taps > 1 or geometry.in_channels <= geometry.out_channels else 0


def _full_rank(problem: LayerProblem, form: DirectionChain) -> Directions:
    (found,) = problem.coordinates("kfe", published=form.published)
    inside = _scales(np.diag(channel_covariance(found.input_factor, problem.geometry.taps)))
    outside = _scales(np.diag(found.output_factor))
    core = (found.weight * outside[:, None, None] * inside[:, None]).reshape(problem.weight.shape[1:])
    return Directions(found.input_basis.T / inside[:, None], core, found.output_basis / outside)


def _scales(eigenvalues: Array) -> Array:
    """Square roots of eigenvalues relative to their mean, damped."""
    mean = max(float(eigenvalues.mean()), np.finfo(np.float64).tiny)
    return np.sqrt(np.maximum(eigenvalues, 0.0) / mean + _DAMPING)
