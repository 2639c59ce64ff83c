"""Latency, memory, load time and size of models, side by side in one run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_kfe.errors import KfeError, UsageError
from onnx_kfe.evaluation._run import Model, open_model, run
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
    """Time models against each other on the same inputs.

    Each round runs every model, in an order that rotates from round to round, so that whatever else the machine does
    falls on all of them and the ratio within a round is fair.

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


def race(
    models: Mapping[str, Model],
    feeds: Mapping[str, np.ndarray],
    *,
    providers: Sequence[str] = (),
    threads: int | None = None,
    seconds: float = 3.0,
    min_runs: int = 10,
    warmup: int = 3,
) -> np.ndarray:
    """Latencies ``[rounds, models]`` in seconds of models alternated, with the arguments of `benchmark`."""
    if not models:
        raise UsageError("there is no model to benchmark")
    sessions = {name: open_model(f"model '{name}'", model, providers, threads) for name, model in models.items()}
    _check_inputs(sessions)
    for name, session in sessions.items():
        for _ in range(max(warmup, 1)):  # also proves that the model takes these inputs
            run(f"model '{name}'", session, feeds)
    return _alternate(sessions, feeds, seconds * len(sessions), max(min_runs, 1))


def file_size(model: Model) -> int:
    """Bytes of a model, with every external data file it refers to.

    Raises:
        KfeError: The file cannot be read.
    """
    if isinstance(model, bytes):
        return len(model)
    try:
        graphs = ir.load(model).graphs()
        tensors = (value.const_value for graph in graphs for value in graph.initializers.values())
        external = {Path(tensor.path).resolve() for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
        return sum(path.stat().st_size for path in {Path(model).resolve(), *external})
    except Exception as error:
        raise KfeError(f"cannot read the model {model}: {error}") from error


def _check_inputs(sessions: Mapping[str, Any]) -> None:
    inputs = {name: sorted(value.name for value in session.get_inputs()) for name, session in sessions.items()}
    (first, expected), *others = inputs.items()
    for name, own in others:
        if own != expected:
            raise KfeError(
                f"models cannot be compared on different inputs: '{first}' takes {', '.join(expected) or 'none'}, "
                f"'{name}' takes {', '.join(own) or 'none'}"
            )


def _alternate(
    sessions: Mapping[str, Any], feeds: Mapping[str, np.ndarray], budget: float, min_runs: int
) -> np.ndarray:
    """Latencies [rounds, models] in seconds."""
    turns = [(session, {i.name: feeds[i.name] for i in session.get_inputs()}) for session in sessions.values()]
    rounds: list[list[float]] = []
    stop = time.perf_counter() + budget
    while len(rounds) < min_runs or time.perf_counter() < stop:
        latency = [0.0] * len(turns)
        for step in range(len(turns)):
            turn = (step + len(rounds)) % len(turns)
            session, own = turns[turn]
            # Untimed: the other model's threads still spin and its weights fill the cache, which made the run that
            # follows it up to 1.6 times as long as the steady latency.
            session.run(None, own)
            start = time.perf_counter()
            session.run(None, own)
            latency[turn] = time.perf_counter() - start
        rounds.append(latency)
    return np.array(rounds)


def _measure_alone(
    name: str, model: Model, feeds: Mapping[str, np.ndarray], providers: Sequence[str], threads: int | None
) -> tuple[float, int | None]:
    """Load time and peak memory, from a process that has seen no other model."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx") if isinstance(model, bytes) else Path(model)
        if isinstance(model, bytes):
            path.write_bytes(model)
        # By position: input names can be anything. Strings as fixed-width text: object arrays would be pickled.
        arrays = [np.asarray(value, dtype=str) if value.dtype == object else value for value in feeds.values()]
        np.savez(Path(folder, "feeds.npz"), *arrays)
        request = {
            "model": str(path.resolve()),
            "feeds": str(Path(folder, "feeds.npz")),
            "names": list(feeds),
            "providers": list(providers),
            "threads": threads,
        }
        child = subprocess.run(
            [sys.executable, "-m", "onnx_kfe.evaluation._child", json.dumps(request)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    if child.returncode:
        reason = (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
        raise KfeError(f"model '{name}' fails alone in a fresh process: {reason}")
    answer = json.loads(child.stdout.splitlines()[-1])
    return answer["load_time"], answer["peak_memory"]
