"""What a pod's preStop hook does: the job is asked to stop once, and pods wait for the training to save."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from k5dist.cluster import drain
from k5dist.cluster.gang import WORKER_MODULE


@pytest.fixture
def worker() -> subprocess.Popen[bytes]:
    """A process that looks like a training worker, until its input ends."""
    return subprocess.Popen([sys.executable, "-c", "input()", WORKER_MODULE], stdin=subprocess.PIPE)


def test_a_pod_waits_for_its_training_workers(worker: subprocess.Popen[bytes]) -> None:
    assert drain.WORKER_MODULE == WORKER_MODULE
    assert not drain.training_has_ended()
    assert drain.main(["worker", "0.3"]) == 1, "no longer than it may"
    ended = threading.Timer(0.5, worker.communicate)
    started = time.monotonic()
    ended.start()
    assert drain.main(["worker", "30"]) == 0
    assert 0.4 < time.monotonic() - started < 20
    ended.join()
