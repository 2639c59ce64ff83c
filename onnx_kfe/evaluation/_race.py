"""Latencies of models that take turns."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from onnx_kfe.errors import KfeError, UsageError
from onnx_kfe.evaluation._fresh import in_fresh_process
from onnx_kfe.evaluation._run import Model, open_model, run

__all__ = ["alternate", "race"]


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
    """Latencies of models on the same inputs, in a process of their own where all share one pool of threads.

    Each round runs every model, in an order that rotates from round to round, so that whatever else the machine does
    falls on all of them and the ratio within a round is fair.

    Args:
        models: Name -> serialised model or its path.
        feeds: Input name -> array.
        providers: Execution providers in order of preference; CPU when empty.
        threads: Intra-operator threads; all cores when None.
        seconds: Time to spend on each model; rounds stop after it, but not before `min_runs`.
        min_runs: Least number of rounds.
        warmup: Runs of each model before the first round.

    Returns:
        ``[rounds, models]`` in seconds.

    Raises:
        UsageError: There is no model, or a provider is not available.
        KfeError: The models' inputs differ, or one cannot be loaded or run.
    """
    if not models:
        raise UsageError("there is no model to benchmark")
    options = {"seconds": seconds, "min_runs": min_runs, "warmup": warmup}
    return np.array(in_fresh_process("race", models, feeds, providers, threads, **options))


def alternate(
    models: Mapping[str, Model],
    feeds: Mapping[str, np.ndarray],
    *,
    providers: Sequence[str] = (),
    threads: int | None = None,
    seconds: float,
    min_runs: int,
    warmup: int,
    shared_threads: bool = False,
) -> np.ndarray:
    """`race` in this process, with threads of each session's own unless they are shared."""
    sessions = {
        name: open_model(f"model '{name}'", model, providers, threads, shared_threads=shared_threads)
        for name, model in models.items()
    }
    _check_inputs(sessions)
    for name, session in sessions.items():
        for _ in range(max(int(warmup), 1)):  # also proves that the model takes these inputs
            run(f"model '{name}'", session, feeds)
    turns = [(session, {i.name: feeds[i.name] for i in session.get_inputs()}) for session in sessions.values()]
    rounds: list[list[float]] = []
    stop = time.perf_counter() + seconds * len(turns)
    while len(rounds) < max(min_runs, 1) or time.perf_counter() < stop:
        latency = [0.0] * len(turns)
        for step in range(len(turns)):
            turn = (step + len(rounds)) % len(turns)
            session, own = turns[turn]
            # Untimed: the other model's weights fill the cache, which made the run that follows it up to 1.6 times as
            # long as the steady latency.
            session.run(None, own)
            start = time.perf_counter()
            session.run(None, own)
            latency[turn] = time.perf_counter() - start
        rounds.append(latency)
    return np.array(rounds)


def _check_inputs(sessions: Mapping[str, Any]) -> None:
    inputs = {name: sorted(value.name for value in session.get_inputs()) for name, session in sessions.items()}
    (first, expected), *others = inputs.items()
    for name, own in others:
        if own != expected:
            raise KfeError(
                f"models cannot be compared on different inputs: '{first}' takes {', '.join(expected) or 'none'}, "
                f"'{name}' takes {', '.join(own) or 'none'}"
            )
