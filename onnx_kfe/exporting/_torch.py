"""torch, imported when it is needed, and what working with a module takes."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from onnx_kfe.errors import KfeError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["evaluating", "import_torch", "parameter_names", "quiet", "reason"]


def import_torch() -> Any:
    """Import torch, or say which extra brings it.

    Raises:
        KfeError: torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise KfeError("this needs torch, which is not installed: pip install 'onnx-kfe[train]'") from error
    return torch


def parameter_names(module: nn.Module) -> list[str]:
    """Names of forward's parameters that stand for one argument each, so without ``*args`` and ``**kwargs``."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in inspect.signature(module.forward).parameters.values() if p.kind in kinds]


def reason(error: BaseException) -> str:
    """One line for what is at the bottom of an exception."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A first line that announces a list says nothing without the next.
    text = " ".join(lines[: 2 if lines[0].endswith(":") else 1]) if lines else ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode, then each part of it back into its own."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what prints, warns and logs, as torch's exporter does."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    sink = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
