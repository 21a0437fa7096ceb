"""How many bytes may be under way between decoding, encoding and writing, whatever the dataset's size.

Ray Data budgets the object store by what tasks have given so far. Before the first decoded clip is there it knows
nothing, starts a task on every core, and the store spills to disk. Here decoding waits instead until what is under way
has room: the plan says how many decoded blocks fit (`k5dist/pools.py`), and this counts them.

It stands on two interfaces that Ray Data does not promise, a back-pressure policy and the counters of its operators;
`tests/cluster/test_backpressure.py` says at once where a release changes them.
"""

from __future__ import annotations

from typing import Any

import ray
import ray.data
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
)
from ray.data._internal.execution.backpressure_policy.backpressure_policy import BackpressurePolicy
from ray.data._internal.execution.operators.map_operator import MapOperator

from k5dist.pools import Flow, Pool, settle_flow
from k5dist.precache.stream import core

_COPIES = 3  # of a block's pixels in a decoding process: frames, the row, the block made of it
_PROCESS_BYTES = 160 * 2**20  # of one without pixels
_KEY = "k5dist.flow"


def measured(block_bytes: int, shard_bytes: int, workers: int) -> Flow:
    """The flow in the object stores that the cluster has; Ray must be initialised."""
    store = int(ray.cluster_resources().get("object_store_memory", 0))
    return settle_flow(store, block_bytes, shard_bytes, workers)


def decode_resources(flow: Flow, pool: Pool) -> dict[str, Any]:
    """What a decoding task beside `pool` asks Ray for.

    A core, and its process's memory, so that as many run as a node can hold. To ask for other things than the encoders
    also keeps Ray Data from putting both into one process, one after another.
    """
    least = min(node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"])
    return {"num_cpus": core(pool), "memory": max(1, min(_PROCESS_BYTES + _COPIES * flow.block_bytes, int(least) // 2))}


def bound(dataset: ray.data.Dataset, flow: Flow, blocks_per_shard: int) -> ray.data.Dataset:
    """The same dataset, of three maps (decode, encode, write), kept within `flow`."""
    policies = [*ENABLED_BACKPRESSURE_POLICIES, BytesUnderWay]
    dataset.context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, policies)
    # One shard more than is being written collects, and a clip that is slow may hold up those behind it.
    dataset.context.set_config(_KEY, (flow.blocks, (flow.shards + 1) * blocks_per_shard))
    return dataset


class BytesUnderWay(BackpressurePolicy):
    """No further block is decoded while `flow.blocks` wait to be encoded, or as many shards as fit to be written."""

    def __init__(self, data_context: Any, topology: Any, resource_manager: Any) -> None:
        super().__init__(data_context, topology, resource_manager)
        self.decoded, self.encoded = data_context.get_config(_KEY)
        maps = [operator for operator in topology if isinstance(operator, MapOperator)]
        assert len(maps) == 3, f"decode, encode and write are apart: {[operator.name for operator in maps]}"
        self.decode, self.encode, self.write = maps

    def can_add_input(self, op: Any) -> bool:
        if op is not self.decode:
            return True
        decode, encode, write = (operator.metrics for operator in (self.decode, self.encode, self.write))
        # Not what was begun less what is encoded: a task whose worker dies gives nothing, and would count for ever.
        decoded = decode.num_tasks_running + decode.num_task_outputs_generated - encode.num_task_inputs_processed
        encoded = encode.num_task_outputs_generated - write.num_task_inputs_processed
        return decoded < self.decoded and decoded + encoded < self.decoded + self.encoded
