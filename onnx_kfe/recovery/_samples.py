"""Positions of a layer, sampled from both models: the inputs that it now gets and the outputs that are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Activation", "Block", "Samples"]


@dataclass(frozen=True)
class Activation:
    """A clipping activation: ReLU, Clip, or none.

    Attributes:
        low: What is below becomes this.
        high: And what is above this.
    """

    low: float = -np.inf
    high: float = np.inf

    def reachable(self, wanted: np.ndarray, given: np.ndarray) -> np.ndarray:
        """The values nearest to the given ones that the activation maps to what it makes of the wanted ones.

        Least squares towards them bounds the squared error behind the activation, and spends nothing on values that
        the activation clips anyway (after Zhang et al., "Accelerating very deep convolutional networks", 2016).
        """
        target = wanted
        if self.low > -np.inf:
            target = np.where(wanted <= self.low, np.minimum(given, self.low), target)
        if self.high < np.inf:
            target = np.where(wanted >= self.high, np.maximum(given, self.high), target)
        return target


@dataclass(frozen=True)
class Block:
    """Columns, one a position, of one group of a layer in a batch; single precision.

    Attributes:
        inputs: What the layer now gets, ``[i, n]``.
        wanted: What its output with `beside` added is to be before the activation, ``[o, n]``.
        beside: What is added to its output, of the same shape; None for nothing.
    """

    inputs: np.ndarray
    wanted: np.ndarray
    beside: np.ndarray | None


@dataclass(frozen=True)
class Samples:
    """One group of a layer over all samples.

    Attributes:
        fitted: What is fitted to.
        held_out: What says how strongly; no layer is fitted to these samples.
        activation: What follows the layer.
    """

    fitted: Sequence[Block]
    held_out: Sequence[Block]
    activation: Activation

    @staticmethod
    def joined(parts: Sequence[Samples]) -> Samples:
        """The samples of several nodes, with the activation that follows all of them, or none."""
        return Samples(
            [block for part in parts for block in part.fitted],
            [block for part in parts for block in part.held_out],
            parts[0].activation if len({part.activation for part in parts}) == 1 else Activation(),
        )
