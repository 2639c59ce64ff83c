"""Where the units of channel groups live in the parameters of a module, and what schedules do to them there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor, nn

from onnx_kfe.graph import ChannelGroup, ChannelGroups, Network, find_groups
from onnx_kfe.graph.groups import Site
from onnx_kfe.recovery.training._onnx_module import OnnxModule

__all__ = ["Place", "Units", "find_units"]

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Place:
    """An axis of a parameter along which units lie.

    Attributes:
        parameter: The parameter.
        axis: The axis.
        units: For each index of the axis its unit, -1 where there is none.
        own: Whether the weights there are the units' own: what norms, decay and shrinking are of.
    """

    parameter: nn.Parameter
    axis: int
    units: Tensor
    own: bool

    def spread(self, values: Tensor, rest: float) -> Tensor:
        """A value ``[size]`` for each unit in a shape that broadcasts to the parameter; `rest` for what is of none."""
        units = self.units.to(values.device)
        along = torch.where(units >= 0, values[units.clamp_min(0)], rest)
        return along.reshape([-1 if axis == self.axis else 1 for axis in range(self.parameter.ndim)])


@dataclass(frozen=True, eq=False)
class Units:
    """The units of one group, some of which are to go.

    A unit's own weights are the rows that compute it; in a model of chains those of the core, rows or columns. All that
    goes with a unit is more: what reads it, biases, scales.

    Attributes:
        name: Name of the group.
        size: Number of units.
        target: How many are to go.
        places: Where they live.
    """

    name: str
    size: int
    target: int
    places: tuple[Place, ...]

    @torch.no_grad()
    def norms(self, order: int) -> Numbers:
        """L1 or L2 norms ``[size]`` of the units' own weights, as `order` says."""
        total = torch.zeros(self.size, dtype=torch.float64)
        for place in self._own:
            powers = place.parameter.detach().double().abs() ** order
            along = powers.sum([axis for axis in range(powers.ndim) if axis != place.axis]).cpu()
            known = place.units >= 0
            total.index_add_(0, place.units[known], along[known])
        return (total ** (1 / order)).numpy()

    @torch.no_grad()
    def scale(self, factors: Numbers) -> None:
        """Multiply the units' own weights by a factor ``[size]`` each."""
        for place in self._own:
            place.parameter.mul_(place.spread(_like(factors, place), 1.0))

    @torch.no_grad()
    def zero(self, kept: npt.NDArray[np.bool_]) -> None:
        """Set all that goes with the other units to zero, rows and columns."""
        for place in self.places:
            place.parameter.mul_(place.spread(_like(kept, place), 1.0))

    @property
    def _own(self) -> list[Place]:
        return [place for place in self.places if place.own]


def find_units(
    network: Network, module: OnnxModule, targets: Mapping[str, int], cores: Collection[str] = ()
) -> list[Units]:
    """Find the units of channel groups in a module.

    A constant that other nodes read otherwise is left out: it gets a copy when channels are removed.

    Args:
        network: The network.
        module: What `to_torch` made of its model.
        targets: How many units are to go, by name of the group; groups that lose none are left out.
        cores: Names of the layers that are cores of chains.
    """
    found = find_groups(network)
    parameters = {
        module.initializer_names[key]: parameter
        for key, parameter in module.named_parameters()
        if key in module.initializer_names
    }
    return [
        Units(group.name, group.size, targets[group.name], tuple(_places(found, group, parameters, cores)))
        for group in found.groups
        if targets.get(group.name, 0) > 0
    ]


def _places(
    groups: ChannelGroups, group: ChannelGroup, parameters: Mapping[str, nn.Parameter], cores: Collection[str]
) -> Iterator[Place]:
    owning = {member.layer for member in group.members if member.layer in cores}
    rows = {member.layer for member in group.members if member.side == "rows"}
    by_place: defaultdict[tuple[ir.Value, int], list[Site]] = defaultdict(list)
    for site in groups.sites:
        value = site.node.inputs[site.place] if isinstance(site.place, int) else None
        if value is not None and site.axis is not None and value.name in parameters:
            by_place[value, site.axis].append(site)
    for (value, axis), sites in by_place.items():
        units = groups.units(group.name, sites[0].ids)
        if np.all(units < 0) or not _alike(value, units, [groups.units(group.name, site.ids) for site in sites]):
            continue
        node = sites[0].node
        computes = node.name in rows and sites[0].place == 1 and axis == _row_axis(node)
        own = node.name in owning and sites[0].place == 1 if owning else computes
        yield Place(parameters[value.name or ""], axis, torch.from_numpy(units), own)


def _alike(value: ir.Value, units: np.ndarray, found: Sequence[np.ndarray]) -> bool:
    """Whether all nodes that read a constant read the same units of it."""
    return len(value.uses()) == len(found) and all(np.array_equal(units, other) for other in found)


def _row_axis(node: ir.Node) -> int:
    """The axis of output channels in the weight of a linear node, as it is stored."""
    if node.op_type == "Gemm":
        return 1 - node.attributes.get_int("transB", 0)
    if node.op_type == "MatMul":
        weight = node.inputs[1]
        assert weight is not None
        assert weight.const_value is not None
        return len(weight.const_value.shape) - 1
    return 1 if node.op_type == "ConvTranspose" else 0


def _like(values: npt.NDArray[np.float64] | npt.NDArray[np.bool_], place: Place) -> Tensor:
    return torch.from_numpy(np.asarray(values, np.float64)).to(place.parameter)
