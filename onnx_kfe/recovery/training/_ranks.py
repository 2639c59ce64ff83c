"""Several processes that train one model together, each on its share of every batch, as ``torchrun`` starts them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from onnx_kfe.errors import UsageError

__all__ = ["Ranks", "joined"]


@dataclass(frozen=True)
class Ranks:
    """The processes.

    Attributes:
        rank: Number of this one.
        size: How many there are.
        device: What this one computes on.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def share(self, places: np.ndarray) -> np.ndarray:
        """This process's share of the places of a batch."""
        return np.array_split(places, self.size)[self.rank]

    def add_up(self, parameters: Iterable[nn.Parameter], loss: float) -> float:
        """Sum gradients and loss over all processes, in one message.

        Args:
            parameters: Their gradients become the sums.
            loss: What this process adds to the loss.

        Returns:
            The loss of the whole batch.
        """
        if self.size == 1:
            return loss
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        message = torch.cat([*(g.flatten() for g in gradients), torch.full((1,), loss, device=self.device)])
        dist.all_reduce(message)
        *summed, total = message.split([*(g.numel() for g in gradients), 1])
        for gradient, part in zip(gradients, summed, strict=True):
            gradient.copy_(part.view_as(gradient))
        return float(total)

    def agreed(self, value: float) -> float:
        """The value that the first process has."""
        if self.size == 1:
            return value
        message: Tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(message, 0)
        return float(message)


@contextlib.contextmanager
def joined(device: str | None) -> Iterator[Ranks]:
    """Join the other processes, where there are some.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:1``; CUDA where there is some when None.

    Raises:
        UsageError: There is no such device.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and size > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', rank)}"
    try:
        chosen = torch.device(name)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: torch has no such device here") from error
    mine = size > 1 and not dist.is_initialized()
    if mine:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Ranks(rank, size, chosen)
    finally:
        if mine:
            dist.destroy_process_group()
