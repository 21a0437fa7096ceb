"""What a run notes of its samples: a training set that opens at once, whatever its length, and without the index."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from k5dist import storage
from k5dist.cache import layout, places
from k5dist.cache.order import Stratum
from k5dist.cache.places import Order, Places, Stores, note_places
from k5dist.config import ConfigError
from k5dist.plan import RunPlan
from k5dist.train.feed import Dataset
from tests.distributed.gangs import make_run, plan_encoding, select


def open_run(plan: RunPlan) -> Dataset:
    return Dataset.open(plan, plan_encoding(plan))


def test_a_run_opens_and_reads_without_the_index(tiny_t2v: Path, tmp_path: Path) -> None:
    plan = make_run(tmp_path, tiny_t2v, "run")
    index = layout.samples(plan.cache_uri).index().to_pylist()
    shutil.rmtree(storage.join(plan.cache_uri, "index"))
    shutil.rmtree(storage.join(layout.captions(plan.cache_uri, plan_encoding(plan)).uri, "index"))
    dataset = open_run(plan)
    (stratum,) = dataset.strata
    assert (stratum.count, stratum.held_out) == (len(index), False)
    assert stratum.bucket == (index[0]["frames"], index[0]["height"], index[0]["width"])
    clips = [dataset.read(row) for row in stratum.rows]
    assert [clip.key for clip in clips] == [row["key"] for row in index]
    assert len({clip.mean_THWC.sum().item() for clip in clips}) == len(index)
    assert torch.equal(clips[3].mean_THWC, dataset.read_drawn(3, 0, seed=0, epoch=1).mean_THWC)
    lengths = [clip.text.qwen_1LD.shape[1] for clip in clips]
    assert lengths == list(range(8, 18)), "each clip's own caption"
    assert dataset.texts.get("").qwen_1LD.shape[1] == 5
    with pytest.raises(ConfigError, match="no text features of 'never seen'"):
        dataset.texts.get("never seen")


def test_what_was_noted_before_records_went_is_not_trusted(tiny_t2v: Path, tmp_path: Path) -> None:
    plan = make_run(tmp_path, tiny_t2v, "run")
    samples = layout.samples(plan.cache_uri)
    samples.remove({samples.index().column("key").to_pylist()[4]})
    with pytest.raises(ConfigError, match="taken out of the cache"):
        open_run(plan)
    select(plan, layout.read_selected(storage.join(plan.run_uri, layout.SELECTION)))
    with pytest.raises(ConfigError, match="1 of the run's 10 samples are not in its cache"):
        open_run(plan)
    places.forget_places(plan.run_uri)
    with pytest.raises(ConfigError, match="no list of its samples"):
        open_run(plan)
    with pytest.raises(ConfigError, match="no list of its samples"):
        open_run(dataclasses.replace(plan, run_uri=plan.run_uri + "-other"))


def test_a_caption_that_was_lost_is_named(tiny_t2v: Path, tmp_path: Path) -> None:
    plan = make_run(tmp_path, tiny_t2v, "run")
    texts = layout.captions(plan.cache_uri, plan_encoding(plan))
    texts.remove({layout.caption_key("clip 3")})
    select(plan, layout.read_selected(storage.join(plan.run_uri, layout.SELECTION)))
    dataset = open_run(plan)
    dataset.read(2)
    with pytest.raises(ConfigError, match="no text features of 'clip 3'"):
        dataset.read(3)


def test_rows_lie_by_stratum_in_files_of_some_rows(
    tiny_t2v: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_run(tmp_path, tiny_t2v, "run")
    monkeypatch.setattr(places, "FILE_ROWS", 3)
    monkeypatch.setattr(places, "_KEPT_FILES", 2)
    keys = layout.read_selection(storage.join(plan.run_uri, layout.SELECTION))
    selected = layout.selection(
        keys,
        datasets=["b", "a"] * 5,
        captions=[["clip 0", f"clip {at}"] for at in range(10)],
        repeats=[1, 2] * 5,
        probability=[0.5, None] * 5,
    )
    stores = Stores.of(plan.cache_uri, plan_encoding(plan), "")
    before = Order.read(plan.run_uri)
    note_places(plan.run_uri, selected, 0.2, stores, [""])
    order = Order.read(plan.run_uri)
    assert order is not None and before is not None and order.folder != before.folder
    assert storage.list_folder(storage.join(plan.run_uri, places.FOLDER)) == [order.folder]
    bucket = dataclasses.astuple(plan.buckets[0])
    assert order.strata == (
        Stratum(bucket, "a", 2, None, held_out=False, first=0, count=4),
        Stratum(bucket, "b", 1, 0.5, held_out=False, first=4, count=4),
        Stratum(bucket, "a", 2, None, held_out=True, first=8, count=1),
        Stratum(bucket, "b", 1, 0.5, held_out=True, first=9, count=1),
    )
    found = Places(plan.run_uri, order)
    rows = [found.row(at) for at in (9, 0, 5, 2, 8, 1, 3, 4, 6, 7)]
    assert len(found._files) == 2
    assert sorted(row["key"] for row in rows) == keys
    of_key = {row["key"]: row for row in rows}
    assert [found.stratum(at).dataset for at in range(10)] == list("aaaabbbbab")
    assert {keys.index(row["key"]) % 2 for row in rows[:1] + rows[2:3]} == {0}, "those of b"
    for at, key in enumerate(keys):
        assert [entry["text"] for entry in of_key[key]["captions"]] == ["clip 0", f"clip {at}"]
        assert of_key[key]["captions"][1]["place"]["shard"] == of_key[keys[0]]["captions"][0]["place"]["shard"]
    note_places(plan.run_uri, selected, 0.2, stores, [""])
    assert Order.read(plan.run_uri) == order, "nothing changed: the same files"


def test_features_have_places_of_their_own(tiny_t2v: Path, tmp_path: Path) -> None:
    plan = make_run(tmp_path, tiny_t2v, "run", "crepa.enabled=true")
    dataset = open_run(plan)
    assert dataset.feature_dim == 12
    drawn = [dataset.read_drawn(row, 0, seed=0, epoch=0).features_ThwD for row in (0, 7)]
    assert drawn[0] is not None and drawn[1] is not None and not torch.equal(drawn[0], drawn[1])
    store = layout.features(plan.cache_uri, plan.features_id)
    store.remove(set(list(store.keys())[:2]))
    with pytest.raises(ConfigError, match="taken out of the cache"):
        open_run(plan)
    select(plan, layout.read_selected(storage.join(plan.run_uri, layout.SELECTION)))
    with pytest.raises(ConfigError, match="2 of the run's 10 samples have no features"):
        open_run(plan)
