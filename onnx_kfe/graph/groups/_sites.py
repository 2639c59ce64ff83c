"""Where coordinates come to bear: the constants and attributes that change when some go, and the linear nodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_kfe.graph.groups._coordinates import Ids

__all__ = ["Constant", "Keep", "Linear", "Site"]

Constant = npt.NDArray[Any]
Keep = Callable[[Ids], npt.NDArray[np.bool_]]
"""Which coordinates are kept, `STAYS` among them."""


@dataclass(frozen=True)
class Site:
    """Something of a node that changes when coordinates go.

    Attributes:
        node: The node.
        place: The index of a constant input, or the name of an attribute of integers.
        ids: The coordinates that it depends on.
        edit: `(what is there now, which are kept) -> what is to be there`; None for nothing.
        axis: The axis of a constant that loses the indices of coordinates that go; None where it is edited otherwise.
    """

    node: ir.Node
    place: int | str
    ids: Ids
    edit: Callable[[Constant | None, Keep], Constant | None]
    axis: int | None = None


@dataclass(frozen=True)
class Linear:
    """Coordinates at a linear node.

    Attributes:
        rows: Those of the output channels ``[out]``.
        columns: Those of the input channels ``[in]``.
        groups: Groups of a convolution; 1 otherwise.
        weighted: Whether the weight is a constant.
    """

    rows: Ids
    columns: Ids
    groups: int = 1
    weighted: bool = True

    @property
    def sides(self) -> tuple[tuple[Literal["rows", "columns"], Ids], ...]:
        """The coordinates of both sides."""
        return ("rows", self.rows), ("columns", self.columns)

    @property
    def depthwise(self) -> bool:
        """Whether each group reads a single channel."""
        return self.groups > 1 and self.groups == len(self.columns)
