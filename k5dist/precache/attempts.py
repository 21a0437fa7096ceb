"""How often a row's worker died under it: Ray starts the work again without end, and this sets it one.

A clip may kill its worker each time (out of memory, a fault in a codec's C code), and nothing in the worker can say so
afterwards. One actor on the driver's node therefore counts tasks that were begun and never ended. To call it for each
row would cost as much as a small clip's work, so rows are counted only in a task that was begun before: its worker
died, under which row nobody knows. At the limit the row is given up with a reason. A worker that dies for another
reason, with its node say, costs a clip one of its attempts.
"""

from __future__ import annotations

import collections
import dataclasses
import uuid
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

MAX_DEATHS = 3


@dataclasses.dataclass
class _Task:
    """What this process works on now, of one `Attempts`: a task, or in an actor all that it does."""

    id: str
    begun_before: bool


_TASKS: dict[str, _Task] = {}


class Attempts:
    """A handle that goes into tasks; `begin` and `end` embrace the work on one row."""

    def __init__(self) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self._id = uuid.uuid4().hex
        self._actor: Any = _Counts.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]

    def begin(self, stage: str, row: dict[str, Any]) -> str | None:
        """Why this row must not be tried again, if so."""
        if not self._task().begun_before:
            return None
        begun: Any = ray.get(self._actor.begin.remote(self._work(stage, row)))
        if 1 + begun < MAX_DEATHS:  # with the death that nobody knows whose it was
            return None
        return f"its worker died {MAX_DEATHS} times (killed, out of memory, or a fault in a codec)"

    def end(self, stage: str, row: dict[str, Any]) -> None:
        if self._task().begun_before:
            self._actor.end.remote(self._work(stage, row))

    def _task(self) -> _Task:
        """The task that runs here; that it has begun is told, with the end of the one before. A task that is started
        again keeps its id, and so does an actor, whose tasks run on threads that know no task's."""
        context, last = ray.get_runtime_context(), _TASKS.get(self._id)
        now = str(context.get_actor_id() or context.get_task_id())
        if last is None or last.id != now:
            before: Any = ray.get(self._actor.begin.remote(now, last.id if last else None))
            last = _TASKS[self._id] = _Task(now, bool(before))
        return last

    def _work(self, stage: str, row: dict[str, Any]) -> str:
        # Before it has a key a row may stand in the source twice.
        return f"{stage} {row['key'] or (self._task().id, row['uri'], row['start'], row.get('row'))}"


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class _Counts:
    def __init__(self) -> None:
        self._begun: collections.Counter[str] = collections.Counter()

    def begin(self, work: str, ended: str | None = None) -> int:
        """How often it was begun before and never ended."""
        if ended is not None:
            self._begun.pop(ended, None)
        self._begun[work] += 1
        return self._begun[work] - 1

    def end(self, work: str) -> None:
        self._begun.pop(work, None)
