"""What many samples cost before the first is encoded or trained on: `python -m k5dist.benchmark scale --out FILE`.

Synthetic rows, no video: manifests are read and checked into columns, a cache's index is opened, an epoch's batches are
put in order. Every part runs in a process of its own, for its peak of memory. The files need about 1 KiB a row.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table

from k5dist.cache import layout
from k5dist.cache.order import EpochOrder, Stratum
from k5dist.cache.places import Stores, note_places
from k5dist.cache.shards import ShardStore
from k5dist.compose import compose, to_run_config
from k5dist.console import console, say
from k5dist.plan import ClusterFacts, RunPlan, make_plan

BATCH = 64
SHARD_ROWS = 64  # 512 MiB of clips of 121×768×1280, the fewest that a shard holds
BUCKETS = ((121, 768, 1280), (121, 1280, 768), (121, 1024, 1024))
ENCODING = layout.TextEncoding("{}", 0, 256)
WORDS = ["a", "red", "fox", "runs", "through", "fresh", "snow", "while", "light", "falls", "between", "trees"]


def caption(row: int) -> str:
    return " ".join(WORDS[(row * 7 + at) % len(WORDS)] for at in range(40)) + f" {row}"


def write_manifest(folder: Path, suffix: str, rows: int) -> Path:
    path = folder / f"clips{suffix}"
    uris = (f"s3://bucket/clips/{row // 1000:06d}/{row:09d}.mp4" for row in range(rows))
    if suffix == ".parquet":
        table = {"uri": list(uris), "caption": [caption(row) for row in range(rows)]}
        pq.write_table(pa.table(table), path)
        return path
    with path.open("w", newline="") as file:
        if suffix == ".csv":
            writer = csv.writer(file)
            writer.writerow(["uri", "caption"])
            writer.writerows((uri, caption(row)) for row, uri in enumerate(uris))
        else:
            file.writelines(json.dumps({"uri": uri, "caption": caption(row)}) + "\n" for row, uri in enumerate(uris))
    return path


def read_manifest(path: Path, rows: int) -> dict[str, Any]:
    from k5dist.precache.sources import read_datasets

    config = to_run_config(compose(["+flavour=t2v-tiny"]))
    dataset = dataclasses.replace(config.datasets[0], source=str(path))
    listing = read_datasets([dataset])
    assert (listing.rows.num_rows, listing.rejected.num_rows) == (rows, 0)
    return {"file_mib": path.stat().st_size / 2**20}


def write_index(folder: Path, rows: int) -> Path:
    """The index parts of a cache of `rows` samples, as shards of SHARD_ROWS leave them; no shards."""
    store = layout.samples(str(folder / "cache"))
    parts = Path(store.uri) / "index"
    parts.mkdir(parents=True)
    random = np.random.Generator(np.random.Philox(0))
    shape, size = [31, 96, 160, 16], 2 * 31 * 96 * 160 * 16
    tensors = [
        {"name": name, "shape": shape, "offset": at * size, "length": size} for at, name in enumerate(("a", "b"))
    ]
    for start in range(0, rows, SHARD_ROWS):
        table = []
        for row in range(start, min(start + SHARD_ROWS, rows)):
            frames, height, width = BUCKETS[row % len(BUCKETS)]
            cut = {"frames": frames, "height": height, "width": width, "start": 0.0, "end": None, "first_frame": False}
            place = {"shard": f"{start:024x}", "offset": 2 * size * (row - start), "length": 2 * size}
            table.append({"key": random.bytes(32).hex(), "crc32": 0, "tensors": tensors, "uri": f"{row}"} | cut | place)
        known = [{name: row[name] for name in store.schema.names if name in row} for row in table]
        pq.write_table(pa.Table.from_pylist(known, schema=store.schema), parts / f"{start:024x}.parquet")
    return folder / "cache"


def open_index(path: Path, rows: int) -> dict[str, Any]:
    assert layout.samples(str(path)).index().num_rows == rows
    return {"parts": -(-rows // SHARD_ROWS)}


def write_run(folder: Path, rows: int) -> Path:
    """A run's folder with its samples, and the index of their cache, in one part; no shards."""
    random = np.random.Generator(np.random.Philox(0))
    keys = sorted(random.bytes(16).hex() for _ in range(rows))
    captions = [caption(row) for row in range(rows)]
    layout.write_selection(str(folder / layout.SELECTION), layout.selection(keys, captions=[[c] for c in captions]))
    cache = str(folder / "cache")
    shape, size = [31, 96, 160, 16], 2 * 31 * 96 * 160 * 16
    tensors = [{"name": name, "shape": shape, "offset": at * size, "length": size} for at, name in enumerate("ab")]
    names = ("frames", "height", "width")
    sides = {name: [BUCKETS[row % 3][at] for row in range(rows)] for at, name in enumerate(names)}
    _write_part(layout.samples(cache), keys, 2 * size, tensors, sides)
    text = [{"name": "qwen", "shape": [50, 3584], "offset": 0, "length": 2 * 50 * 3584}]
    _write_part(layout.captions(cache, ENCODING), [layout.caption_key(c) for c in captions], 2 * 50 * 3584, text, {})
    layout.write_header(cache, _plan_of(folder).cache_fingerprint, "scale")
    return folder


