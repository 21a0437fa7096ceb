"""`python -m k5dist.cluster.drain head|worker SECONDS`: what a pod does before it ends, so that the training saves.

A pod's preStop hook. Kubernetes ends all pods of a deleted or suspended job at once: on the head the hook asks Ray to
stop the job, which is to the driver what Ctrl-C is; on a worker it holds the pod until the training workers have saved
and left. A job that is asked to stop already, as KubeRay does before it deletes one, is not asked twice.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable

import psutil

WORKER_MODULE = "k5dist.train.worker"  # as in gang.py, whose import would take Ray's seconds
_DASHBOARD = "http://127.0.0.1:8265"
_POLL_SECONDS = 0.2


def main(arguments: list[str]) -> int:
    role, seconds = arguments[0], float(arguments[1])
    wait = stop_jobs() if role == "head" else training_has_ended
    return 0 if _until(wait, seconds) else 1


def training_has_ended() -> bool:
    """Whether no training worker is left in this pod. Torchrun's agent has the worker's name in its arguments, too."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if WORKER_MODULE in process.cmdline():
                return False
    return True


def stop_jobs() -> Callable[[], bool]:
    """Ask Ray to stop what runs on it; returns what says whether all has ended."""
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(_DASHBOARD)

    def running() -> list[str]:
        jobs = client.list_jobs()
        return [job.submission_id for job in jobs if job.submission_id and not job.status.is_terminal()]

    for job in running():
        with contextlib.suppress(RuntimeError):  # it ended in between
            client.stop_job(job)
    return lambda: not running()


def _until(done: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
