"""Precache: manifest → probe → decode → VAE, and captions → text encoders, streamed by Ray Data into the cache.

Idempotent: what the cache holds is found by content key and left alone, so a run that died goes on where it stopped
and a run without news encodes nothing.
"""

from __future__ import annotations

import collections
import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data

from k5dist import storage
from k5dist.cache import layout, orders
from k5dist.cache.shards import read_parquet
from k5dist.config import ConfigError, RunConfig
from k5dist.console import progress_bar, say
from k5dist.estimate import sample_cache_bytes
from k5dist.plan import RunPlan
from k5dist.precache import stages, stream
from k5dist.precache.attempts import Attempts
from k5dist.precache.manifest import Rejected, Row, read_source
from k5dist.retry import StorageUnavailable

Failure = tuple[str, float, str, str]  # uri, start, stage, reason
_PROBES_PER_BLOCK = 64


class PrecacheError(Exception):
    """Too many clips failed; the ledger says which and why."""


@dataclass
class Summary:
    """What a precache saw and did."""

    seen: int = 0
    encoded: int = 0
    cached_before: int = 0
    captions_encoded: int = 0
    failures: list[Failure] = field(default_factory=list)
    buckets: collections.Counter[str] = field(default_factory=collections.Counter)

    def rows(self) -> list[tuple[str, str]]:
        reasons = collections.Counter(f"{stage}: {reason}" for _, _, stage, reason in self.failures)
        rows = [
            ("clips", f"{self.seen} seen, {self.encoded} encoded, {self.cached_before} cached before"),
            ("captions", f"{self.captions_encoded} encoded"),
            ("buckets", ", ".join(f"{name}: {count}" for name, count in sorted(self.buckets.items())) or "none"),
            ("failed", str(len(self.failures))),
        ]
        return rows + [("", f"{count} × {reason}") for reason, count in reasons.most_common(5)]

    def metrics(self) -> dict[str, float]:
        counts = {"seen": self.seen, "encoded": self.encoded, "cached_before": self.cached_before}
        counts |= {"captions_encoded": self.captions_encoded, "failed": len(self.failures)}
        return {f"precache/{name}": float(count) for name, count in counts.items()}


def wanted_captions(config: RunConfig, rows: Iterable[Row]) -> list[str]:
    """Every text that training and validation will ask for, once each; the empty prompt is the dropped caption."""
    texts = ["", config.validation.negative_prompt, *config.validation.prompts, *(row.caption for row in rows)]
    return list(dict.fromkeys(texts))


def check_source(plan: RunPlan) -> tuple[list[Row], list[Rejected]]:
    """The source's rows; raises ConfigError for what can be known before anything is allocated."""
    config = plan.config
    if config.data.source is None:
        fix = "data.source=<folder, s3:// URI or manifest of captioned clips>"
        raise ConfigError("data.source", None, "precache needs clips", fix)
    rows, rejected = read_source(config.data.source)
    if "train" in config.stages and len(rows) < plan.batch_size:
        rule = f"the dataset has {len(rows)} clips: no bucket can fill a batch"
        raise ConfigError("train.batch_size", plan.batch_size, rule, f"train.batch_size={len(rows)} or less")
    return rows, rejected


def precache(plan: RunPlan, rows: list[Row], rejected: list[Rejected]) -> Summary:
    """Bring the cache of `plan` up to date with the source. Ray must be initialised.

    Raises:
        PrecacheError: when more than `precache.max_failure_ratio` of the clips failed (what succeeded is kept).
    """
    stream.prepare()
    layout.write_header(plan.cache_uri, plan.cache_fingerprint, plan.pretrained_identity)
    summary = Summary(seen=len(rows) + len(rejected))
    summary.failures = [(row.uri, 0.0, "manifest", row.reason) for row in rejected]
    encoding = ray.get(_installed_encoding.remote(plan.config))
    try:
        _encode_captions(plan, encoding, wanted_captions(plan.config, rows), summary)
        keys = _encode_clips(plan, rows, summary)
    except BaseException as error:
        if not isinstance(error, StorageUnavailable):  # the ledger would only wait for it once more
            _write_ledger(plan.cache_uri, summary.failures)
        raise
    _write_ledger(plan.cache_uri, summary.failures)
    _check_failures(plan.config, summary)
    _select(plan, keys)
    return summary


@ray.remote(num_cpus=0)
def _installed_encoding(config: RunConfig) -> layout.TextEncoding:
    from k5dist.model.encoders import text_encoding

    precache = config.precache
    return text_encoding(precache.prompt_template, precache.prompt_template_start, precache.max_text_tokens)


