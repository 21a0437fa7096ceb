"""Precache: sources → probe → decode → VAE, and captions → text encoders, streamed by Ray Data into the cache.

Idempotent: what the cache holds is found by content key and left alone, so a run that died goes on where it stopped
and a run without news encodes nothing.
"""

from __future__ import annotations

import collections
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from k5dist import storage
from k5dist.cache import layout, orders
from k5dist.cache.places import Stores, forget_places, note_places
from k5dist.config import ConfigError, RunConfig
from k5dist.console import progress_bar, say
from k5dist.datasets import DatasetConfig
from k5dist.plan import RunPlan
from k5dist.pools import block_bytes, rows_per_block
from k5dist.precache import flow, stages, stream
from k5dist.precache.attempts import Attempts
from k5dist.precache.features import encode_features
from k5dist.precache.images import encode_images
from k5dist.precache.sources import Listing, read_datasets
from k5dist.precache.summary import Busy, Failure, Summary, bucket_name, write_ledger
from k5dist.precache.texts import all_captions, encode_captions, installed_encoding, prompts
from k5dist.retry import StorageUnavailable

_PROBES_PER_BLOCK = 64
_PROBE_BLOCKS = 2048  # at most: each is an object of Ray's


class PrecacheError(Exception):
    """Too many clips failed; the ledger says which and why."""


def check_source(plan: RunPlan) -> Listing:
    """The datasets' rows; raises ConfigError for what can be known before anything is allocated."""
    config = plan.config
    listing = read_datasets(config.datasets)
    if "train" not in config.stages or any(dataset.segments != "first" for dataset in config.datasets):
        return listing
    of_dataset = {dataset.name: _times_an_epoch(dataset) for dataset in config.datasets}
    names = pc.value_counts(listing.rows.column("dataset")).to_pylist()
    clips = int(sum(entry["counts"] * of_dataset[entry["values"]] for entry in names) + 1e-6)
    if clips < plan.batch_size:
        rule = f"the dataset has {clips} clips: no bucket can fill a batch"
        raise ConfigError("train.batch_size", plan.batch_size, rule, f"train.batch_size={max(clips, 1)} or less")
    return listing


def _times_an_epoch(dataset: DatasetConfig) -> float:
    """How often a clip counts in an epoch, on average."""
    return dataset.repeats * (1.0 if dataset.probability is None else dataset.probability)


def precache(plan: RunPlan, listing: Listing) -> Summary:
    """Bring the cache of `plan` up to date with its datasets. Ray must be initialised.

    Raises:
        PrecacheError: when more than `precache.max_failure_ratio` of the clips failed (what succeeded is kept).
    """
    stream.prepare()
    layout.write_header(plan.cache_uri, plan.cache_fingerprint, plan.pretrained_identity)
    summary = Summary(vae=Busy(plan.pools.vae.workers))
    for row in listing.rejected.to_pylist():
        summary.counts[row["dataset"], "", "seen"] += 1
        summary.fail(Failure(row["dataset"], row["uri"], 0.0, "manifest", row["reason"]))
    encoding = ray.get(installed_encoding.remote(plan.config))
    try:
        encode_captions(plan, encoding, all_captions(plan, listing), summary)
        chosen = _encode_clips(plan, listing, summary)
        if plan.config.validation.images:
            ray.get(ray.remote(**stream.resources(plan.pools.vae))(encode_images).remote(plan, plan.world.device))
    except BaseException as error:
        if not isinstance(error, StorageUnavailable):  # the ledger would only wait for it once more
            # What was not come to keeps what is said of it.
            write_ledger(plan.cache_uri, summary.failures, {failure.uri for failure in summary.failures})
        raise
    _write_ledger(plan, listing, summary)
    _check_failures(plan.config, summary)
    _select(plan, chosen, encoding)
    return summary


