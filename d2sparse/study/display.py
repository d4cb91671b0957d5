"""What is shown while runs are trained: a bar, the time left, a line for every run."""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from d2sparse.checks import optional
from d2sparse.study.flags import Config

with optional(__name__):
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )


class Display:
    """The bar of a command, and the lines above it.

    Attributes:
      done: number of runs that have finished.
      total: number of all runs.
    """

    def __init__(self, bar: Progress, done: int, total: int, speaks: bool) -> None:
        """Shows the bar.

        Args:
          bar: where it is drawn.
          done: number of runs that have finished.
          total: number of all runs.
          speaks: whether this process prints lines.
        """
        self.done, self.total = done, total
        self._bar, self._speaks = bar, speaks
        self._task = bar.add_task("", total=total, completed=done)

    def note(self, text: str) -> None:
        """Says beside the bar what is going on."""
        self._bar.update(self._task, description=text)

    def finished(self, line: str) -> None:
        """Counts a run, and prints a line on it."""
        self.done += 1
        self._bar.advance(self._task)
        self.say(f"{self.done}/{self.total} {line}")

    def say(self, line: str) -> None:
        """Prints a line above the bar; at once, wherever the output goes."""
        if not self._speaks:
            return
        if not self._bar.disable and self._bar.console.is_terminal:
            self._bar.console.print(line, highlight=False, markup=False, soft_wrap=True)
        else:
            print(line, flush=True)


@contextlib.contextmanager
def shown(config: Config, done: int, total: int, speaks: bool) -> Iterator[Display]:
    """A display for the runs of a command, on a terminal with --progress."""
    bar = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        disable=not config.progress or not sys.stdout.isatty(),
        transient=True,
    )
    with bar:
        yield Display(bar, done, total, speaks)


def in_short(judged: str, name: str, results: Mapping[str, Any] | None) -> str:
    """A line on a run: its accuracy, or why it failed."""
    if results is None or "failed" in results:
        return f"{name} failed: {(results or {}).get('failed', 'no result')}"
    return (
        f"{name}: {100 * results['accuracy']:.2f} % {judged} accuracy, "
        f"{results['seconds']:.1f} s"
    )
