"""Run by the benchmark as a process of its own: loads one model, runs it, prints its load time and peak memory."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

from onnx_kfe.evaluation._run import open_model, run
from onnx_kfe.runtime import import_onnxruntime

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


def main(request: dict) -> None:
    """Measure the model of a request and print the answer as one line of JSON."""
    import_onnxruntime()
    with np.load(request["feeds"], allow_pickle=False) as arrays:
        feeds = dict(zip(request["names"], arrays.values(), strict=True))
    before = peak_memory()
    start = time.perf_counter()
    session = open_model("the model", Path(request["model"]), request["providers"], request["threads"])
    load_time = time.perf_counter() - start
    for _ in range(_RUNS):
        run("the model", session, feeds)
    after = peak_memory()
    peak = None if before is None or after is None else after - before
    print(json.dumps({"load_time": load_time, "peak_memory": peak}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
