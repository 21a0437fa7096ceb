"""How often a row's worker died under it: Ray starts the work again without end, and this sets it one.

A clip may kill its worker each time (out of memory, a fault in a codec's C code), and nothing in the worker can say so
afterwards. One actor on the driver's node therefore counts beginnings without an end; at the limit the row is given up
with a reason. A worker that dies for another reason, with its node say, costs a clip one of its attempts.
"""

from __future__ import annotations

import collections
import uuid
from collections.abc import Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

MAX_DEATHS = 3
# What has ended in this process and has not been told yet: it goes with the next beginning, since a call of its own for
# each row and stage would cost as much as a small clip's work. What a dying process never tells costs a row, where it
# must be done again, one of its attempts.
_ENDED: dict[str, list[str]] = {}


class Attempts:
    """A handle that goes into tasks; `begin` and `end` embrace the work on one row."""

    def __init__(self) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self._id = uuid.uuid4().hex
        self._actor: Any = _Counts.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]

    def begin(self, stage: str, row: dict[str, Any]) -> str | None:
        """Why this row must not be tried again, if so."""
        deaths: Any = ray.get(self._actor.begin.remote(_work(stage, row), _ENDED.pop(self._id, [])))
        if deaths < MAX_DEATHS:
            return None
        return f"its worker died {deaths} times (killed, out of memory, or a fault in a codec)"

    def end(self, stage: str, row: dict[str, Any]) -> None:
        _ENDED.setdefault(self._id, []).append(_work(stage, row))


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class _Counts:
    def __init__(self) -> None:
        self._begun: collections.Counter[str] = collections.Counter()

    def begin(self, work: str, ended: Sequence[str]) -> int:
        """How often it was begun before and never ended."""
        for other in ended:
            self._begun.pop(other, None)
        self._begun[work] += 1
        return self._begun[work] - 1


def _work(stage: str, row: dict[str, Any]) -> str:
    # Before it has a key a row may stand in the source twice; a task that is started again keeps its id.
    task = ray.get_runtime_context().get_task_id()
    return f"{stage} {row['key'] or (task, row['uri'], row['start'], row.get('row'))}"
