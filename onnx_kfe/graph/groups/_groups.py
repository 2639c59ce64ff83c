"""Groups of channels that touch the same places, and what layers keep when some of them go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from onnx_kfe.errors import UsageError
from onnx_kfe.graph._layers import Geometry
from onnx_kfe.graph.groups._coordinates import STAYS, Ids
from onnx_kfe.graph.groups._sites import Keep, Linear, Site

__all__ = ["ChannelGroup", "ChannelGroups", "LayerCut", "Mask", "Member"]

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Member:
    """Where a layer has channels of a group.

    Attributes:
        layer: Name of the layer, whose weight is a constant.
        side: Whether the layer computes the channels (rows) or reads them (columns).
        units: For each output channel (rows) or input channel (columns) the unit of the group, -1 where there is none.
    """

    layer: str
    side: Literal["rows", "columns"]
    units: Ids


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Units that touch the same places. A unit is a set of channels, of one or more layers, that only go together.

    Attributes:
        name: That of the first layer that computes it, numbered where that begins several groups.
        size: Number of units.
        members: The layers that compute and read it, in graph order.
        reason: Why no unit can go; None where all but one can.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    reason: str | None

    @property
    def prunable(self) -> bool:
        """Whether units can go."""
        return self.reason is None


@dataclass(frozen=True, eq=False)
class LayerCut:
    """What is left of a linear layer.

    Attributes:
        rows: Which output channels ``[out]`` are kept.
        columns: Which input channels ``[in]`` are kept.
        groups: Groups of the convolution that is left; 1 for other layers.
    """

    rows: Mask
    columns: Mask
    groups: int

    def geometry(self, whole: Geometry) -> Geometry:
        """The shape of what is left of a layer of a shape."""
        return replace(
            whole, in_channels=int(self.columns.sum()), out_channels=int(self.rows.sum()), groups=self.groups
        )  # fmt: skip

    def within(self, earlier: LayerCut) -> LayerCut:
        """Both cuts as one of the whole layer, this one of what the earlier left."""
        rows, columns = earlier.rows.copy(), earlier.columns.copy()
        rows[earlier.rows], columns[earlier.columns] = self.rows, self.columns
        return LayerCut(rows, columns, self.groups)


@dataclass(frozen=True, eq=False)
class ChannelGroups:
    """All groups of a network.

    Attributes:
        groups: The groups, in graph order.
        sites: What changes in the graph when coordinates go.
    """

    groups: tuple[ChannelGroup, ...]
    sites: tuple[Site, ...] = field(repr=False)
    _linear: Mapping[str, Linear] = field(repr=False)
    _roots: Ids = field(repr=False)  # of each coordinate
    _units: Mapping[str, Ids] = field(repr=False)  # the roots of each group

    def keep(self, kept: Mapping[str, Mask]) -> Keep:
        """Which coordinates are kept.

        Args:
            kept: Which units ``[size]`` are kept, by the name of the group; other groups are kept whole.

        Raises:
            UsageError: A group that there is not, that cannot be pruned, or of which nothing would be kept.
        """
        groups = {group.name: group for group in self.groups}
        left = np.ones(len(self._roots), bool)
        for name, mask in kept.items():
            if name not in groups:
                raise UsageError(f"there is no channel group '{name}'; see onnx-kfe inspect --groups")
            if len(mask) != groups[name].size:
                raise UsageError(f"channel group '{name}' has {groups[name].size} channels, not {len(mask)}")
            reason = groups[name].reason
            if reason is not None and not np.all(mask):
                raise UsageError(f"channel group '{name}' cannot be pruned: {reason}")
            if not np.any(mask):
                raise UsageError(f"nothing would be kept of channel group '{name}'")
            left[self._units[name]] = mask
        kept_coordinates = left[self._roots]
        return lambda ids: np.where(ids == STAYS, True, kept_coordinates[ids])

    def units(self, name: str, ids: Ids) -> Ids:
        """For each coordinate the unit of a group, -1 where it is of none."""
        index = np.full(len(self._roots) + 1, STAYS)  # the last for coordinates that stay
        index[self._units[name]] = np.arange(len(self._units[name]))
        return index[np.append(self._roots, STAYS)[ids]]

    def multiplied(self, name: str) -> bool:
        """Whether channels of a group pass through a product of computed values."""
        products = (each for each in self._linear.values() if not each.weighted)
        return any(np.any(self.units(name, ids) >= 0) for each in products for _, ids in each.sides)

    def cut(self, kept: Mapping[str, Mask]) -> dict[str, LayerCut]:
        """What is left of every linear layer of the network, by name, where only some units are kept.

        Args:
            kept: Which units ``[size]`` are kept, by the name of the group; other groups are kept whole.

        Raises:
            UsageError: A group that there is not, that cannot be pruned, or of which nothing would be kept.
        """
        keep = self.keep(kept)
        return {name: _cut(linear, keep) for name, linear in self._linear.items()}


def _cut(linear: Linear, keep: Keep) -> LayerCut:
    columns = keep(linear.columns)
    return LayerCut(keep(linear.rows), columns, int(columns.sum()) if linear.depthwise else linear.groups)
