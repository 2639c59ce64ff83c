"""Latencies on disk: what was measured on a machine once need not be measured again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path

import platformdirs

from onnx_kfe.errors import KfeError
from onnx_kfe.graph import replace_whole
from onnx_kfe.planning._stopwatch import Refusal
from onnx_kfe.planning._workload import Workload
from onnx_kfe.runtime import default_threads, import_onnxruntime

__all__ = ["LatencyCache"]

_FORMAT = "onnx-kfe latency 1"


class LatencyCache:
    """Seconds by workload, of one runtime, providers, number of threads and processor.

    A file that cannot be read, or is of another machine, counts as empty and is written anew.

    Args:
        providers: Execution providers, CPU when empty.
        threads: Intra-operator threads, all cores when None.
    """

    def __init__(self, providers: Sequence[str], threads: int | None) -> None:
        self._machine = {
            "format": _FORMAT, "runtime": import_onnxruntime().__version__,
            "providers": list(providers) or ["CPUExecutionProvider"], "threads": threads or default_threads(),
            "processor": _processor(),
        }  # fmt: skip
        name = hashlib.sha256(json.dumps(self._machine, sort_keys=True).encode()).hexdigest()[:16]
        self.path = Path(platformdirs.user_cache_dir("onnx-kfe", appauthor=False), "latency", f"{name}.json")
        self._seconds = self._read()

    def get(self, workload: Workload) -> float | Refusal | None:
        """What is known of a workload."""
        return self._seconds.get(workload.key)

    def add(self, measured: Iterable[tuple[Workload, float | Refusal]]) -> None:
        """Keep what was measured, beside what other processes wrote in the meantime."""
        found = {workload.key: value for workload, value in measured}
        if not found:
            return
        self._seconds = {**self._read(), **self._seconds, **found}
        content = {"machine": self._machine, "seconds": self._seconds}
        with contextlib.suppress(OSError, KfeError):  # where there is no place for it, it is measured again
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_whole(self.path, json.dumps(content, indent=0).encode())

    def _read(self) -> dict[str, float | Refusal]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["machine"] != self._machine:
                return {}
            return {
                key: Refusal(value) if isinstance(value, str) else float(value)
                for key, value in content["seconds"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}


def _processor() -> str:
    """Model and instruction sets, which decide the kernels that the runtime takes."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        fields = dict(line.split(":", 1) for line in lines if line.startswith(("model name", "flags", "Features")))
        if fields:
            return " ".join(value.strip() for value in fields.values())
    return f"{platform.processor()} {platform.machine()}"
