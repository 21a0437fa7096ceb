"""The terminal: tables, progress bars, and plain lines where nobody watches. Listeners get all of it, too."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

_PLAIN_WIDTH = 140  # of tables in a log file

console = Console(highlight=False, soft_wrap=True)
if not console.is_terminal:
    console.width = _PLAIN_WIDTH
# Seconds between lines of progress where there is no terminal; 0 shows every one.
_PLAIN_INTERVAL = float(os.environ.get("K5DIST_PROGRESS_SECONDS", "5"))


class Listener(Protocol):
    """Whoever keeps what the user is told; called from the thread that tells it."""

    def line(self, text: str) -> None: ...

    def progress(self, name: str, done: int, total: int) -> None: ...


_listeners: list[Listener] = []


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def say(text: str) -> None:
    """One line for the user, verbatim (no markup)."""
    console.print(text, markup=False)
    for listener in _listeners:
        listener.line(text)


def show_table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)
    for listener in _listeners:
        listener.line("\n".join([title, *(f"{name:<16} {value}" for name, value in rows)]))


class Bar:
    """One long stage's progress; `advance` and `to` from one thread."""

    def __init__(self, name: str, total: int, progress: Progress | None) -> None:
        self.name, self.total, self.done = name, total, 0
        self._progress = progress
        self._task = progress.add_task(name, total=total, note="") if progress else None
        self._last_line = time.monotonic()

    def advance(self, count: int = 1, note: str = "") -> None:
        self.to(self.done + count, note)

    def to(self, done: int, note: str = "") -> None:
        self.done = done
        for listener in _listeners:
            listener.progress(self.name, done, self.total)
        now = time.monotonic()
        due = done >= self.total or now - self._last_line >= _PLAIN_INTERVAL
        text = f"{self.name}: {done}/{self.total}{'  ' + note if note else ''}"
        if due:
            self._last_line = now
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, note=note)
            for listener in _listeners if due else ():
                listener.line(text)
        elif due:
            say(text)


@contextmanager
def progress_bar(name: str, total: int) -> Iterator[Bar]:
    if not console.is_terminal:
        yield Bar(name, total, None)
        return
    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    columns += [TimeRemainingColumn(), TextColumn("{task.fields[note]}")]
    with Progress(*columns, console=console, transient=False) as progress:
        yield Bar(name, total, progress)
