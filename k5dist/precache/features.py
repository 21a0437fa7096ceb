"""CREPA's features into the cache: sources → decode → vision encoder, for the samples that have none of this encoder.

Apart from the latents and in a store of their own, so that another encoder or size encodes features again and nothing
else, and a cache made without them can be given them later.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from k5dist.cache import layout, orders
from k5dist.cache.shards import Record
from k5dist.config import CrepaConfig
from k5dist.console import progress_bar, say
from k5dist.estimate import feature_cache_bytes
from k5dist.plan import RunPlan
from k5dist.pools import block_bytes
from k5dist.precache import flow, stages, stream
from k5dist.precache.attempts import Attempts
from k5dist.precache.stages import Rows


class FeatureStage:
    """An actor with the vision encoder: `pixels` → features as bf16 bits."""

    def __init__(self, crepa: CrepaConfig, device: str, attempts: Attempts | None = None) -> None:
        from k5dist.model.encoders import to_bits
        from k5dist.model.vision import VisionEncoder

        self.encoder, self.to_bits, self.attempts = VisionEncoder(crepa, device), to_bits, attempts

    def __call__(self, row: Rows) -> Rows:
        pixels = row.pop("pixels")
        row.pop("mask_grid", None)
        nothing: Rows = {"tensors": [], "shapes": [], "names": []}
        return stages._guarded(
            row, "features", self.attempts, partial(self._encode, pixels=pixels, nothing=nothing), nothing
        )

    def _encode(self, row: Rows, *, pixels: np.ndarray, nothing: Rows) -> Rows:
        try:
            bits = self.to_bits(self.encoder.encode(pixels))
        except Exception as error:
            return row | nothing | stages._failed("features", f"{type(error).__name__}: {error}")
        return row | {"names": ["features"], "tensors": [bits.tobytes()], "shapes": [list(bits.shape)]}


def write_features(table: pa.Table, *, cache_uri: str, features_id: str) -> pa.Table:
    """One shard of the rows that have features; passes on what the ledger needs."""
    table = stream.one_group(table)
    good = {row["key"]: row for row in table.to_pylist() if not row["error"]}
    records = [Record(row["key"], stages._arrays(row), {"uri": row["uri"]}) for row in good.values()]
    if records:
        layout.features(cache_uri, features_id).write(records)
    return table.select(["key", "error", "stage"])


def encode_features(plan: RunPlan, rows: dict[str, dict[str, Any]], resources: dict[str, Any]) -> list[Rows]:
    """Bring the features of `rows` (by key) up to date; the rows that failed, with `error` and `stage`."""
    store = layout.features(plan.cache_uri, plan.features_id)
    largest = max(plan.buckets, key=lambda bucket: bucket.tokens)
    row_bytes = feature_cache_bytes(plan.config.crepa, largest)
    known, groups = orders.settle(store, list(rows), plan.rows_per_shard(row_bytes))
    keys = [key for group in groups for key in group if key is not None]
    if not keys:
        say(f"features: those of all {len(rows)} clips are in the cache, nothing to encode")
        orders.finish(store, known)
        return []
    attempts = Attempts()
    device, pool = plan.world.device, plan.pools.vae  # it works in turn with the VAE, and is smaller
    table, length = stream.grouped({key: rows[key] for key in keys}, groups)
    under_way = flow.measured(block_bytes(plan.buckets), length * row_bytes, pool.workers)
    dataset = ray.data.from_arrow(stream.slices(table, 1)).map(
        partial(stages.decode_row, attempts=attempts),
        compute=ray.data.TaskPoolStrategy(plan.pools.decode_tasks),
        **flow.decode_resources(under_way, pool),
    )
    dataset = dataset.map(
        FeatureStage,  # type: ignore[arg-type]  (Ray Data's map takes classes, its annotation functions)
        fn_constructor_args=(plan.config.crepa, device, attempts),
        compute=ray.data.ActorPoolStrategy(size=pool.workers, max_tasks_in_flight_per_actor=2),
        **resources,
    ).map_batches(
        partial(write_features, cache_uri=plan.cache_uri, features_id=plan.features_id),
        batch_format="pyarrow",
        batch_size=length,
        compute=ray.data.TaskPoolStrategy(under_way.shards),
        num_cpus=0.25,
    )
    dataset = flow.bound(dataset, under_way, length)
    lost: list[Rows] = []
    with progress_bar("features", len(keys)) as bar:

        def count(table: pa.Table) -> None:
            lost.extend(rows[done["key"]] | done for done in table.to_pylist() if done["error"])
            bar.advance(table.num_rows)

        stream.consume(dataset, count)
    orders.finish(store, store.keys() | rows.keys())
    return lost
