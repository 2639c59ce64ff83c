"""Products of heads: channels between two layers that any change of their basis leaves what they are.

An attention head multiplies queries and keys over its channels, and mixes the positions of its values, not their
channels. So any invertible R of a head may go into the one layer, if its inverse goes into the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from onnx_kfe.graph._network import Network
from onnx_kfe.graph.groups._coordinates import Ids
from onnx_kfe.graph.groups._groups import ChannelGroup, ChannelGroups
from onnx_kfe.graph.groups._tracing import Channels, End, Tracing

__all__ = ["Product", "Products", "find_products"]


@dataclass(frozen=True, eq=False)
class Product:
    """Heads whose channels may be given in any basis, those of each head in the order of the group's units.

    Attributes:
        group: Name of the channel group that their channels are of.
        first: The layer that computes the channels, with those of each head ``[heads, d]``: queries, or values.
        second: The same of the layer that computes what they are multiplied by (keys), or of the input channels of the
            layer that reads them.
        read: Whether the second reads them.
    """

    group: str
    first: Channels
    second: Channels
    read: bool


class Products(NamedTuple):
    """What `find_products` finds.

    Attributes:
        found: The products.
        declined: By name of the group why channels that meet in a product of computed values are in none.
    """

    found: tuple[Product, ...]
    declined: dict[str, str]


def find_products(network: Network, groups: ChannelGroups) -> Products:
    """Find the heads of attention whose channels a change of basis leaves what they are.

    Query and key: two layers whose channels are summed over in a MatMul. Value and output: a layer that computes
    channels and one that reads them, positions mixed in between or not. On the way there may be a bias right behind a
    MatMul, numbers that scale everything, and what moves elements. Rotary positions, normalisation of queries or keys,
    activations, and heads that share keys decline, as do layers of which several nodes share the weight.

    Args:
        network: The network.
        groups: Its channel groups; channels of a group that cannot be pruned are left alone.
    """
    tracing = Tracing(network)
    prunable = [group for group in groups.groups if group.prunable]
    found = [
        product
        for end in tracing.ends
        if not any((side.layer, place) in tracing.stops for side in _computed(end) for place in side.places.flat)
        for product in _within(prunable, end)
    ]
    declined = {}
    for group in prunable:
        if groups.multiplied(group.name):
            owners = {
                (member.layer, place)
                for member in group.members
                if member.side == "rows"
                for place in np.flatnonzero(member.units >= 0).tolist()
            }
            # the first in the graph: behind it, what it was to meet is stopped in turn
            reason = next((reason for owner, reason in tracing.stops.items() if owner in owners), None)
            if reason is not None:
                declined[group.name] = reason
    return Products(tuple(found), declined)


def _computed(end: End) -> list[Channels]:
    return [end.first] if end.read else [end.first, end.second]


def _within(groups: list[ChannelGroup], end: End) -> Iterator[Product]:
    """The product of an end, where all of its channels are units of one group, and no two of a head the same."""
    for group in groups:
        units = next(
            (each.units for each in group.members if (each.layer, each.side) == (end.first.layer, "rows")), None
        )
        if units is None:
            continue
        own: Ids = units[end.first.places]
        order = np.argsort(own, axis=1)
        if np.all(own >= 0) and np.all(np.diff(np.take_along_axis(own, order, 1)) > 0):
            first, second = (Channels(side.layer, np.take_along_axis(side.places, order, 1)) for side in end[:2])
            yield Product(group.name, first, second, end.read)
