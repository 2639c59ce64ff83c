"""Opening and running a model so that whatever goes wrong names that model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnx_kfe.errors import KfeError, UsageError
from onnx_kfe.runtime import Serialized, create_session, feeds_for, reason

Model = Serialized | str | Path


def open_model(
    what: str, model: Model, providers: Sequence[str], threads: int | None, *, shared_threads: bool = False
) -> Any:
    """Create a session; an error of loading names the model as `what`, one of the providers stays as it is."""
    try:
        return create_session(model, providers=providers, threads=threads, shared_threads=shared_threads)
    except UsageError:
        raise
    except KfeError as error:
        raise KfeError(f"{what}: {error}") from error


def run(what: str, session: Any, feeds: Mapping[str, np.ndarray], outputs: list[str] | None = None) -> list[Any]:
    """Run a session on those of the feeds that it takes.

    Raises:
        KfeError: An input is not fed, or ONNX Runtime fails.
    """
    wanted = [value.name for value in session.get_inputs()]
    if missing := [name for name in wanted if name not in feeds]:
        raise KfeError(f"{what} has an input '{missing[0]}' that the data does not give (it gives: {', '.join(feeds)})")
    try:
        return session.run(outputs, feeds_for(session, feeds))
    except Exception as error:
        raise KfeError(f"{what} fails in ONNX Runtime (check the inputs' shapes and types): {reason(error)}") from error