def _encode_clips(plan: RunPlan, listing: Listing, summary: Summary) -> pa.Table:
    """Returns the selection of all samples that are in the cache in the end."""
    probed = _probe(plan, listing)
    for row in probed.select(["dataset", "frames", "height", "width"]).to_pylist():
        summary.count("seen", row)
    for row in probed.filter(pc.field("error") != "").to_pylist():
        summary.fail(_failure(row))
    good = probed.filter(pc.field("error") == "")
    by_key: dict[str, list[int]] = {}
    for at, key in enumerate(good.column("key").to_pylist()):
        by_key.setdefault(key, []).append(at)
    _check_batch(plan, _take(good, [rows[0] for rows in by_key.values()]))
    store = layout.samples(plan.cache_uri)
    known, groups = orders.settle(store, list(by_key), plan.rows_per_shard(plan.sample_bytes))
    for row in good.filter(pc.field("key").isin(pa.array(list(known), pa.string()))).to_pylist():
        summary.count("cached_before", row)
    keys = [key for group in groups for key in group if key is not None]
    if not keys:
        say(f"clips: all {good.num_rows} are in the cache, nothing to encode")
        orders.finish(store, known)
        known = _with_features(plan, good, by_key, known, summary)
        return _chosen(plan, listing, good, by_key, known)
    todo = dict(zip(keys, _take(good, [by_key[key][0] for key in keys]).to_pylist(), strict=True))
    with progress_bar("clips", len(todo)) as bar:

        def count(table: pa.Table) -> None:
            off = pc.max(table.column("tiling_error")).as_py()
            if off:
                say(f"spatial tiles: latents are off by {off:.1%} (in the middle of a clip, relative)")
            for began, ended in zip(
                *(table.column(name).to_pylist() for name in ("vae_began", "vae_ended")), strict=True
            ):
                summary.vae.add(began, ended)
            for done in table.to_pylist():  # one file under two names is decoded once, and fails under both
                twins = _take(good, by_key[done["key"]]).to_pylist()
                if done["error"]:
                    for twin in twins:
                        failure = _failure(twin | {"error": done["error"], "stage": done["stage"]})
                        summary.fail(failure, bucket_name(twin))
                else:
                    summary.count("encoded", twins[0])
            bar.advance(table.num_rows)
            _check_failures(plan.config, summary)

        stream.consume(_clip_dataset(plan, todo, groups), count)
    known = store.keys()
    orders.finish(store, known | by_key.keys())
    known = _with_features(plan, good, by_key, known, summary)
    return _chosen(plan, listing, good, by_key, known)


def _with_features(
    plan: RunPlan, good: pa.Table, by_key: dict[str, list[int]], known: set[str], summary: Summary
) -> set[str]:
    """Those of `known` that CREPA can use, where it is on: samples whose features cannot be encoded are failures."""
    if not plan.features_id:
        return known
    keys = [key for key in by_key if key in known]
    rows = dict(zip(keys, _take(good, [by_key[key][0] for key in keys]).to_pylist(), strict=True))
    lost = encode_features(plan, rows, stream.resources(plan.pools.vae)) if rows else []
    for row in lost:
        summary.fail(_failure(row), bucket_name(row))
    _check_failures(plan.config, summary)
    return known - {row["key"] for row in lost}


def _chosen(plan: RunPlan, listing: Listing, good: pa.Table, by_key: dict[str, list[int]], known: set[str]) -> pa.Table:
    """The run's samples: those of `good` that are in the cache.

    What several rows hold alike is one sample, of the dataset named first, with the captions of all of them.
    """
    keys = [key for key in by_key if key in known]
    of_name = {dataset.name: dataset for dataset in plan.config.datasets}
    names, rows = good.column("dataset").to_pylist(), good.column("row").to_pylist()
    captions = listing.rows.column("captions").to_pylist()
    datasets = [names[by_key[key][0]] for key in keys]
    return layout.selection(
        keys,
        datasets=datasets,
        captions=[list(dict.fromkeys(text for at in by_key[key] for text in captions[rows[at]])) for key in keys],
        repeats=[of_name[name].repeats for name in datasets],
        probability=[of_name[name].probability for name in datasets],
    )


def _check_batch(plan: RunPlan, samples: pa.Table) -> None:
    """Refuse a batch that no bucket can fill before anything is encoded; the workers count exactly."""
    if "train" not in plan.config.stages or not samples.num_rows:
        return
    of_dataset = {dataset.name: _times_an_epoch(dataset) for dataset in plan.config.datasets}
    counts: dict[str, float] = collections.defaultdict(float)
    for row in samples.select(["dataset", "frames", "height", "width"]).to_pylist():
        counts[bucket_name(row)] += of_dataset[row["dataset"]]
    name = max(counts, key=lambda name: counts[name])
    count = max(1, int(counts[name] + 1e-6))
    if count < plan.batch_size:
        rule = f"a batch holds clips of one bucket, and the largest ({name}) has {count} clips"
        raise ConfigError("train.batch_size", plan.batch_size, rule, f"train.batch_size={count} or less, or more clips")