def _accelerator(plan: RunPlan) -> tuple[str, dict[str, Any]]:
    """Device of the encoders and what an encoder actor asks Ray for."""
    return ("cuda", {"num_gpus": 1, "num_cpus": 0}) if plan.world.device == "cuda" else ("cpu", {"num_cpus": 1})


def _encode_captions(plan: RunPlan, encoding: layout.TextEncoding, texts: list[str], summary: Summary) -> None:
    store = layout.captions(plan.cache_uri, encoding)
    config = plan.config.precache
    batch, row_bytes = config.text_batch_size, 2 * config.max_text_tokens * plan.config.model.in_text_dim
    # Captions of about one length make batches with little padding. A batch's padding shows in the last bits of its
    # features: the orders fix batches as well as shards.
    rows = {layout.caption_key(text): {"caption": text} for text in sorted(texts, key=lambda text: (len(text), text))}
    known, groups = orders.settle(store, list(rows), _whole_batches(_rows_per_shard(plan, row_bytes), batch))
    if not groups:
        say(f"captions: all {len(texts)} are in the cache, nothing to encode")
        orders.finish(store, known)
        return
    todo = sum(key is not None for group in groups for key in group)
    device, resources = _accelerator(plan)
    table, length = stream.grouped({key: {"key": key, **row} for key, row in rows.items()}, groups, multiple=batch)
    dataset = ray.data.from_arrow(stream.slices(table, batch)).map_batches(
        stages.TextStage,
        batch_size=batch,
        fn_constructor_args=(plan.pretrained, device, encoding, Attempts()),
        compute=ray.data.ActorPoolStrategy(size=1),
        **resources,
    )
    dataset = dataset.map_batches(
        partial(stages.write_captions, cache_uri=plan.cache_uri, encoding=encoding),
        batch_format="pyarrow",
        batch_size=length,
        num_cpus=0.25,
    )
    with progress_bar("captions", todo) as bar:
        stream.consume(dataset, lambda table: bar.advance(table.num_rows))
    orders.finish(store, known | rows.keys())
    summary.captions_encoded = todo


def _encode_clips(plan: RunPlan, rows: list[Row], summary: Summary) -> list[str]:
    """Returns the content keys of all rows that are in the cache in the end, in the source's order."""
    probed = _probe(plan, rows)
    _collect_failures(probed, summary)
    good = [row for row in probed if not row["error"]]
    summary.buckets.update(f"{row['frames']}×{row['height']}×{row['width']}" for row in good)
    _check_batch(plan, summary)
    store = layout.samples(plan.cache_uri)
    by_key: dict[str, list[dict[str, Any]]] = {}
    for row in good:
        by_key.setdefault(row["key"], []).append(row)
    known, groups = orders.settle(store, list(by_key), _rows_per_shard(plan, _sample_bytes(plan)))
    todo = {key: by_key[key][0] for group in groups for key in group if key is not None}
    summary.cached_before = sum(row["key"] in known for row in good)
    if not todo:
        say(f"clips: all {len(good)} are in the cache, nothing to encode")
        orders.finish(store, known)
    else:
        with progress_bar("clips", len(todo)) as bar:

            def count(table: pa.Table) -> None:
                finished = table.to_pylist()
                for row in finished:  # one file under two names is decoded once, and fails under both
                    twins = [{**twin, "error": row["error"], "stage": row["stage"]} for twin in by_key[row["key"]]]
                    _collect_failures(twins, summary)
                summary.encoded += sum(not row["error"] for row in finished)
                bar.advance(len(finished))
                _check_failures(plan.config, summary)

            stream.consume(_clip_dataset(plan, todo, groups), count)
        known = store.keys()
        orders.finish(store, known | by_key.keys())
    return list(dict.fromkeys(row["key"] for row in good if row["key"] in known))


def _check_batch(plan: RunPlan, summary: Summary) -> None:
    """Refuse a batch that no bucket can fill before anything is encoded; the workers count exactly."""
    if "train" not in plan.config.stages or not summary.buckets:
        return
    name, count = summary.buckets.most_common(1)[0]
    if count < plan.batch_size:
        rule = f"a batch holds clips of one bucket, and the largest ({name}) has {count} clips"
        raise ConfigError("train.batch_size", plan.batch_size, rule, f"train.batch_size={count} or less, or more clips")


