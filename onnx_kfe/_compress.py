"""From a plan to a smaller model: the forms solved layer by layer, or front to back on samples where there are any."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from onnx_kfe import recovery
from onnx_kfe.calibration import Dataset, Statistics
from onnx_kfe.graph import Network
from onnx_kfe.planning import Plan
from onnx_kfe.progress import Progress
from onnx_kfe.rewrite import solve_plan, write_chains

__all__ = ["compress"]


def compress(
    network: Network,
    plan: Plan,
    statistics: Statistics | None,
    samples: Dataset | None,
    memory: int,
    providers: Sequence[str],
    threads: int | None,
    progress: Progress,
    checkpoint: Path | None = None,
) -> tuple[ir.Model, dict[str, float]]:
    """The smaller model, and by changed layer the loss it was predicted to cost before any refit.

    Args:
        network: The model.
        plan: Forms and ranks by layer.
        statistics: What the weights are solved under; None for the weights alone.
        samples: What to refit on; None for no refit.
        memory: Bytes of activations that a refit keeps in memory.
        providers: Execution providers, CPU when empty.
        threads: Threads, all cores when None.
        progress: Shows what is going on.
        checkpoint: Folder from which an interrupted refit goes on.
    """
    with progress.stage("rewriting", len(plan.changed)) as advance:
        chains, losses = solve_plan(network, plan, statistics, progress=lambda layer: advance(1))
    if samples is not None and statistics is not None and plan.changed:
        if reason := recovery.refusal(network, samples):
            progress.note(f"not refitted: {reason}")
        else:
            layers = [name for name in plan.choices if name in statistics.layers]
            with progress.stage("refitting", len(layers)) as advance:
                chains = recovery.refit(
                    network, plan, statistics, samples, memory=memory, checkpoint=checkpoint, providers=providers,
                    threads=threads, progress=lambda layer: advance(1),
                )  # fmt: skip
    return write_chains(network, plan, statistics, chains), losses
