"""From a configuration and a cluster to a plan: degrees, batches, fingerprints, and plan.json."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import subprocess
import sys

import pytest

from k5dist.compose import compose, flavours, to_run_config
from k5dist.config import ConfigError, RunConfig
from k5dist.estimate import Recompute
from k5dist.launch import plan_run, show_plan
from k5dist.plan import ClusterFacts, RunPlan, estimates, make_plan
from k5dist.pools import STORE_SHARE, Pool, block_bytes, rows_per_block, settle_flow
from k5dist.shapes import Bucket

PRO = "+flavour=t2v-pro-sft-10s-hd"
TINY = "+flavour=t2v-tiny"


@functools.cache  # composing takes a twentieth of a second, and the same few are asked for again and again
def configure(*overrides: str) -> RunConfig:
    overrides = tuple(f"+{o}" if o.startswith("flavour=") else o for o in overrides)
    missing = [o for o in overrides if o.startswith("+flavour=i2v-") and "-pretrain-" in o]
    return to_run_config(compose([*overrides, *(["pretrained=some/repository"] if missing else [])]))


def planned(*overrides: str, gpus: int = 8, identity: str = "weights") -> RunPlan:
    return make_plan(configure(*overrides), ClusterFacts(gpus, "NVIDIA H200"), identity)


def refusal(*overrides: str, gpus: int = 8) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        planned(*overrides, gpus=gpus)
    return caught.value


# World and batch


@pytest.mark.parametrize("name", flavours())
@pytest.mark.parametrize(("nodes", "gpus"), [(1, 1), (1, 8), (4, 8)])
def test_every_flavour_plans(name: str, nodes: int, gpus: int) -> None:
    plan = planned(f"flavour={name}", f"cluster.nodes={nodes}", "train.batch_size=null", gpus=gpus)
    world = plan.world
    assert world.size == nodes * gpus == world.shard * world.replicate * world.context
    assert plan.batch_size == max(8, nodes * gpus)
    assert plan.accumulation * world.data_parallel == plan.batch_size
    assert len(plan.buckets) == len(plan.config.resolutions)
    costs = estimates(plan)
    assert 0 < costs.trainable < costs.parameters
    assert costs.step_seconds is not None
    assert math.isfinite(costs.step_seconds)
    assert costs.step_seconds > 0
    assert RunPlan.from_json(plan.to_json()) == plan


def test_the_largest_flavour_plans_on_four_nodes_of_eight() -> None:
    plan = plan_run(configure(PRO, "cluster.nodes=4", "cluster.gpus_per_node=8"))
    assert (plan.world.nodes, plan.world.workers_per_node, plan.world.size) == (4, 8, 32)
    assert plan.world.device == "cuda"
    assert plan.batch_size == 32
    assert Bucket(241, 768, 1280) in plan.buckets
    assert Bucket(241, 768, 1280).tokens == 61 * 48 * 80
    assert plan.name == f"t2v-pro-sft-10s-hd-{plan.run_fingerprint}"
    assert plan.run_uri.endswith(f"k5dist-data/runs/{plan.name}")
    assert plan.cache_uri.endswith(f"k5dist-data/cache/{plan.cache_fingerprint}")
    assert plan.tracking_uri.startswith("sqlite:///")


def test_shards_are_what_the_other_degrees_leave() -> None:
    world = planned(PRO, "parallel.replicate=2", "parallel.context=2").world
    assert (world.shard, world.replicate, world.context, world.data_parallel) == (2, 2, 2, 4)


@pytest.mark.parametrize(
    "degrees",
    [["shard=3"], ["shard=16"], ["replicate=3"], ["replicate=16"], ["shard=4", "context=4"], ["shard=4"]],
    ids=",".join,
)
def test_degrees_must_multiply_to_the_world(degrees: list[str]) -> None:
    error = refusal(PRO, *(f"parallel.{degree}" for degree in degrees))
    assert error.key.startswith("parallel")
    assert "must equal the world: 1 nodes × 8 workers = 8" in error.rule
    if error.fix.startswith("parallel.shard="):
        planned(PRO, *(f"parallel.{degree}" for degree in degrees), error.fix)


@pytest.mark.parametrize(("gpus", "context", "fix"), [(8, 16, 8), (6, 8, 2), (3, 2, 1)])
def test_workers_are_grouped_by_context(gpus: int, context: int, fix: int) -> None:
    error = refusal(PRO, f"parallel.context={context}", gpus=gpus)
    assert (error.key, error.value, error.fix) == ("parallel.context", context, f"parallel.context={fix}")
    assert f"divide the {gpus} workers" in error.rule
    world = planned(PRO, error.fix, gpus=gpus).world
    assert world.context == fix
    assert world.weight_shards == gpus


def test_a_gpu_holds_one_worker() -> None:
    error = refusal("cluster.workers_per_node=9")
    assert (error.key, error.value) == ("cluster.workers_per_node", 9)
    assert planned("cluster.workers_per_node=4").world.size == 4


def test_without_gpus_two_workers_share_the_cpu() -> None:
    world = planned(TINY, gpus=0).world
    assert (world.device, world.size) == ("cpu", 2)
    assert planned(TINY, "cluster.workers_per_node=3", "train.batch_size=3", gpus=0).world.size == 3


def test_a_batch_is_divided_evenly() -> None:
    error = refusal("train.batch_size=12")
    assert (error.key, error.value) == ("train.batch_size", 12)
    assert planned("train.batch_size=12", error.fix).batch_size == 16
    assert planned("train.batch_size=32").accumulation == 4
    # Workers that share a clip's tokens count once.
    assert planned(PRO, "train.batch_size=2", "parallel.context=4").accumulation == 1


@pytest.mark.parametrize(("gpus", "batch"), [(1, 8), (2, 8), (4, 8), (8, 8), (3, 9), (12, 12)])
def test_the_derived_batch_is_the_smallest_multiple_from_eight(gpus: int, batch: int) -> None:
    assert planned(gpus=gpus).batch_size == batch


def test_the_full_size_flavour_needs_a_gpu_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError) as caught:
        plan_run(configure())
    assert caught.value.key == "cluster.gpus_per_node"
    assert plan_run(configure("stages=[plan]")).world.device == "cuda"


# Fingerprints


def fingerprints(*overrides: str, identity: str = "weights", gpus: int = 8) -> tuple[str, str]:
    plan = planned(*overrides, identity=identity, gpus=gpus)
    return plan.cache_fingerprint, plan.run_fingerprint


@pytest.mark.parametrize(
    "override",
    ["precache.max_text_tokens=128", "flavour.task=i2v"],
)
def test_how_it_is_encoded_changes_both_fingerprints(override: str) -> None:
    cache, run = fingerprints(override)
    assert cache != fingerprints()[0]
    assert run != fingerprints()[1]


def test_another_checkpoint_changes_both_fingerprints() -> None:
    cache, run = fingerprints(identity="fine-tuned weights")
    assert cache != fingerprints()[0]
    assert run != fingerprints()[1]


@pytest.mark.parametrize(
    "override",
    [
        *(
            "optimizer.lr=2e-4",
            "optimizer.kind=adamw_bf16",
            "train.steps=7",
            "train.seed=1",
            "train.batch_size=16",
            "train.caption_dropout=0.2",
            "ema.enabled=true",
            "train.unconditional=negative",
            "train.loss=huber",
            "optimizer.groups=[{match: to_key, lr_scale: 0.5}]",
        ),
        *("lora.rank=8", "adapter=full", "data.held_out=0.1", "precache.latents=mode", "train.timestep_shift=5"),
        *("data.frame_rate=12", "data.num_frames=61", "data.resolution=[512,768]", "data.source=s3://bucket/clips"),
        *("data.datasets={a:{source:s3://bucket/clips}}", "data.repeats=2", "data.crop=random"),
    ],
)
def test_what_is_learned_changes_only_the_runs(override: str) -> None:
    cache, run = fingerprints(override)
    assert cache == fingerprints()[0]
    assert run != fingerprints()[1]


@pytest.mark.parametrize(
    "override",
    [
        *("checkpoint.every=7", "checkpoint.keep=9", "tracking.uri=http://host:5000", "tracking.experiment=other"),
        *("name=mine", "stages=[train]", "resume=never", "storage.root=/elsewhere", "validation.every=7"),
        *("parallel.replicate=2", "cluster=ray", "cluster.workers_per_node=4", "cluster.max_restarts=0"),
        *("train.compile=false", "train.activation_checkpointing=full", "precache.shard_size_mib=64"),
    ],
)
def test_where_and_how_fast_changes_neither(override: str) -> None:
    assert fingerprints(override) == fingerprints()


def test_the_number_of_machines_changes_neither() -> None:
    few = fingerprints("train.batch_size=32", gpus=1)
    assert fingerprints("train.batch_size=32", "cluster.nodes=4", gpus=8) == few
    assert fingerprints(gpus=1) == fingerprints(gpus=2) == fingerprints(gpus=8)


def test_one_place_in_two_spellings_is_one_source() -> None:
    assert fingerprints("data.source=s3://bucket/clips/") == fingerprints("data.source=s3://bucket/clips")
    assert fingerprints("data.source=file:///clips") == fingerprints("data.source=/clips")
    assert fingerprints("data.resolution=512x768") == fingerprints("data.resolution=[512,768]")


def test_a_plan_says_what_the_blocks_keep() -> None:
    plan = dataclasses.replace(planned(), recompute=Recompute(3, 7))
    assert json.loads(plan.to_json())["recompute"] == {"keep": 3, "attention": 7, "offload": 0}
    assert RunPlan.from_json(plan.to_json()) == plan


def test_a_newer_plan_keeps_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The version of plan.json is not what is encoded: raising it must not encode all clips anew."""
    before = fingerprints()
    monkeypatch.setattr("k5dist.plan.SCHEMA_VERSION", 999)
    assert fingerprints() == before


