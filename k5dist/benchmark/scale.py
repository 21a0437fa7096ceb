"""What many samples cost before the first is encoded or trained on: `python -m k5dist.benchmark scale --out FILE`.

Synthetic rows, no video: manifests are read and checked into columns, a cache's index is opened, an epoch's batches are
put in order. Every part runs in a process of its own, for its peak of memory. The files need about 1 KiB a row.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table

from k5dist.cache import layout
from k5dist.cache.order import epoch_batches
from k5dist.cache.rows import write_rows
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
    """A run's folder: its samples, where each lies and what it is called, as precache leaves them; no cache."""
    random = np.random.Generator(np.random.Philox(0))
    keys = sorted(random.bytes(16).hex() for _ in range(rows))
    selected = layout.selection(keys, captions=[[caption(row)] for row in range(rows)])
    layout.write_selection(str(folder / layout.SELECTION), selected)
    size = 2 * 31 * 96 * 160 * 16
    tensors = [{"name": name, "shape": [31, 96, 160, 16], "offset": 0, "length": size} for name in ("mean", "logvar")]
    columns: dict[str, Any] = {
        "shard": [f"{row // SHARD_ROWS:024x}" for row in range(rows)],
        "offset": [2 * size * (row % SHARD_ROWS) for row in range(rows)],
        "length": [2 * size] * rows,
        "tensors": pa.array([tensors], layout.samples("").schema.field("tensors").type).take(pa.array([0] * rows)),
    }
    place = pa.table({"key": keys, **columns, "captions": selected.column("captions")})
    for at, name in enumerate(("frames", "height", "width")):
        place = place.append_column(name, pa.array([BUCKETS[row % 3][at] for row in range(rows)], pa.int32()))
    stores = layout.samples(str(folder / "cache")), layout.captions(str(folder / "cache"), ENCODING)
    write_rows(str(folder / layout.PLACES), layout.noted(place, *stores))
    write_rows(str(folder / layout.TEXTS), stores[1].schema.empty_table())
    layout.write_header(str(folder / "cache"), _plan_of(folder).cache_fingerprint, "scale")
    return folder


def open_run(path: Path, rows: int) -> dict[str, Any]:
    """What a training worker does before its first clip, and the reading of a hundred clips' places."""
    from k5dist.train.feed import Dataset

    began = time.perf_counter()  # without the seconds that importing torch takes
    dataset = Dataset.open(_plan_of(path), ENCODING)
    opened = time.perf_counter() - began
    assert len(dataset.keys) == rows
    some = range(0, rows, max(1, rows // 100))
    for row in some:
        dataset.rows.row(row)
    return {"opened_seconds": opened, "ms_a_place": 1e3 * (time.perf_counter() - began - opened) / len(some)}


def _plan_of(folder: Path) -> RunPlan:
    plan = make_plan(to_run_config(compose(["+flavour=t2v-tiny", "data.held_out=0"])), ClusterFacts(0), "scale")
    return dataclasses.replace(plan, run_uri=str(folder), cache_uri=str(folder / "cache"))


def order_epoch(_: Path, rows: int) -> dict[str, Any]:
    random = np.random.Generator(np.random.Philox(0))
    keys = [random.bytes(32).hex() for _ in range(rows)]
    batches = epoch_batches(keys, [BUCKETS[row % 3] for row in range(rows)], seed=0, epoch=0, batch_size=BATCH)
    return {"batches": len(batches)}


PARTS: dict[str, tuple[Callable[[Path, int], Path], Callable[[Path, int], dict[str, Any]]]] = {
    "read .jsonl": (lambda folder, rows: write_manifest(folder, ".jsonl", rows), read_manifest),
    "read .csv": (lambda folder, rows: write_manifest(folder, ".csv", rows), read_manifest),
    "read .parquet": (lambda folder, rows: write_manifest(folder, ".parquet", rows), read_manifest),
    "open the index": (write_index, open_index),
    "open a run": (write_run, open_run),
    "order an epoch": (lambda folder, rows: folder, order_epoch),
}


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
    parser.add_argument("--part", nargs=2, metavar=("NAME", "PATH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.part:
        part, path = arguments.part
        arguments.out.write_text(json.dumps(measure(part, Path(path), arguments.rows)))
        return
    found: dict[str, Any] = {"rows": arguments.rows, "parts": {}}
    for part, (prepare, _) in PARTS.items():
        say(f"{part}: preparing {arguments.rows:,} rows")
        with tempfile.TemporaryDirectory() as folder:
            path, result = prepare(Path(folder), arguments.rows), Path(folder) / "result.json"
            command = [sys.executable, "-m", "k5dist.benchmark.scale", "--out", str(result)]
            subprocess.run([*command, "--rows", str(arguments.rows), "--part", part, str(path)], check=True)
            found["parts"][part] = json.loads(result.read_text())
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    table = Table(title=f"{arguments.rows:,} rows", title_justify="left", box=None)
    for name in ("part", "seconds", "peak MiB"):
        table.add_column(name)
    for part, row in found["parts"].items():
        table.add_row(part, f"{row['seconds']:.2f}", f"{row['peak_mib']:.0f}")
    console.print(table)


if __name__ == "__main__":
    main()
