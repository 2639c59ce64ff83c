"""Progress of long work, silent unless somebody shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Progress", "StagesOnly"]


class Progress:
    """Says nothing. The command line shows bars by overriding `stage` and `note`."""

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """A stage of the work.

        Args:
            title: What is being done.
            total: Number of steps, None when unknown.

        Yields:
            A function to be called with the number of steps done since its last call.
        """
        yield lambda steps: None

    def note(self, text: str) -> None:
        """Something the user should know now."""


class StagesOnly(Progress):
    """Shows the stages of work that is done several times, and leaves out its notes.

    Args:
        shown: What shows the stages.
    """

    def __init__(self, shown: Progress) -> None:
        self._shown = shown

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Show the stage."""
        with self._shown.stage(title, total) as advance:
            yield advance
