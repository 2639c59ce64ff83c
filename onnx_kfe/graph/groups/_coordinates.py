"""Coordinates: the indices of axes that have to go together, and why some have to stay."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["STAYS", "Coordinates", "Ids"]

Ids = npt.NDArray[np.int64]
"""For each index of an axis its coordinate, or `STAYS`."""

STAYS = -1
"""In the place of a coordinate: an index that nothing removes."""


class Coordinates:
    """A union-find over coordinates; a set of united coordinates is a unit, named by one of them, its root."""

    def __init__(self) -> None:
        self._parents: list[int] = []
        self._reasons: dict[int, str] = {}  # by root

    def __len__(self) -> int:
        return len(self._parents)

    def fresh(self, count: int) -> Ids:
        """New coordinates, each a unit of its own."""
        first = len(self._parents)
        self._parents.extend(range(first, first + count))
        return np.arange(first, first + count)

    def roots(self, ids: Ids) -> Ids:
        """The unit of each coordinate, `STAYS` where there is none."""
        roots = [each if each == STAYS else self._root(each) for each in ids.reshape(-1).tolist()]
        return np.array(roots, np.int64).reshape(ids.shape)

    def unite(self, first: Ids | None, second: Ids | None, reason: str) -> None:
        """Make units of the coordinates that two axes of the same size have at the same index.

        Args:
            first: Coordinates ``[n]``, None where all stay.
            second: The same of the other axis.
            reason: Why a coordinate stays that meets an index that stays.
        """
        if first is None or second is None:
            self.freeze(second if first is None else first, reason)
            return
        for one, other in zip(first.tolist(), second.tolist(), strict=True):
            if one == STAYS or other == STAYS:
                self._freeze(max(one, other), reason)
            else:
                self._unite(one, other)

    def freeze(self, ids: Ids | None, reason: str) -> None:
        """Have the units of coordinates stay; the first reason that is given counts."""
        for each in () if ids is None else np.unique(ids).tolist():
            self._freeze(each, reason)

    def reason(self, root: int) -> str | None:
        """Why a unit stays; None where it may go."""
        return self._reasons.get(root)

    def _unite(self, one: int, other: int) -> None:
        kept, gone = sorted((self._root(one), self._root(other)))
        if kept == gone:
            return
        self._parents[gone] = kept
        reason = self._reasons.pop(gone, None)
        if reason is not None:
            self._reasons.setdefault(kept, reason)

    def _freeze(self, coordinate: int, reason: str) -> None:
        if coordinate != STAYS:
            self._reasons.setdefault(self._root(coordinate), reason)

    def _root(self, coordinate: int) -> int:
        parents = self._parents
        while parents[coordinate] != coordinate:
            parents[coordinate] = parents[parents[coordinate]]
            coordinate = parents[coordinate]
        return coordinate