def test_a_plan_of_another_version_is_refused() -> None:
    body = json.loads(planned().to_json())
    assert body["schema_version"] == 7
    with pytest.raises(ConfigError, match="schema version"):
        RunPlan.from_json(json.dumps(body | {"schema_version": 999}))


def test_planning_imports_no_heavy_library() -> None:
    """A plan must come in a moment: none of these may be loaded on its way."""
    heavy = ("torch", "ray", "diffusers", "transformers", "mlflow")
    code = (
        "import sys\n"
        "from k5dist.compose import compose, to_run_config; from k5dist.launch import plan_run\n"
        "plan_run(to_run_config(compose(['+flavour=t2v-lite-sft-5s', 'stages=[plan]'])))\n"
        f"print([name for name in {heavy!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_average_and_the_negative_prompt_count_where_they_are_used() -> None:
    changes = ("ema.decay=0.99", "ema.update_after=3", "ema.every=2"), ("validation.negative_prompt=ugly",)
    for uses, keys in zip(("ema.enabled=true", "train.unconditional=negative"), changes, strict=True):
        for key in keys:
            assert fingerprints(key) == fingerprints()
            assert fingerprints(uses, key)[1] != fingerprints(uses)[1]
    for same in ("ema.device=host", "ema.export=false"):
        assert fingerprints("ema.enabled=true", same) == fingerprints("ema.enabled=true")


# The precache's pools


LITE = "flavour=t2v-lite-sft-5s"


def test_pools_come_from_the_cluster() -> None:
    assert planned(LITE, "cluster.nodes=2").pools.vae == Pool(16, 1.0)
    assert planned(LITE, "precache.vae_gpus=0.5", gpus=2).pools.vae == Pool(4, 0.5)
    assert planned(LITE, "precache.vae_gpus=0.4", gpus=2).pools.vae == Pool(4, 0.4), "a share lies on one GPU"
    assert planned(LITE, "precache.text_workers=1", gpus=2).pools.text == Pool(1, 1.0)


def test_a_pool_that_no_gpu_has_room_for_is_refused() -> None:
    error = refusal(LITE, "precache.vae_workers=3", gpus=2)
    assert (error.key, error.fix) == ("precache.vae_workers", "precache.vae_workers=2")
    assert refusal(LITE, "precache.text_gpus=0", gpus=2).rule == "a worker's share of a GPU, 0 < share ≤ 1"


def test_what_is_under_way_fits_the_object_store() -> None:
    for store, shard, workers in ((256, 16, 1), (4096, 512, 1), (30_000, 512, 8), (300_000, 1024, 16)):
        flow = settle_flow(store * 2**20, 357 * 2**20 if store > 1000 else 40 * 2**20, shard * 2**20, workers)
        assert flow.bound_bytes <= STORE_SHARE * flow.store_bytes
        assert 1 <= flow.shards <= workers
        assert flow.bound_bytes + flow.block_bytes > STORE_SHARE * flow.store_bytes, "and no more is left over"
    small = settle_flow(64 * 2**20, 40 * 2**20, 512 * 2**20, 4)
    assert (small.blocks, small.shards) == (1, 1), "it goes on, by spilling"
    assert small.bound_bytes > small.store_bytes


def test_small_clips_share_a_block_and_large_ones_have_their_own() -> None:
    large = planned(LITE).buckets
    assert (rows_per_block(large), block_bytes(large)) == (1, max(3 * b.frames * b.height * b.width for b in large))
    small = planned("+flavour=t2v-tiny", gpus=0).buckets
    assert 1 < rows_per_block(small) <= 64
    assert block_bytes(small) <= 16 * 2**20


def test_the_plans_table_says_what_may_be_under_way(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(LITE)
    assert plan.flow.store_bytes == 0, "nobody has said"
    for store, told in ((64 * 2**30, "in Ray's object stores of about 64.0 GiB"), (2**30, "MORE THAN THEY HOLD")):
        known = dataclasses.replace(plan, world=dataclasses.replace(plan.world, store_bytes=store))
        assert RunPlan.from_json(known.to_json()) == known
        show_plan(known)
        assert told in " ".join(capsys.readouterr().out.split())
