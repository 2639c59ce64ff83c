"""Measurements in a process of their own, which has seen no other model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnx_kfe.errors import KfeError, UsageError
from onnx_kfe.evaluation._run import Model

__all__ = ["in_fresh_process"]


def in_fresh_process(
    task: str,
    models: Mapping[str, Model],
    feeds: Mapping[str, np.ndarray],
    providers: Sequence[str],
    threads: int | None,
    **options: float,
) -> Any:
    """Have a task of `_child` done.

    Args:
        task: Its name.
        models: Name -> serialised model or its path.
        feeds: Input name -> array.
        providers: Execution providers in order of preference; CPU when empty.
        threads: Intra-operator threads; all cores when None.
        options: What else the task takes.

    Returns:
        What it answers.

    Raises:
        UsageError: As raised there.
        KfeError: As raised there, or the process fails.
    """
    with tempfile.TemporaryDirectory(prefix="onnx-kfe-") as folder:
        # By position: input names can be anything. Strings as fixed-width text: object arrays would be pickled.
        arrays = [np.asarray(value, dtype=str) if value.dtype == object else value for value in feeds.values()]
        np.savez(Path(folder, "feeds.npz"), *arrays)
        request = {
            "task": task, "models": {name: _path(model, folder, n) for n, (name, model) in enumerate(models.items())},
            "feeds": str(Path(folder, "feeds.npz")), "names": list(feeds), "providers": list(providers),
            "threads": threads, "options": options,
        }  # fmt: skip
        child = subprocess.run(
            [sys.executable, "-m", "onnx_kfe.evaluation._child", json.dumps(request)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    if child.returncode:
        named = " or ".join(f"model '{name}'" for name in models)
        why = (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
        raise KfeError(f"{named} fails in a fresh process: {why}")
    answer = json.loads(child.stdout.splitlines()[-1])
    if "error" in answer:
        raise (UsageError if answer["usage"] else KfeError)(answer["error"])
    return answer["found"]


def _path(model: Model, folder: str, place: int) -> str:
    if isinstance(model, str | Path):
        return str(Path(model).resolve())
    path = Path(folder, str(place), "model.onnx")
    path.parent.mkdir()
    if isinstance(model, bytes):
        path.write_bytes(model)
    else:
        model.write(path)
    return str(path)
