"""Machines of known speed, to plan latencies with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnx_kfe.planning._stopwatch import Refusal
from onnx_kfe.planning._workload import Workload

__all__ = ["Clock", "work"]


def work(workload: Workload) -> float:
    """Seconds, bilinear in the numbers of input and output channels: 1 us, 1 ns an element, 0.1 ns an operation."""
    positions = math.prod(workload.leading) * math.prod(workload.size)
    operations = workload.inputs * workload.outputs / workload.groups * math.prod(workload.kernel)
    return 1e-6 + positions * (1e-9 * (workload.inputs + workload.outputs) + 1e-10 * operations)


class Clock:
    """Stands in for the class `Stopwatch` and for an instance of it, and keeps what it was asked for.

    Args:
        seconds: What each workload takes.
        share: Share of a model's run that its linear layers take; None where no profile tells.
    """

    def __init__(self, seconds: Callable[[Workload], float | Refusal] = work, share: float | None = None) -> None:
        self.seconds, self.share = seconds, share
        self.asked: list[Workload] = []
        self.machines: list[tuple[Sequence[str], int | None]] = []

    def __call__(self, providers: Sequence[str], threads: int | None) -> Clock:
        self.machines.append((providers, threads))
        return self

    def measure(self, given: Sequence[Workload]) -> Iterator[tuple[Workload, float | Refusal]]:
        for workload in reversed(given):  # the real one sorts them
            self.asked.append(workload)
            yield workload, self.seconds(workload)

    def linear_share(self, model: ir.Model, feeds: Mapping[str, np.ndarray]) -> float | None:
        return self.share
