"""Groups of rows through Ray Data: each comes out as one batch, whatever is slow, killed or done again on the way.

Ray Data keeps blocks in their order on request, and cuts batches of R rows out of them. So every group is filled up to
R rows with padding, every row stays a row to the end (a failure is a column, never an exception), and blocks never
straddle two groups: then batch n is group n. `one_group` checks it all the same before anything is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.exceptions import RayTaskError

from k5dist.cache.orders import Group
from k5dist.config import ConfigError
from k5dist.pools import Pool
from k5dist.retry import StorageUnavailable

PADDING = ""  # the key of a row that is nothing
_READABLE = (StorageUnavailable, ConfigError)


def prepare() -> None:
    """What Ray Data must be told once, before the first dataset is made."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True


def slices(table: pa.Table, rows: int) -> list[pa.Table]:
    return [table.slice(at, rows) for at in range(0, table.num_rows, rows)]


def grouped(rows: Mapping[str, Mapping[str, Any]], groups: Sequence[Group], multiple: int = 1) -> tuple[pa.Table, int]:
    """The rows of `groups` by their keys, padded to one length, a multiple of `multiple`; and that length."""
    length = -(-max(map(len, groups)) // multiple) * multiple
    example = next(iter(rows.values()))
    nothing = {name: type(value)() for name, value in example.items()} | {"key": PADDING}
    plain = [
        {**(nothing if key is None else rows[key]), "group": number}
        for number, group in enumerate(groups)
        for key in (*group, *(None,) * (length - len(group)))
    ]
    return pa.Table.from_pylist(plain), length


def is_padding(row: Mapping[str, Any]) -> bool:
    return "group" in row and row["key"] == PADDING


def one_group(table: pa.Table) -> pa.Table:
    """The batch without its padding; raises where it is not one whole group."""
    if len(set(table.column("group").to_pylist())) != 1:
        raise RuntimeError("Ray Data cut a batch across two groups: shards would depend on timing")
    return table.filter(pa.array([key != PADDING for key in table.column("key").to_pylist()], pa.bool_()))


def consume(dataset: ray.data.Dataset, take: Callable[[pa.Table], None]) -> None:
    """Every block of the result; a fault that the user can read is raised as itself, without Ray's wrapping."""
    try:
        for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            take(table)  # type: ignore[arg-type]
    except Exception as error:
        said = _readable(error)
        if said is None or said is error:
            raise
        raise said from None


def _readable(error: BaseException | None) -> BaseException | None:
    for _ in range(10):  # Ray wraps once a border, and its wrapper is an instance of what it wraps
        if error is None or (isinstance(error, _READABLE) and not isinstance(error, RayTaskError)):
            return error
        error = error.cause if isinstance(error, RayTaskError) else error.__cause__
    return None


def resources(pool: Pool) -> dict[str, Any]:
    """What one worker of a pool asks Ray for."""
    return {"num_gpus": pool.gpus, "num_cpus": 0} if pool.gpus else {"num_cpus": core(pool)}


def core(pool: Pool) -> float:
    """A CPU core, or less where the cluster has too few for all of a pool's workers and a decoder: they would wait for
    one another for ever."""
    cores, sharers = ray.cluster_resources().get("CPU", 0), 1 + (0 if pool.gpus else pool.workers)
    return 1 if cores >= sharers else math.floor(90 * cores / sharers) / 100
