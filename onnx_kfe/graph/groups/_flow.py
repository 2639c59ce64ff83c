"""What a rule is given: the coordinates of every value so far, and the places that change when coordinates go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnx_kfe.graph.groups._coordinates import STAYS, Coordinates, Ids
from onnx_kfe.graph.groups._sites import Constant, Keep, Linear, Site

__all__ = ["Axes", "Declined", "Flow", "Size", "constant_of", "integers", "operand"]

Axes = Sequence[Ids | None]
"""For each axis of a value its coordinates ``[size]``, None where all indices stay."""

Size = Ids | int | None
"""What a graph computes with as a shape: the size of the axis that has these coordinates, a constant, or unknown."""


class Declined(Exception):
    """A rule cannot tell what removing coordinates does to this node; the message continues the name of the node."""


class Flow:
    """Coordinates on their way through a graph.

    Args:
        opset: Version of the ONNX operators.
        shapes: Concrete shapes by the name of the value.
        others: The same for an input whose free axes have other sizes.
        unselected: Reason by the name of layers that are to stay as they are.
    """

    def __init__(
        self,
        opset: int,
        shapes: Mapping[str, tuple[int, ...]],
        others: Mapping[str, tuple[int, ...]],
        unselected: Mapping[str, str],
    ) -> None:
        self.opset = opset
        self.coordinates = Coordinates()
        self.sites: list[Site] = []
        self.linear: dict[str, Linear] = {}
        self.sizes: dict[ir.Value, Sequence[Size]] = {}
        self.values: dict[ir.Value, Axes] = {}
        self._shapes, self._others = shapes, others
        self._unselected = unselected
        self._weights: dict[ir.Value, tuple[ir.Node, Linear]] = {}

    def shape(self, value: ir.Value) -> tuple[int, ...]:
        """The concrete shape of a value.

        Raises:
            Declined: It is not known.
        """
        if value.const_value is not None:
            return tuple(value.const_value.shape.numpy())
        if (value.name or "") not in self._shapes:
            raise Declined(f"meets '{value.name}', whose shape is unknown")
        return self._shapes[value.name or ""]

    def fixed(self, value: ir.Value) -> set[int]:
        """The axes of a value that have the same size for all inputs."""
        name = value.name or ""
        declared = {axis for axis, size in enumerate(value.shape or ()) if isinstance(size, int)}
        sizes = zip(self._shapes.get(name, ()), self._others.get(name, ()), strict=False)
        return declared | {axis for axis, (size, other) in enumerate(sizes) if size == other}

    def axes(self, value: ir.Value) -> Axes:
        """The coordinates of a value."""
        return self.values[value] if value in self.values else (None,) * len(self.shape(value))

    def assign(self, value: ir.Value, axes: Axes) -> None:
        """Set the coordinates of a value, where there are any."""
        axes = [None if ids is None or np.all(ids == STAYS) else ids for ids in axes]
        if any(ids is not None for ids in axes):
            self.values[value] = axes

    def freeze(self, node: ir.Node, ids: Ids | None, what: str) -> None:
        """Have coordinates stay because of a node; `what` continues its name."""
        self.coordinates.freeze(ids, f"{node.op_type} '{node.name}' {what}")

    def unite(self, node: ir.Node, first: Ids | None, second: Ids | None) -> None:
        """Tie the coordinates of two axes that meet in a node."""
        self.coordinates.unite(first, second, f"{node.op_type} '{node.name}' ties it to channels that stay")

    def join(self, node: ir.Node, places: Iterable[tuple[int, int]]) -> Ids | None:
        """The coordinates of axes of inputs that meet, given as input and axis: tied, or trimmed from constants."""
        met = [(place, axis, operand(node, place)) for place, axis in places]
        computed = [self.axes(value)[axis] for _, axis, value in met if constant_of(value) is None]
        tracked = next((ids for ids in computed if ids is not None), None)
        if tracked is None:
            return None
        for ids in computed:
            self.unite(node, tracked, ids)
        for place, axis, value in met:
            if constant_of(value) is not None:
                self.trim(node, place, axis, tracked)
        return tracked

    def trim(self, node: ir.Node, place: int, axis: int, ids: Ids | None) -> None:
        """Have a constant input lose the indices of an axis whose coordinates go."""
        if ids is None:
            return
        if operand(node, place).is_graph_output():
            self.freeze(node, ids, f"reads a graph output '{operand(node, place).name}'")
        self.edit(node, place, ids, lambda array, keep: np.compress(keep(ids), _there(array), axis), axis)

    def edit(
        self,
        node: ir.Node,
        place: int | str,
        ids: Ids,
        edit: Callable[[Constant | None, Keep], Constant | None],
        axis: int | None = None,
    ) -> None:
        """Note a site; see `Site`."""
        self.sites.append(Site(node, place, ids, edit, axis))

    def count(self, node: ir.Node, place: int | str, entries: Mapping[int, Ids | None], of: Axes = ()) -> None:
        """Have entries of integers, at an input or in an attribute, be the number of coordinates that are kept.

        Args:
            node: The node.
            place: As in `Site`.
            entries: What to count by the index of the entry; None to leave it.
            of: The axes that are counted parts of; the entries stand for themselves by default.
        """
        counted = {entry: ids for entry, ids in entries.items() if ids is not None}
        if not counted:
            return

        def edit(sizes: Constant | None, keep: Keep) -> Constant:
            changed = _there(sizes).copy()
            for entry, ids in counted.items():
                changed[entry] = keep(ids).sum()
            return changed

        self.edit(node, place, np.concatenate([ids for ids in of or counted.values() if ids is not None]), edit)

    def follow(self, node: ir.Node, place: int, axes: Mapping[int, Ids | None]) -> None:
        """Tie axes to those whose sizes a node is given for them, so that both change alike.

        Args:
            node: The node.
            place: The input that gives computed sizes.
            axes: The axes by the index of the entry.

        Raises:
            Declined: An entry is no such size.
        """
        entries = self.sizes.get(operand(node, place), ())
        for entry, ids in axes.items():
            size = entries[entry] if entry < len(entries) else None
            if ids is not None and not (isinstance(size, np.ndarray) and len(size) == len(ids)):
                raise Declined("is given a computed size of it")
            self.unite(node, ids, size if isinstance(size, np.ndarray) else ids)

    def add_linear(self, node: ir.Node, linear: Linear) -> None:
        """Note a linear node; nodes that share a weight are tied, and those that are not selected stay."""
        name = node.name or ""
        self.linear[name] = linear
        if name in self._unselected:
            for _, ids in linear.sides:
                self.coordinates.freeze(ids, self._unselected[name])
        if not linear.weighted:
            return
        weight = operand(node, 1)
        for other, place in weight.uses():
            if other.op_type != node.op_type or place != 1:
                reason = f"weight '{weight.name}' is shared with {other.op_type} '{other.name}'"
                self.coordinates.freeze(linear.rows, reason)
                self.coordinates.freeze(linear.columns, reason)
        first, shared = self._weights.setdefault(weight, (node, linear))
        alike = all(node.attributes.get(name) == first.attributes.get(name) for name in ("transB", "group"))
        for one, other_ids in ((linear.rows, shared.rows), (linear.columns, shared.columns)):
            if alike and len(one) == len(other_ids):
                self.unite(node, one, other_ids)
            else:
                self.freeze(node, one, "reads a weight in another way than others do")
                self.freeze(node, other_ids, "reads a weight in another way than others do")


def constant_of(value: ir.Value | None) -> Constant | None:
    """What an initializer holds, as it is stored; None for anything else."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def integers(node: ir.Node, place: int, name: str) -> Constant | None:
    """Integers that are an attribute in old versions of an operator and an input in new ones; None if not constant."""
    given = node.attributes.get_ints(name)
    if given is not None:
        return np.array(given)
    return constant_of(node.inputs[place]) if len(node.inputs) > place else None


def operand(node: ir.Node, index: int) -> ir.Value:
    """An input that the operator cannot do without."""
    value = node.inputs[index]
    assert value is not None
    return value


def _there(array: Constant | None) -> Constant:
    assert array is not None
    return array
