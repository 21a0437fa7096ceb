"""Ctrl-C and SIGTERM between two lines of a gang's output, and never within the handling of one.

Python raises KeyboardInterrupt between any two instructions of the main thread: also between a lock's being taken and
the `with` that would let go of it. A queue or a progress bar that is left so stops whoever comes next, for ever.
"""

from __future__ import annotations

import signal
import threading
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # a person, a machine, Slurm


class Interrupts:
    """Within the `with` the signals only leave a note; `check` raises KeyboardInterrupt if there is one."""

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # signals are its alone
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None:
            self.check()

    def _note(self, *_: object) -> None:
        self._asked = True

    def check(self) -> None:
        if self._asked:
            self._asked = False
            raise KeyboardInterrupt