def _probe(plan: RunPlan, listing: Listing) -> pa.Table:
    """One row a sample, in the order of the listing, of which `row` names the row; without the captions."""
    config, total = plan.config, listing.rows.num_rows
    table = listing.rows.drop_columns(["captions"]).append_column("row", pa.array(range(total), pa.int64()))
    for name, value in (("error", ""), ("stage", ""), ("key", ""), ("crop", ""), ("mask", "")):
        table = table.append_column(name, pa.array([value] * total, pa.string()))
    for name in ("frames", "height", "width", "crop_seed"):
        table = table.append_column(name, pa.array([0] * total, pa.int64()))
    table = table.append_column("frame_rate", pa.array([0.0] * total, pa.float64()))
    facts = {"pretrained": plan.pretrained_identity, "first_frame": config.flavour.task == "i2v"}
    blocks = stream.slices(table, max(_PROBES_PER_BLOCK, -(-total // _PROBE_BLOCKS)))
    dataset = ray.data.from_arrow(blocks).flat_map(
        partial(
            stages.probe_clip,
            datasets={dataset.name: dataset for dataset in config.datasets},
            unit=config.side_unit,
            facts=facts,
            attempts=Attempts(),
        ),
        num_cpus=0.5,
    )
    probed: list[pa.Table] = []
    with progress_bar("probe", total) as bar:

        def collect(part: pa.Table) -> None:
            probed.append(part.select(table.column_names).cast(table.schema))
            bar.advance(pc.count_distinct(part.column("row")).as_py())

        stream.consume(dataset, collect)
    return pa.concat_tables(probed).sort_by([("row", "ascending"), ("start", "ascending")])


def _clip_dataset(plan: RunPlan, todo: dict[str, dict[str, Any]], groups: list[orders.Group]) -> ray.data.Dataset:
    config = plan.config
    device, pool = plan.world.device, plan.pools.vae
    first_frame, attempts = config.flavour.task == "i2v", Attempts()
    rows = min(rows_per_block(plan.buckets), max(map(len, groups)))
    table, length = stream.grouped(todo, groups, multiple=rows)
    under_way = flow.measured(block_bytes(plan.buckets), length * plan.sample_bytes, pool.workers)
    dataset = ray.data.from_arrow(stream.slices(table, rows)).map(
        partial(stages.decode_row, attempts=attempts),
        compute=ray.data.TaskPoolStrategy(plan.pools.decode_tasks),
        **flow.decode_resources(under_way, pool),
    )
    dataset = dataset.map(
        stages.VaeStage,  # type: ignore[arg-type]  (Ray Data's map takes classes, its annotation functions)
        fn_constructor_args=(plan.pretrained, device, first_frame, attempts),
        fn_constructor_kwargs={
            "patch_conv": config.precache.vae_enable_patch_conv,
            "tiling": config.precache.vae_enable_tiling,
        },
        compute=ray.data.ActorPoolStrategy(size=pool.workers, max_tasks_in_flight_per_actor=2),
        **stream.resources(pool),
    )
    dataset = dataset.map_batches(
        partial(stages.write_samples, cache_uri=plan.cache_uri, attempts=attempts),
        batch_format="pyarrow",
        batch_size=length,
        compute=ray.data.TaskPoolStrategy(under_way.shards),
        num_cpus=0.25,
    )
    return flow.bound(dataset, under_way, length // rows)


def _take(table: pa.Table, rows: list[int]) -> pa.Table:
    """With the type said: Arrow cannot guess it of an empty list."""
    return table.take(pa.array(rows, pa.int64()))


def _failure(row: dict[str, Any]) -> Failure:
    return Failure(row["dataset"], row["uri"], row["start"], row["stage"], row["error"])


def _check_failures(config: RunConfig, summary: Summary) -> None:
    limit = config.precache.max_failure_ratio
    if len(summary.failures) > limit * summary.seen:
        _, uri, _, stage, reason = summary.failures[-1]
        raise PrecacheError(
            f"{len(summary.failures)} of {summary.seen} clips failed, more than precache.max_failure_ratio={limit}; "
            f"the last: {uri}: {stage}: {reason}. All are in failures.parquet of the cache"
        )


def _write_ledger(plan: RunPlan, listing: Listing, summary: Summary) -> None:
    uris = (table.column("uri").to_pylist() for table in (listing.rows, listing.rejected))
    write_ledger(plan.cache_uri, summary.failures, {uri for column in uris for uri in column})


def _select(plan: RunPlan, chosen: pa.Table, encoding: layout.TextEncoding) -> None:
    """Fix the run's samples: its batch order is a function of them, so a resumed run keeps the set it began with.

    Where they lie is written anew each time: what was mended lies elsewhere.
    """
    uri, selected = storage.join(plan.run_uri, layout.SELECTION), chosen
    if storage.exists(uri):
        selected = layout.read_selected(uri)
        if selected != chosen:
            say("note: the data has changed since this run began; it keeps its clips (resume=never starts anew)")
    else:
        forget_places(plan.run_uri)
        layout.write_selection(uri, chosen)
    stores = Stores.of(plan.cache_uri, encoding, plan.features_id)
    note_places(plan.run_uri, selected, plan.config.data.held_out, stores, prompts(plan.config))
