"""Images beside shorter and longer videos of several datasets in one run, some with masks: every clip in a batch of its
bucket and at its resolution's noise, and a curve a dataset."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from k5dist import storage
from k5dist.cache import layout
from k5dist.plan import RunPlan
from k5dist.train.feed import Dataset
from k5dist.train.worker import plan_encoding
from tests.distributed.gangs import SCALE, Result, assert_close, clip_record, make_run, select, train

pytestmark = pytest.mark.timeout(300)

FP32 = 2e-5
VIDEOS, STILLS, SHORTS = 10, 4, 5  # of which one clip of each dataset is held out
NAMES = ["films", "plays", "shorts", "stills"]
DATASETS = (
    "+data.datasets.films={source:/films,frame_rate:12}",
    "+data.datasets.plays={source:/plays,frame_rate:12}",
    "+data.datasets.shorts={source:/shorts,frame_rate:12,num_frames:9,mask_suffix:.mask.mp4}",
    "+data.datasets.stills={source:/stills,caption_strategy:filename}",
)
EPOCH = 8  # batches of two: eight videos, four shorter ones, three images
SETTINGS = (
    "data.held_out=0.2",
    "train.batch_size=2",
    "validation.timesteps=2",
    "validation.every=0",
    "optimizer.lr=3e-3",
    "train.timestep_shift=resolution",
    "train.mask_background=0.1",
)


def make_mixture(root: Path, checkpoint: Path, name: str, *overrides: str, workers: int = 1) -> RunPlan:
    """A run on clips of 17 frames, of 9 with masks, and images, all of the same sides."""
    settings = (*DATASETS, "data.resolution=[64,96]", *SETTINGS, "stages=[train,validate]", *overrides)
    plan = make_run(root, checkpoint, name, *settings, workers=workers, clips=VIDEOS)
    generator = torch.Generator().manual_seed(1)
    longest, short = plan.buckets
    assert (longest.frames, short.frames) == (17, 9)
    store = layout.samples(plan.cache_uri)
    stills, shorts = ([f"{i:031x}{kind}" for i in range(count)] for kind, count in ((0, STILLS), (1, SHORTS)))
    if not store.keys().issuperset(stills + shorts):
        buckets = [dataclasses.replace(longest, frames=1)] * STILLS + [short] * SHORTS
        records = []
        for key, bucket in zip(stills + shorts, buckets, strict=True):
            mean = torch.randn(*bucket.latent_shape, 16, generator=generator) / SCALE
            mask = (torch.rand(*bucket.latent_shape, 1, generator=generator) > 0.5).float()
            records.append(clip_record(key, bucket, mean, mask=mask if bucket == short else None))
        store.write(records)
    videos = layout.read_selection(storage.join(plan.run_uri, layout.SELECTION))
    selected = layout.selection(
        [*videos, *shorts, *stills],
        datasets=["films"] * 5 + ["plays"] * 5 + ["shorts"] * SHORTS + ["stills"] * STILLS,
        captions=[[f"clip {i % 10}"] for i in range(VIDEOS + SHORTS + STILLS)],
    )
    select(plan, selected)
    return plan


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_t2v: Path) -> list[tuple[RunPlan, Result]]:
    """One epoch and a bit on one worker and on two."""
    root = tmp_path_factory.mktemp("mixture")
    plans = [make_mixture(root, tiny_t2v, f"on-{n}", "train.steps=10", workers=n) for n in (1, 2)]
    return list(zip(plans, train(*plans), strict=True))


def test_two_workers_train_images_and_videos_of_two_lengths_as_one(runs: list[tuple[RunPlan, Result]]) -> None:
    (_, alone), (_, both) = runs
    assert sorted(alone.losses) == list(range(1, 11))
    assert_close(both.losses, alone.losses, FP32)
    assert_close(both.norms, alone.norms, FP32)


def test_every_step_tells_the_loss_of_its_datasets(runs: list[tuple[RunPlan, Result]]) -> None:
    plan, result = runs[0]
    batches, shared = batches_of(plan), 0
    for step, event in enumerate(result.events("step")[:EPOCH]):
        real = [name for name, weight in batches[step] if weight]
        told = {name: event["metrics"].get(f"loss/{name}") for name in NAMES}
        assert {name for name, loss in told.items() if loss is not None} == set(real)
        mean = sum(told[name] for name in real) / len(real)
        assert event["metrics"]["loss"] == pytest.approx(mean, rel=1e-6)
        shared += len(set(real)) > 1 and told["films"] != told["plays"]
    assert shared, "two datasets of one bucket share a batch"
    for name in NAMES:
        ours, theirs = (
            {e["step"]: e["metrics"][f"loss/{name}"] for e in run.events("step") if f"loss/{name}" in e["metrics"]}
            for _, run in runs
        )
        assert_close(ours, theirs, FP32)


def batches_of(plan: RunPlan) -> list[list[tuple[str, float]]]:
    """Dataset and weight of every clip of the first epoch's batches."""
    dataset = Dataset.open(plan, plan_encoding(plan))
    batches = dataset.epoch(0, 0, plan.batch_size).batches()
    return [[(dataset.stratum(r).dataset, w) for r, w in zip(b.rows, b.weights, strict=True)] for b in batches]


def test_an_epoch_holds_images_between_videos(runs: list[tuple[RunPlan, Result]]) -> None:
    plan, result = runs[0]
    batches = batches_of(plan)
    # Eight videos, four shorter ones and three images in batches of two, of one bucket each.
    kinds = [{"videos" if name in ("films", "plays") else name for name, _ in batch} for batch in batches]
    assert all(len(kind) == 1 for kind in kinds)
    order = [kind for (kind,) in kinds]
    assert (len(order), order.count("shorts"), order.count("stills")) == (EPOCH, 2, 2)
    assert all(len(set(half)) > 1 for half in (order[: EPOCH // 2], order[EPOCH // 2 :])), "spread over the epoch"
    assert sum(weight for batch in batches for _, weight in batch) == 15
    epochs = result.metric("epoch")
    assert (epochs[EPOCH], epochs[EPOCH + 1]) == (0, 1)


def test_the_held_out_loss_is_told_by_dataset_and_bucket(runs: list[tuple[RunPlan, Result]]) -> None:
    plan, _ = runs[0]
    dataset = Dataset.open(plan, plan_encoding(plan))
    assert sorted(dataset.stratum(row).dataset for row in dataset.held_out_rows) == NAMES
    (first, last), (_, other) = ([event["losses"] for event in result.events("validation")] for _, result in runs)
    for losses in (first, last):
        parts = [losses[f"loss/{name}"] for name in NAMES]
        assert len(set(parts)) == 4
        assert losses["loss"] == pytest.approx(sum(parts) / 4)
        assert losses["loss/bucket/17x64x96"] == pytest.approx(sum(parts[:2]) / 2)
        assert losses["loss/bucket/9x64x96"] == parts[2]
        assert losses["loss/bucket/1x64x96"] == parts[3]
    assert last["loss"] < first["loss"]
    assert other == pytest.approx(last, rel=FP32)
