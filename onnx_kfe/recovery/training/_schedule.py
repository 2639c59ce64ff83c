"""Learning rate schedules: what share of its peak the learning rate is at, by step."""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["SCHEDULES", "constant", "cosine", "one_cycle"]

_SHORT_WARM_UP = 0.05
_LONG_WARM_UP = 0.3


def cosine(step: int, steps: int) -> float:
    """A short warm-up, then half a cosine from 1 to 0 (Loshchilov and Hutter, ICLR 2017, without restarts).

    Args:
        step: Number of the step, from 0.
        steps: Steps in all.
    """
    return _rise_and_fall(step, steps, _SHORT_WARM_UP)


def one_cycle(step: int, steps: int) -> float:
    """Up for three tenths of the steps, then half a cosine from 1 to 0 (after Smith and Topin, 2018).

    Args:
        step: Number of the step, from 0.
        steps: Steps in all.
    """
    return _rise_and_fall(step, steps, _LONG_WARM_UP)


def constant(step: int, steps: int) -> float:
    """The same short warm-up, then 1: for what goes on to change until the last step, as it is pruned.

    Args:
        step: Number of the step, from 0.
        steps: Steps in all.
    """
    return min((step + 1) / (math.ceil(_SHORT_WARM_UP * steps) + 1), 1.0)


def _rise_and_fall(step: int, steps: int, warm_up: float) -> float:
    rising = math.ceil(warm_up * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    return (1 + math.cos(math.pi * (step - rising) / max(steps - rising, 1))) / 2


SCHEDULES: dict[str, Callable[[int, int], float]] = {"one-cycle": one_cycle, "cosine": cosine, "constant": constant}
"""By name: the share of the peak from number of the step and of steps."""
