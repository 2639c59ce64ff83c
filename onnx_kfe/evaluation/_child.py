"""Run as a process of its own: measures models and prints what it found."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnx_kfe.errors import KfeError, UsageError
from onnx_kfe.evaluation._race import alternate
from onnx_kfe.evaluation._run import open_model, run
from onnx_kfe.runtime import import_onnxruntime, share_threads

_RUNS = 3


def peak_memory() -> int | None:
    """Largest resident memory of this process so far in bytes; None where the system does not tell.

    Linux's own `ru_maxrss` survives `exec` and so starts at the size of the *parent*; `VmHWM` does not.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def alone(
    models: Mapping[str, str], feeds: Mapping[str, np.ndarray], providers: Sequence[str], threads: int | None
) -> dict[str, float | None]:
    """Load time and peak memory of the only model."""
    ((name, path),) = models.items()
    import_onnxruntime()
    before = peak_memory()
    start = time.perf_counter()
    session = open_model(f"model '{name}'", Path(path), providers, threads)
    load_time = time.perf_counter() - start
    for _ in range(_RUNS):
        run(f"model '{name}'", session, feeds)
    after = peak_memory()
    return {"load_time": load_time, "peak_memory": None if before is None or after is None else after - before}


def race(
    models: Mapping[str, str],
    feeds: Mapping[str, np.ndarray],
    providers: Sequence[str],
    threads: int | None,
    **options: Any,
) -> list[list[float]]:
    """Latencies of all models, with one pool of threads."""
    share_threads(threads)
    paths = {name: Path(path) for name, path in models.items()}
    rounds = alternate(paths, feeds, providers=providers, threads=threads, shared_threads=True, **options)
    return rounds.tolist()


_TASKS: dict[str, Callable[..., Any]] = {"alone": alone, "race": race}


def main(request: dict[str, Any]) -> None:
    """Do the task of a request and print the answer as one line of JSON."""
    with np.load(request["feeds"], allow_pickle=False) as arrays:
        feeds = dict(zip(request["names"], arrays.values(), strict=True))
    task = _TASKS[request["task"]]
    try:
        found = task(request["models"], feeds, request["providers"], request["threads"], **request["options"])
    except KfeError as error:
        print(json.dumps({"error": str(error), "usage": isinstance(error, UsageError)}))
    else:
        print(json.dumps({"found": found}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
