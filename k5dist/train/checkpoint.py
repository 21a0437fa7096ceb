"""Checkpoints that are whole or not there: DCP in the background, a commit marker last, the newest few kept.

    checkpoints/step-00000250/   DCP's files, history.json, then COMMITTED: step, fingerprint, the files' sizes

`history.json` holds the metrics since the checkpoint before: a driver that is killed may not have sent them
to the tracking server yet, and the resumed run does not compute them again.

A folder without marker, or whose files are not those of the marker, is torn: it is skipped with a warning.
"""

from __future__ import annotations

import json
import logging
import re
import time
from concurrent.futures import Future
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from k5dist import storage

MARKER = "COMMITTED"
HISTORY = "history.json"
_STEP = re.compile(r"step-(\d{8})")
log = logging.getLogger(__name__)


def step_folder(step: int) -> str:
    return f"step-{step:08d}"


def committed_steps(uri: str, fingerprint: str) -> list[int]:
    """Steps of the whole checkpoints of this run below `uri`, ascending; torn ones are named in a warning."""
    steps = []
    for name in storage.list_folder(uri):
        match = _STEP.fullmatch(name)
        if match is None:
            continue
        flaw = _flaw(storage.join(uri, name), fingerprint)
        if flaw:
            log.warning("skipping checkpoint %s: %s", name, flaw)
        else:
            steps.append(int(match[1]))
    return steps


def _flaw(folder: str, fingerprint: str) -> str:
    """Why a checkpoint cannot be used; empty where it can."""
    marker_uri = storage.join(folder, MARKER)
    if not storage.exists(marker_uri):
        return "it was never committed"
    try:
        marker = json.loads(storage.read_text(marker_uri))
        wanted = marker["files"]
    except (ValueError, KeyError):
        return "its commit marker cannot be read"
    if marker.get("fingerprint") != fingerprint:
        return f"it belongs to run {marker.get('fingerprint')}, not {fingerprint}"
    found = storage.sizes(folder)
    for file, size in wanted.items():
        if found.get(file) != size:
            return f"{file} has {found.get(file, 'no')} bytes of {size}"
    return ""


class Checkpoints:
    """Saving and loading for the workers of one gang. Every method is called by all ranks together."""

    def __init__(self, uri: str, *, fingerprint: str, keep: int, group: dist.ProcessGroup) -> None:
        self.uri, self.fingerprint, self.keep = uri, fingerprint, keep
        self.group = group
        self.best: int | None = None  # a step that is kept, however old
        self.stall_seconds = 0.0
        self._running: tuple[int, Future, list[dict[str, Any]]] | None = None

    def latest(self) -> int | None:
        """The newest whole checkpoint; rank 0 looks, all agree."""
        found: list[int | None] = [None]
        if dist.get_rank() == 0:
            steps = committed_steps(self.uri, self.fingerprint)
            found = [steps[-1] if steps else None]
        dist.broadcast_object_list(found, src=0, group=self.group)
        return found[0]

    def load(self, state: dict[str, Any], step: int) -> None:
        """Fill the tensors of `state` in place, whatever number of ranks saved them."""
        dcp.load(state, checkpoint_id=storage.join(self.uri, step_folder(step)), process_group=self.group)

    def history(self, step: int) -> list[dict[str, Any]]:
        return json.loads(storage.read_text(storage.join(self.uri, step_folder(step), HISTORY)))

    def save(self, state: dict[str, Any], step: int, history: list[dict[str, Any]]) -> None:
        """Copy the tensors and write them in the background; waits first for a save that still runs."""
        started = time.perf_counter()
        self.finish()
        folder = storage.join(self.uri, step_folder(step))
        if dist.get_rank() == 0:
            storage.remove(folder)  # what a torn save left
        dist.barrier(group=self.group)
        future = dcp.async_save(
            state, checkpoint_id=folder, process_group=self.group, async_checkpointer_type=AsyncCheckpointerType.THREAD
        )
        assert isinstance(future, Future), "a thread's save is a plain future"
        self._running = (step, future, history)
        self.stall_seconds += time.perf_counter() - started

    def keep_best(self, step: int) -> None:
        """The checkpoint of `step` is the best, and stays however old; the one before it goes with the next commit,
        or at once where none is on its way."""
        self.best = step
        if self._running is None and dist.get_rank() == 0:
            self._prune()

    def poll(self) -> None:
        """Commit the running save if it is written; never waits."""
        if self._running is not None and self._running[1].done():
            self.finish()

    def finish(self) -> None:
        """Wait for the running save and commit it."""
        if self._running is None:
            return
        step, future, history = self._running
        future.result()
        self._running = None
        if dist.get_rank() == 0:
            self._commit(step, history)
            self._prune()

    def _commit(self, step: int, history: list[dict[str, Any]]) -> None:
        folder = storage.join(self.uri, step_folder(step))
        storage.publish_bytes(storage.join(folder, HISTORY), json.dumps(history).encode())
        files = storage.sizes(folder)
        marker = {"step": step, "fingerprint": self.fingerprint, "world": dist.get_world_size(), "files": files}
        storage.publish_bytes(storage.join(folder, MARKER), json.dumps(marker, indent=2).encode())

    def _prune(self) -> None:
        """Delete all but the newest `keep` and the best, and torn ones older than those. The marker goes first: a
        half-deleted one is never loaded."""
        kept = committed_steps(self.uri, self.fingerprint)[-self.keep :]
        for name in storage.list_folder(self.uri):
            match = _STEP.fullmatch(name)
            if match and int(match[1]) < kept[-1] and int(match[1]) not in (*kept, self.best):
                folder = storage.join(self.uri, name)
                storage.remove(storage.join(folder, MARKER))
                storage.remove(folder)
