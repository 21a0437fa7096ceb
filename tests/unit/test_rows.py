"""Rows of a sorted file by number and by key, and a training set that opens without the cache's index."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from k5dist import storage
from k5dist.cache import layout, rows
from k5dist.config import ConfigError
from k5dist.train.feed import Dataset
from tests.distributed.gangs import make_run, plan_encoding


@pytest.fixture(params=[1, 999, 1024, 5000])
def numbered(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[rows.Rows, int]:
    """Keys 0000, 0002, … with their number, in row groups."""
    uri, count = str(tmp_path / "rows.parquet"), request.param
    keys = [f"{2 * at:05d}" for at in range(count)]
    table = pa.table({"key": keys, "number": list(range(count)), "other": [0] * count})
    rows.write_rows(uri, table.take(list(reversed(range(count)))))
    return rows.Rows(uri, ["number"]), count


def test_rows_by_number_and_by_key(numbered: tuple[rows.Rows, int]) -> None:
    found, count = numbered
    assert found.num_rows == count
    for at in {0, count // 2, count - 1, min(count - 1, 1023), min(count - 1, 1024)}:
        expected = {"key": f"{2 * at:05d}", "number": at}
        assert found.row(at) == found.find(f"{2 * at:05d}") == expected
        assert found.find(f"{2 * at + 1:05d}") is None
    assert found.find("") is None


def test_nothing_is_found_in_an_empty_file(tmp_path: Path) -> None:
    uri = str(tmp_path / "rows.parquet")
    rows.write_rows(uri, pa.table({"key": pa.array([], pa.string())}))
    assert rows.Rows(uri, []).find("a") is None


def test_few_row_groups_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "GROUP_ROWS", 2)
    monkeypatch.setattr(rows, "_KEPT_GROUPS", 3)
    uri = str(tmp_path / "rows.parquet")
    rows.write_rows(uri, pa.table({"key": [f"{at:02d}" for at in range(40)]}))
    found = rows.Rows(uri, [])
    assert [found.row(at)["key"] for at in (39, 0, 20, 39, 8)] == ["39", "00", "20", "39", "08"]
    assert len(found._groups) == 3


def test_a_run_opens_and_reads_without_the_index(tiny_t2v: Path, tmp_path: Path) -> None:
    plan = make_run(tmp_path, tiny_t2v, "run")
    encoding = plan_encoding(plan)
    cache = layout.samples(plan.cache_uri)
    index = cache.index().to_pylist()
    shutil.rmtree(storage.join(plan.cache_uri, "index"))
    shutil.rmtree(storage.join(layout.captions(plan.cache_uri, encoding).uri, "index"))
    dataset = Dataset.open(plan, encoding)
    assert dataset.keys == [row["key"] for row in index]
    assert dataset.buckets == [(row["frames"], row["height"], row["width"]) for row in index]
    clips = [dataset.read(at) for at in range(len(index))]
    assert len({clip.mean_THWC.sum().item() for clip in clips}) == len(index)
    assert torch.equal(clips[3].mean_THWC, dataset.read_drawn(3, 0, seed=0, epoch=1).mean_THWC)
    with pytest.raises(ConfigError, match="no text features of 'never seen'"):
        dataset.texts.get("never seen")


def test_what_was_noted_before_records_went_is_not_trusted(tiny_t2v: Path, tmp_path: Path) -> None:
    plan = make_run(tmp_path, tiny_t2v, "run")
    encoding, samples = plan_encoding(plan), layout.samples(plan.cache_uri)
    gone = samples.index().column("key").to_pylist()[4]
    samples.remove({gone})
    with pytest.raises(ConfigError, match="taken out of the cache"):
        Dataset.open(plan, encoding)
    selected = layout.read_selected(storage.join(plan.run_uri, layout.SELECTION))
    layout.write_places(plan.run_uri, selected, samples, layout.captions(plan.cache_uri, encoding))
    with pytest.raises(ConfigError, match="1 of the run's 10 samples are not in its cache"):
        Dataset.open(plan, encoding)
    layout.write_places(plan.run_uri, selected.slice(1), samples, layout.captions(plan.cache_uri, encoding))
    with pytest.raises(ConfigError, match="names other samples"):
        Dataset.open(plan, encoding)
    unknown = dataclasses.replace(plan, run_uri=plan.run_uri + "-other")
    with pytest.raises(ConfigError, match="no list of its samples"):
        Dataset.open(unknown, encoding)
