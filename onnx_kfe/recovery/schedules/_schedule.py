"""What pruning schedules have in common: hidden weights that are trained, and what of them the model shows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from onnx_kfe.errors import KfeError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from onnx_kfe.recovery.schedules._units import Units

__all__ = ["SCHEDULES", "Numbers", "Schedule", "find_schedule", "schedule"]

Numbers = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


class Schedule(ABC):
    """Decides while a model is trained which units of each group go; in the end exactly the planned number has gone.

    The optimizer steps *hidden* weights. What the model computes with, and its gradients are taken at, are *shown*
    weights: the hidden ones times a factor for each unit (`factors`). A `Hook` of the trainer.

    Args:
        units: The groups.
        seed: Of what is drawn.

    Raises:
        KfeError: A group would lose all of its units, or has none in the model.
    """

    name: ClassVar[str]
    """As the user types it."""
    remembered: ClassVar[tuple[str, ...]] = ("gone",)
    """Attributes that are lists of arrays ``[size]`` by group, all that there is to know besides the weights."""

    def __init__(self, units: Sequence[Units], seed: int) -> None:
        if bad := next((each.name for each in units if not each.places or each.target >= each.size), None):
            raise KfeError(f"channel group '{bad}' cannot be pruned by a schedule")
        self.units, self.seed = list(units), seed
        self.gone: list[Mask] = [np.zeros(each.size, np.bool_) for each in units]
        self.identity = f"{self.name} {seed} {[(each.name, each.size, each.target) for each in units]}"
        self._parameters = list({id(p.parameter): p.parameter for each in units for p in each.places}.values())
        self._hidden: list[Tensor] | None = None

    @abstractmethod
    def advance(self, step: int, steps: int) -> None:
        """Take note of the hidden weights after a step, and decide which units go for good."""

    @abstractmethod
    def factors(self, place: int, step: int) -> Numbers:
        """Factors ``[size]`` of the units of the group at this place in the list, until the next step is done."""

    @abstractmethod
    def order(self, place: int) -> Numbers:
        """Numbers ``[size]`` by which the units that are left at the end go, the smallest first."""

    def show(self, units: Units, factors: Numbers) -> None:
        """Turn hidden weights of a group into shown ones: a unit of factor 0 goes with all that belongs to it."""
        units.scale(factors)
        units.zero(factors > 0)

    def after_backward(self, step: int, steps: int) -> None:
        """Have the optimizer step the hidden weights; see `Hook`."""
        self._restore()

    def after_step(self, step: int, steps: int) -> None:
        """Decide, and show what is left; see `Hook`."""
        self.advance(step, steps)
        self._hidden = [parameter.detach().clone() for parameter in self._parameters]
        for place, units in enumerate(self.units):
            self.show(units, self.factors(place, step))

    def finish(self) -> None:
        """Let go of the units that are still to go, and leave of each only zeros."""
        self._restore()
        for place, gone in enumerate(self.gone):
            order = np.where(gone, np.inf, self.order(place))
            gone[np.argsort(order, kind="stable")[: self.to_go(place)]] = True
        for place, units in enumerate(self.units):
            units.scale(self.final(place))
        for gone, units in zip(self.gone, self.units, strict=True):
            units.zero(~gone)

    def final(self, place: int) -> Numbers:
        """Factors ``[size]`` of the hidden weights in the end; 1 by default."""
        return np.ones(self.units[place].size)

    def kept(self) -> dict[str, Mask]:
        """Which units are kept, by name of the group."""
        return {units.name: ~gone for units, gone in zip(self.units, self.gone, strict=True)}

    def to_go(self, place: int) -> int:
        """How many units of a group are still to go."""
        return self.units[place].target - int(self.gone[place].sum())

    def state(self) -> dict[str, Tensor]:
        """What it remembers; see `Hook`."""
        import torch

        arrays = {f"{name}.{n}": array for name in self.remembered for n, array in enumerate(getattr(self, name))}
        hidden = {f"hidden.{n}": tensor.cpu().contiguous() for n, tensor in enumerate(self._hidden or ())}
        return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()} | hidden

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state; see `Hook`."""
        for name in self.remembered:
            setattr(self, name, [state[f"{name}.{n}"].numpy().copy() for n in range(len(self.units))])
        if "hidden.0" in state:
            self._hidden = [state[f"hidden.{n}"].to(p.device) for n, p in enumerate(self._parameters)]

    def _restore(self) -> None:
        """Put the hidden weights in the place of what is shown."""
        if self._hidden is not None:
            for parameter, hidden in zip(self._parameters, self._hidden, strict=True):
                parameter.data.copy_(hidden)
            self._hidden = None


SCHEDULES: dict[str, type[Schedule]] = {}
"""By name, as the user gives it."""


def schedule(name: str) -> Callable[[type[Schedule]], type[Schedule]]:
    """Register a schedule under a name."""

    def register(kind: type[Schedule]) -> type[Schedule]:
        kind.name = name
        SCHEDULES[name] = kind
        return kind

    return register


def find_schedule(name: str) -> type[Schedule]:
    """A schedule by name.

    Raises:
        UsageError: There is no such schedule.
    """
    if name not in SCHEDULES:
        raise UsageError(f"--schedule {name}: it can be {', '.join(SCHEDULES)}")
    return SCHEDULES[name]