def _write_part(store: ShardStore, keys: list[str], size: int, tensors: list[dict[str, Any]], more: dict) -> None:
    rows, fields = range(len(keys)), {field.name: field.type for field in store.schema}
    columns = {
        "key": keys,
        "shard": [f"{row // SHARD_ROWS:024x}" for row in rows],
        "offset": [size * (row % SHARD_ROWS) for row in rows],
        "length": [size] * len(keys),
        "tensors": pa.array([tensors], fields["tensors"]).take(pa.array([0] * len(keys))),
        **more,
    }
    table = pa.table({name: pa.array(column, fields[name]) for name, column in columns.items()})
    part = Path(store.uri) / "index" / "part.parquet"
    part.parent.mkdir(parents=True)
    pq.write_table(table, part)


def note_run(path: Path, rows: int) -> dict[str, Any]:
    """What precache ends with."""
    plan = _plan_of(path)
    selected = layout.read_selected(str(path / layout.SELECTION))
    note_places(str(path), selected, 0.01, Stores.of(plan.cache_uri, ENCODING, ""), [""])
    files = sum(file.stat().st_size for file in (path / "places").glob("*/*.parquet"))
    return {"bytes_a_row": files / rows}


def write_noted_run(folder: Path, rows: int) -> Path:
    note_run(write_run(folder, rows), rows)
    return folder


def open_run(path: Path, rows: int) -> dict[str, Any]:
    """What a training worker does before its first clip, and the places of its first batches."""
    from k5dist.train.feed import Dataset

    began = time.perf_counter()  # without the seconds that importing torch takes
    dataset = Dataset.open(_plan_of(path), ENCODING)
    batches = list(islice(dataset.epoch(0, 0, BATCH).batches(), 2))
    opened = time.perf_counter() - began
    assert sum(stratum.count for stratum in dataset.strata) == rows
    found = [dataset.places.row(row)["key"] for batch in batches for row in batch.rows]
    return {"opened_seconds": opened, "ms_a_place": 1e3 * (time.perf_counter() - began - opened) / len(found)}


def _plan_of(folder: Path) -> RunPlan:
    plan = make_plan(to_run_config(compose(["+flavour=t2v-tiny"])), ClusterFacts(0), "scale")
    return dataclasses.replace(plan, run_uri=str(folder), cache_uri=str(folder / "cache"))


def order_epoch(_: Path, rows: int) -> dict[str, Any]:
    """All of it, batch by batch, and the last batch alone."""
    thirds = [rows * at // 3 for at in range(4)]
    strata = [
        Stratum(bucket, "main", 1, None, held_out=False, first=first, count=end - first)
        for bucket, first, end in zip(BUCKETS, thirds, thirds[1:], strict=False)
    ]
    order = EpochOrder(strata, seed=0, epoch=0, batch_size=BATCH)
    count = sum(1 for _ in order.batches())
    began = time.perf_counter()
    EpochOrder(strata, seed=0, epoch=1, batch_size=BATCH).batches(count - 1).__next__()
    return {"batches": count, "last_alone_ms": 1e3 * (time.perf_counter() - began)}


PARTS: dict[str, tuple[Callable[[Path, int], Path], Callable[[Path, int], dict[str, Any]]]] = {
    "read .jsonl": (lambda folder, rows: write_manifest(folder, ".jsonl", rows), read_manifest),
    "read .csv": (lambda folder, rows: write_manifest(folder, ".csv", rows), read_manifest),
    "read .parquet": (lambda folder, rows: write_manifest(folder, ".parquet", rows), read_manifest),
    "open the index": (write_index, open_index),
    "note a run's places": (write_run, note_run),
    "open a run": (write_noted_run, open_run),
    "order an epoch": (lambda folder, rows: folder, order_epoch),
}


def _alone(function: Callable[[str, Path, int], Any], part: str, path: Path, rows: int) -> Any:
    """Call it in a process of its own, begun from this small one: a process's peak of memory counts its parent's."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
        return alone.submit(function, part, path, rows).result()


def prepare(part: str, folder: Path, rows: int) -> Path:
    return PARTS[part][0](folder, rows)


def measure(part: str, path: Path, rows: int) -> dict[str, Any]:
    """In this process: the part's seconds, and the process's peak of memory."""
    start = time.perf_counter()
    facts = PARTS[part][1](path, rows)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, **facts}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m k5dist.benchmark.scale", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--rows", type=int, default=1_000_000)
    arguments = parser.parse_args(argv)
    found: dict[str, Any] = {"rows": arguments.rows, "parts": {}}
    for part in PARTS:
        say(f"{part}: preparing {arguments.rows:,} rows")
        with tempfile.TemporaryDirectory() as folder:
            path = _alone(prepare, part, Path(folder), arguments.rows)
            found["parts"][part] = _alone(measure, part, path, arguments.rows)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    table = Table(title=f"{arguments.rows:,} rows", title_justify="left", box=None)
    for name in ("part", "seconds", "peak MiB"):
        table.add_column(name)
    for part, row in found["parts"].items():
        table.add_row(part, f"{row['seconds']:.2f}", f"{row['peak_mib']:.0f}")
    console.print(table)


if __name__ == "__main__":
    main()