def _probe(plan: RunPlan, rows: list[Row]) -> list[dict[str, Any]]:
    # Arrow has no infinity of types for None: an open end is -1 from here to the index.
    plain = [
        {"uri": row.uri, "caption": row.caption, "start": row.start, "end": -1.0 if row.end is None else row.end}
        | {"error": "", "stage": "", "key": "", "frames": 0, "height": 0, "width": 0}
        for row in rows
    ]
    facts = {
        "frame_rate": plan.config.data.frame_rate,
        "pretrained": plan.pretrained_identity,
        "first_frame": plan.config.flavour.task == "i2v",
    }
    buckets = [(bucket.frames, bucket.height, bucket.width) for bucket in plan.buckets]
    dataset = ray.data.from_arrow(stream.slices(pa.Table.from_pylist(plain), _PROBES_PER_BLOCK)).map(
        partial(stages.probe_row, buckets=buckets, facts=facts, attempts=Attempts()), num_cpus=0.5
    )
    probed: list[dict[str, Any]] = []
    with progress_bar("probe", len(rows)) as bar:

        def collect(table: pa.Table) -> None:
            probed.extend(table.to_pylist())
            bar.advance(table.num_rows)

        stream.consume(dataset, collect)
    return sorted(probed, key=lambda row: (row["uri"], row["start"]))


def _clip_dataset(plan: RunPlan, todo: dict[str, dict[str, Any]], groups: list[orders.Group]) -> ray.data.Dataset:
    config = plan.config
    device, resources = _accelerator(plan)
    workers = config.precache.vae_workers or (plan.world.size if device == "cuda" else 1)
    first_frame, attempts = config.flavour.task == "i2v", Attempts()
    table, length = stream.grouped(todo, groups)
    # A decoded clip is large (hundreds of megabytes): one row a block keeps memory in hand.
    dataset = ray.data.from_arrow(stream.slices(table, 1)).map(
        partial(stages.decode_row, frame_rate=config.data.frame_rate, attempts=attempts),
        num_cpus=1,
        concurrency=config.precache.decode_workers,
    )
    dataset = dataset.map(
        stages.VaeStage,  # type: ignore[arg-type]  (Ray Data's map takes classes, its annotation functions)
        fn_constructor_args=(plan.pretrained, device, first_frame, attempts),
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
        **resources,
    )
    return dataset.map_batches(
        partial(stages.write_samples, cache_uri=plan.cache_uri, attempts=attempts),
        batch_format="pyarrow",
        batch_size=length,
        num_cpus=0.25,
    )


def _sample_bytes(plan: RunPlan) -> int:
    largest = max(plan.buckets, key=lambda bucket: bucket.tokens)
    first_frame = plan.config.flavour.task == "i2v"
    return sample_cache_bytes(plan.config.model, largest, first_frame=first_frame, text_tokens=0)


def _rows_per_shard(plan: RunPlan, row_bytes: int) -> int:
    return max(1, int(plan.config.precache.shard_size_mib * 2**20 // row_bytes))


def _whole_batches(rows: int, batch: int) -> int:
    return -(-rows // batch) * batch


def _collect_failures(rows: list[dict[str, Any]], summary: Summary) -> None:
    summary.failures += [(row["uri"], row["start"], row["stage"], row["error"]) for row in rows if row["error"]]


def _check_failures(config: RunConfig, summary: Summary) -> None:
    limit = config.precache.max_failure_ratio
    if len(summary.failures) > limit * summary.seen:
        uri, _, stage, reason = summary.failures[-1]
        raise PrecacheError(
            f"{len(summary.failures)} of {summary.seen} clips failed, more than precache.max_failure_ratio={limit}; "
            f"the last: {uri}: {stage}: {reason}. All are in failures.parquet of the cache"
        )


def _write_ledger(cache_uri: str, failures: list[Failure]) -> None:
    """`failures.parquet` holds what fails now; `count` says in how many runs in a row."""
    uri = layout.failures_uri(cache_uri)
    before: dict[tuple[str, float, str], int] = {}
    if storage.exists(uri):
        before = {(r["uri"], r["start"], r["stage"]): r["count"] for r in read_parquet(uri).to_pylist()}
    rows = [
        {"uri": uri, "start": start, "stage": stage, "reason": reason, "count": before.get((uri, start, stage), 0) + 1}
        for uri, start, stage, reason in failures
    ]
    data = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=layout.FAILURE_SCHEMA), data)
    storage.publish_bytes(uri, data.getvalue())


def _select(plan: RunPlan, keys: list[str]) -> None:
    """Fix the run's samples: its batch order is a function of them, so a resumed run keeps the set it began with."""
    uri = storage.join(plan.run_uri, layout.SELECTION)
    if storage.exists(uri):
        if layout.read_selection(uri) != sorted(keys):
            say("note: the data has changed since this run began; it keeps its clips (resume=never starts anew)")
        return
    layout.write_selection(uri, keys)
