"""Several datasets in one configuration: names, fall-backs, rules, buckets; and the samples that a clip gives."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

import pytest

from k5dist import memory
from k5dist.compose import compose, to_run_config
from k5dist.config import ConfigError, RunConfig
from k5dist.datasets import DatasetConfig
from k5dist.plan import ClusterFacts, RunPlan, make_plan
from k5dist.precache.cuts import Unfit, available_frames, cuts
from k5dist.precache.summary import Busy, Failure, Summary
from k5dist.precache.video import VideoInfo
from k5dist.shapes import Bucket, area_ladder, edge_ladder

TWO = "data.datasets={street:{source:s3://b/street,repeats:2},faces:{source:faces.csv}}"
NABLA = "+flavour=t2v-pro-sft-5s-hd"


def configure(*overrides: str) -> RunConfig:
    flavour = () if any(o.startswith("+flavour") for o in overrides) else ("+flavour=t2v-tiny",)
    return to_run_config(compose([*flavour, *overrides]))


def refusal(*overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        configure(*overrides)
    return caught.value


def dataset(*overrides: str) -> DatasetConfig:
    (one,) = configure(*overrides).datasets
    return one


def plan_of(*overrides: str) -> RunPlan:
    return make_plan(configure(*overrides), ClusterFacts(0), "weights")


# Configuration


def test_without_entries_there_is_one_dataset() -> None:
    one = dataset("data.source=/clips")
    assert (one.name, one.source, one.num_frames, one.captions_from) == ("main", "/clips", 17, "textfile")


def test_an_entry_falls_back_to_the_defaults() -> None:
    street, faces = configure(TWO, "data.num_frames=13", "data.crop=random").datasets
    assert (street.name, street.source, street.repeats) == ("street", "s3://b/street", 2)
    assert (faces.repeats, faces.captions_from) == (1, "manifest")
    assert (street.num_frames, street.crop) == (13, "random")


@pytest.mark.parametrize("plus", ["", "+"])
def test_an_entry_is_made_key_by_key(plus: str) -> None:
    config = configure(f"{plus}data.datasets.street.source=s3://b/x/**/*.mp4", f"{plus}data.datasets.street.repeats=3")
    (street,) = config.datasets
    assert (street.source, street.repeats) == ("s3://b/x/**/*.mp4", 3)
    assert RunConfig.from_mapping(json.loads(json.dumps(config.to_mapping()))) == config


BROKEN: list[tuple[list[str], str, str]] = [
    (["data.source=x", TWO], "data.source", "own entry"),
    (["data.datasets={Street:{source:x}}"], "data.datasets", "a-z"),
    (["data.datasets={a:{repeats:2}}"], "data.datasets.a.source", "needs a source"),
    (["data.datasets={a:{source:x,repaets:2}}"], "data.datasets.a.repaets", "no such key"),
    (["data.datasets={a:{source:x,name:b}}"], "data.datasets.a.name", "no such key"),
    (["data.datasets={a:{source:x,held_out:0.5}}"], "data.datasets.a.held_out", "no such key"),
    (["data.datasets={a:{source:x,repeats:two}}"], "data.datasets.a.repeats", "a whole number"),
    (["data.datasets={a:{source:x,repeats:0}}"], "data.datasets.a.repeats", "greater than 0"),
    (["data.datasets={a:{source:'s3://me:pw@b/x'}}"], "data.datasets.a.source", "no credentials"),
    (["data.datasets={a:{source:x}}", "data.repeats=0"], "data.repeats", "greater than 0"),
    (["data.datasets=3"], "data.datasets", "a group of keys"),
    (["data.probability=0"], "data.probability", "≤ 1"),
    (["data.probability=1.5"], "data.probability", "≤ 1"),
    (["data.crop=middle"], "data.crop", "center, random, none"),
    (["data.segments=some"], "data.segments", "first, uniform, all"),
    (["data.segments=uniform"], "data.max_segments", "max_segments"),
    (["data.caption_strategy=instance"], "data.instance_prompt", "instance_prompt"),
    (["data.caption_strategy=manifest", "data.source=/clips"], "data.caption_strategy", "only a manifest"),
    (["data.resolution=500"], "data.resolution", "multiple of 16"),
    ([NABLA, "data.resolution=500"], "data.resolution", "multiple of 128"),
    (["data.resolution=sd", "data.resolution_type=area"], "data.resolution", "megapixels"),
    (["data.resolution=0.5", "data.resolution_type=pixel_area"], "data.resolution", "edge in pixels"),
    (["data.frame_interval=6"], "data.frame_interval", "multiples of 4"),
    (["data.min_frames=18"], "data.min_frames", "num_frames=17"),
    (["data.max_frames=8"], "data.max_frames", "at least 17"),
    (["+flavour=i2v-tiny", "data.num_frames=1", "validation.num_frames=17"], "data.num_frames", "more than one"),
]


@pytest.mark.parametrize(("overrides", "key", "rule"), BROKEN, ids=[" ".join(broken) for broken, *_ in BROKEN])
def test_a_broken_rule_is_named(overrides: list[str], key: str, rule: str) -> None:
    error = refusal(*overrides)
    assert error.key == key
    assert rule in error.rule
    assert error.fix
    assert "pw" not in error.block()


def test_an_unknown_key_of_an_entry_names_the_nearest() -> None:
    assert "data.datasets.a.repeats" in refusal("data.datasets={a:{source:x,repaets:2}}").fix


def test_the_embedded_default_gives_way() -> None:
    assert [one.name for one in configure(TWO).datasets] == ["street", "faces"]
    assert [one.name for one in configure("data=clips", TWO).datasets] == ["street", "faces"]


# Buckets


@pytest.mark.parametrize("unit", [16, 128])
@pytest.mark.parametrize("pixels", [512 * 512, 512 * 768, 768 * 1280, 1e6])
def test_a_ladder_has_every_aspect_at_about_one_area(pixels: float, unit: int) -> None:
    ladder = area_ladder(pixels, unit)
    assert len(set(ladder)) == len(ladder) >= 3
    for height, width in ladder:
        assert height % unit == width % unit == 0
        assert abs(height * width / pixels - 1) < (0.07 if unit == 16 else 0.2)
        assert 1 / 2.2 <= height / width <= 2.2
        assert (width, height) in ladder
    assert area_ladder(100, unit) == ()


def test_an_edge_makes_a_ladder_too() -> None:
    assert {min(sides) for sides in edge_ladder(480, 16)} == {480}
    assert configure("data.resolution=480").resolutions == edge_ladder(480, 16)
    assert configure("data.resolution=0.25", "data.resolution_type=area").resolutions == area_ladder(0.25e6, 16)
    squared = configure(NABLA, "data.resolution=640", "data.resolution_type=pixel_area", "stages=[plan]")
    assert squared.resolutions == area_ladder(640 * 640, 128)


def test_a_plan_has_the_buckets_of_all_datasets() -> None:
    entries = "{a:{source:x,resolution:[64,64]},b:{source:y,num_frames:13},c:{source:z,resolution:[64,64]}}"
    plan = plan_of(f"data.datasets={entries}")
    assert plan.buckets == (Bucket(17, 64, 64), Bucket(13, 64, 96))
    assert RunPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("flavour", ["t2v-lite-sft-5s", "t2v-pro-sft-5s-hd"])
def test_images_and_videos_of_two_lengths_are_planned_by_the_longest(flavour: str) -> None:
    entries = "{films:{source:a},shorts:{source:b,num_frames:61},stills:{source:c,num_frames:1}}"
    shared = (f"+flavour={flavour}", "data.resolution=[512,768]", "train.timestep_shift=resolution")
    mixed, long = (
        make_plan(configure(*shared, f"data.datasets={sets}"), ClusterFacts(8, "NVIDIA H200"), "weights")
        for sets in (entries, "{films:{source:a}}")
    )
    assert mixed.buckets == tuple(Bucket(frames, 512, 768) for frames in (121, 61, 1))
    assert memory.largest(mixed.buckets).frames == 121
    assert mixed.recompute == long.recompute
    needs = [memory.predict(mixed.config, mixed.world, bucket, mixed.recompute).total for bucket in mixed.buckets]
    assert needs == sorted(needs, reverse=True)


def test_short_clips_have_buckets_of_their_own() -> None:
    keys = ("data.num_frames=25", "data.bucket_strategy=resolution_frames", "data.frame_interval=8")
    assert dataset(*keys).frame_counts == (25, 17, 9)
    assert dataset(*keys, "data.min_frames=1").frame_counts == (25, 17, 9, 1)
    assert dataset(*keys, "data.min_frames=10").frame_counts == (25, 17)


# Fingerprints


def test_a_dataset_more_is_another_run_on_the_same_cache() -> None:
    one, two = plan_of("data.datasets={faces:{source:faces.csv}}"), plan_of(TWO)
    assert one.cache_fingerprint == two.cache_fingerprint
    assert one.run_fingerprint != two.run_fingerprint


# Samples of a clip


def clip(seconds: float, **facts: Any) -> VideoInfo:
    return VideoInfo(640, 480, seconds, 24.0, "h264", 0, round(24 * seconds), **facts)


@pytest.mark.parametrize(("seconds", "rate", "frames"), [(5, 24, 120), (121 / 24, 24, 121), (4.2, 10, 42), (1, 12, 12)])
def test_frames_that_a_clip_has(seconds: float, rate: float, frames: int) -> None:
    assert available_frames(clip(seconds), 0, None, rate) == frames
    assert available_frames(clip(100), 0, (frames - 1) / rate, rate) == frames
    assert available_frames(clip(1), 2, None, rate) == 0


def test_windows_of_a_long_clip() -> None:
    long, rate = clip(100 / 12), 12  # 100 frames: five windows of 17 and 15 frames more
    assert cuts(long, 0, None, dataset()) == [(0, 17)]
    every = cuts(long, 0, None, dataset("data.segments=all"))
    assert every == [(pytest.approx(17 * i / rate), 17) for i in range(5)]
    assert len(cuts(long, 0, None, dataset("data.segments=all", "data.max_segments=2"))) == 2
    assert len(cuts(long, 50 / rate, None, dataset("data.segments=all"))) == 2
    spread = cuts(long, 0, None, dataset("data.segments=uniform", "data.max_segments=3"))
    assert [round(start * rate) for start, _ in spread] == [0, 42, 83]
    many = cuts(long, 0, None, dataset("data.segments=uniform", "data.max_segments=50"))
    starts = [round(start * rate) for start, _ in many]
    assert len(many) == 5
    assert all(b - a >= 17 for a, b in itertools.pairwise(starts)), "windows never overlap"
    assert starts[-1] + 17 == 100


def test_a_short_clip_goes_to_the_largest_bucket_that_it_fills() -> None:
    short = dataset("data.bucket_strategy=resolution_frames", "data.frame_interval=4", "data.min_frames=5")
    for frames, bucket in ((40, 17), (17, 17), (16, 13), (9, 9), (5, 5)):
        assert cuts(clip(frames / 12), 0, None, short) == [(0, bucket)]
    with pytest.raises(Unfit, match=r"too short.*4 frames"):
        cuts(clip(4 / 12), 0, None, short)


def test_clips_out_of_bounds_say_so() -> None:
    with pytest.raises(Unfit, match=r"too long.*max_frames=20"):
        cuts(clip(10), 0, None, dataset("data.max_frames=20"))
    with pytest.raises(Unfit, match=r"too short.*min_frames=17"):
        cuts(clip(1), 0, None, dataset("data.min_frames=17"))
    with pytest.raises(Unfit, match="too short"):
        cuts(clip(1), 0, None, dataset("data.segments=all"))


def test_an_image_is_never_divided_by_its_rate() -> None:
    image = dataclasses.replace(clip(0, is_image=True), frame_rate=0.0, num_frames=1)
    assert cuts(image, 0, None, dataset("data.segments=all", "data.max_frames=30")) == [(0, 1)]


# Summary


def test_a_summary_counts_by_dataset_and_bucket() -> None:
    summary = Summary()
    row = {"dataset": "street", "frames": 17, "height": 64, "width": 96}
    for what in ("seen", "seen", "encoded", "cached_before"):
        summary.count(what, row)
    for reason in ("too short: has 1 s", "too long: it has 400 frames", "not a video"):
        summary.count("seen", {**row, "dataset": "faces", "frames": 0})
        summary.fail(Failure("faces", "a.mp4", 0.0, "probe", reason))
    table = dict(summary.rows())
    assert table["clips"] == "5 seen, 1 encoded, 1 cached before"
    assert table["street"] == "seen 2, encoded 1, cached before 1, too short 0, broken 0"
    assert table["  17×64×96"] == table["street"]
    assert table["faces"] == "seen 3, encoded 0, cached before 0, too short 1, too long 1, broken 1"
    metrics = summary.metrics()
    assert (metrics["precache/seen"], metrics["precache/street/encoded"], metrics["precache/faces/broken"]) == (5, 1, 1)


def test_the_vae_s_share_of_time_and_the_table_of_buckets() -> None:
    summary = Summary(vae=Busy(workers=2))
    for began, ended in ((10.0, 13.0), (11.0, 13.0), (0.0, 0.0), (13.0, 14.0)):  # the third was never encoded
        summary.vae.add(began, ended)
    assert (summary.vae.span, summary.vae.share) == (4.0, 0.75)
    assert summary.metrics()["precache/vae_busy"] == 0.75
    assert ("VAE workers", "2 busy 75% of 4.0 s") in summary.rows()
    summary.count("seen", {"dataset": "a", "frames": 5, "height": 8, "width": 16})
    assert [(row["dataset"], row["bucket"], row["seen"], row["encoded"]) for row in summary.table()] == [
        ("a", "5×8×16", 1, 0)
    ]
    assert "precache/vae_busy" not in Summary().metrics()
