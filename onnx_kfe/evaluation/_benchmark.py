"""Latency, memory, load time and size of models, side by side in one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_kfe.errors import KfeError
from onnx_kfe.evaluation._fresh import in_fresh_process
from onnx_kfe.evaluation._race import race
from onnx_kfe.evaluation._run import Model
from onnx_kfe.runtime import default_threads


@dataclass(frozen=True)
class Timing:
    """What one model takes.

    Attributes:
        name: Name given to the model.
        rounds: Number of timed runs.
        median: Median latency in seconds.
        p90: 90th percentile of the latency in seconds.
        p99: 99th percentile of the latency in seconds.
        spread: Interquartile range of the latency over its median.
        speedup: Median over rounds of (latency of the first model / latency of this one).
        speedup_iqr: First and third quartile of that ratio.
        load_time: Seconds to create the session, in a fresh process.
        peak_memory: Peak of that process's resident host memory while it loads the model and runs it three times, in
            bytes above what it took before; None where the system does not tell.
        file_size: Bytes of the model with its external data.
        batch: Samples in a run.
        threads: Intra-operator threads.
    """

    name: str
    rounds: int
    median: float
    p90: float
    p99: float
    spread: float
    speedup: float
    speedup_iqr: tuple[float, float]
    load_time: float
    peak_memory: int | None
    file_size: int
    batch: int
    threads: int

    @property
    def throughput(self) -> float:
        """Samples in a second, at the median latency."""
        return self.batch / self.median

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "throughput": self.throughput}


def benchmark(
    models: Mapping[str, Model],
    feeds: Mapping[str, np.ndarray],
    *,
    batch: int = 1,
    providers: Sequence[str] = (),
    threads: int | None = None,
    seconds: float = 3.0,
    min_runs: int = 10,
    warmup: int = 3,
) -> list[Timing]:
    """Time models against each other on the same inputs, see `race`.

    Args:
        models: Name -> serialised model or its path; speed ratios are relative to the first.
        feeds: Input name -> array.
        batch: Samples in the feeds.
        providers: Execution providers in order of preference; CPU when empty.
        threads: Intra-operator threads; all cores when None.
        seconds: Time to spend on each model; rounds stop after it, but not before `min_runs`.
        min_runs: Least number of rounds.
        warmup: Runs of each model before the first round.

    Returns:
        One timing for each model, in the order given.

    Raises:
        UsageError: There is no model, or a provider is not available.
        KfeError: The models' inputs differ, or one cannot be loaded or run.
    """
    latencies = race(
        models, feeds, providers=providers, threads=threads, seconds=seconds, min_runs=min_runs, warmup=warmup
    )
    timings = []
    for column, (name, model) in enumerate(models.items()):
        own = latencies[:, column]
        low, median, high, p90, p99 = np.quantile(own, [0.25, 0.5, 0.75, 0.9, 0.99])
        slow, speedup, fast = np.quantile(latencies[:, 0] / own, [0.25, 0.5, 0.75])
        load_time, peak = _measure_alone(name, model, feeds, providers, threads)
        timings.append(
            Timing(
                name=name,
                rounds=len(own),
                median=float(median),
                p90=float(p90),
                p99=float(p99),
                spread=float((high - low) / median),
                speedup=float(speedup),
                speedup_iqr=(float(slow), float(fast)),
                load_time=load_time,
                peak_memory=peak,
                file_size=file_size(model),
                batch=batch,
                threads=threads or default_threads(),
            )
        )
    return timings


def file_size(model: Model) -> int:
    """Bytes of a model, with every external data file it refers to.

    Raises:
        KfeError: The file cannot be read.
    """
    if not isinstance(model, str | Path):
        return len(model)
    try:
        graphs = ir.load(model).graphs()
        tensors = (value.const_value for graph in graphs for value in graph.initializers.values())
        external = {Path(tensor.path).resolve() for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
        return sum(path.stat().st_size for path in {Path(model).resolve(), *external})
    except Exception as error:
        raise KfeError(f"cannot read the model {model}: {error}") from error


def _measure_alone(
    name: str, model: Model, feeds: Mapping[str, np.ndarray], providers: Sequence[str], threads: int | None
) -> tuple[float, int | None]:
    """Load time and peak memory, from a process that has seen no other model."""
    answer = in_fresh_process("alone", {name: model}, feeds, providers, threads)
    return answer["load_time"], answer["peak_memory"]
