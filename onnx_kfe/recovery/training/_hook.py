"""What may intervene in the steps of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Hook"]


class Hook(Protocol):
    """Changes gradients and weights on the way; the weights in the end are then those of the last step, not the best.

    Attributes:
        identity: What decides on its effect, in words: a state is of a run with the same hook alone.
    """

    identity: str

    def after_backward(self, step: int, steps: int) -> None:
        """Change weights and gradients before the optimizer sees them.

        Args:
            step: Number of the step, from 0.
            steps: Steps in all.
        """

    def after_step(self, step: int, steps: int) -> None:
        """Change weights after the optimizer has."""

    def finish(self) -> None:
        """Bring the weights into their final state after the last step."""

    def state(self) -> dict[str, Tensor]:
        """What it remembers, as tensors by name."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
