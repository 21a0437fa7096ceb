"""The log of a job's newest pod, on a thread, over lost connections."""

from __future__ import annotations

import contextlib
import sys
import threading
from typing import Any

from k5dist.cluster.kubernetes_api import Api, Unreachable
from k5dist.config import ConfigError

_READABLE = ("Running", "Succeeded", "Failed")


class LogTail:
    """Writes each line once to standard output: where the stream breaks, what was shown is skipped."""

    def __init__(self, api: Api, selector: str, poll: float) -> None:
        self.lines = 0
        self._api, self._selector, self._poll = api, selector, poll
        self._shown: dict[str, int] = {}
        self._stopped, self._last_round = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._follow, name="k5dist-log", daemon=True)
            self._thread.start()

    def finish(self, seconds: float) -> None:
        """The job has ended: show the rest of its log, within `seconds`."""
        self._last_round.set()
        self.start()
        assert self._thread is not None
        self._thread.join(seconds)

    def stop(self) -> None:
        self._stopped.set()

    def _follow(self) -> None:
        while not self._stopped.is_set():
            last = self._last_round.is_set()
            with contextlib.suppress(Unreachable, ConfigError):  # the follower says what is wrong
                pod = self._newest()
                if pod is not None:
                    self._show(pod)
                if last:
                    return
            self._stopped.wait(self._poll)

    def _newest(self) -> str | None:
        pods: list[dict[str, Any]] = self._api.pods(self._selector)
        begun = [pod for pod in pods if pod.get("status", {}).get("phase") in _READABLE]
        begun.sort(key=lambda pod: pod["metadata"].get("creationTimestamp", ""))
        return begun[-1]["metadata"]["name"] if begun else None

    def _show(self, pod: str) -> None:
        for i, line in enumerate(self._api.log(pod)):
            if self._stopped.is_set():
                return
            if i < self._shown.get(pod, 0):
                continue
            self._shown[pod] = i + 1
            self.lines += 1
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
