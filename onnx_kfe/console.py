"""Where the command line writes: results to stdout; notes, errors and progress bars to stderr."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from onnx_kfe import progress

__all__ = ["ShownProgress", "print_error", "print_json", "print_line", "print_renderable"]

# Names of layers and files hold brackets and colons, which are no markup.
_out = Console(markup=False, emoji=False, highlight=False)
_err = Console(stderr=True, markup=False, emoji=False, highlight=False)
_PATIENCE = 1.0  # seconds before a bar appears


class ShownProgress(progress.Progress):
    """On stderr: notes as lines, and on a terminal a bar for every stage that takes longer than a second."""

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Show a bar once the stage has taken longer than a second."""
        columns = (TextColumn("{task.description}"), BarColumn(), _Steps(), TimeElapsedColumn())
        with _PatientBars(*columns, console=_err, transient=True, disable=not _err.is_terminal) as bars:
            task = bars.add_task(title, total=total)
            yield lambda steps: bars.advance(task, steps)

    def note(self, text: str) -> None:
        """Print a line."""
        _err.print(text, style="dim", soft_wrap=True)


class _PatientBars(Progress):
    """Bars that stay away from whoever would only see them flash."""

    def get_renderables(self) -> Iterable[RenderableType]:
        if any((task.elapsed or 0.0) > _PATIENCE for task in self.tasks):
            yield from super().get_renderables()


class _Steps(ProgressColumn):
    """Steps done and the time that the rest will take, where the number of steps is known."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text()
        left = task.time_remaining
        rest = "" if left is None else f", {time.strftime('%M:%S', time.gmtime(left))} left"
        return Text(f"{task.completed:.0f}/{task.total:.0f}{rest}")


def print_json(data: Any) -> None:
    """Print plain values for machines."""
    print(json.dumps(data, indent=1, allow_nan=False))


def print_line(text: str, style: str = "") -> None:
    """Print a line of the result, however long."""
    _out.print(text, style=style, soft_wrap=True)


def print_renderable(renderable: RenderableType) -> None:
    """Print a table, set off by empty lines."""
    _out.print("", renderable, "")


def print_error(text: str) -> None:
    """Print an error on exactly one line."""
    _err.print(Text.assemble(("error:", "bold red"), " ", " ".join(text.split())), soft_wrap=True)
