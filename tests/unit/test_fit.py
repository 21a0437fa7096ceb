"""A run that its GPUs cannot hold is refused with settings that, planned again, fit."""

from __future__ import annotations

import functools

import pytest

from k5dist import fit, memory
from k5dist.compose import compose, to_run_config
from k5dist.config import ConfigError, RunConfig
from k5dist.plan import ClusterFacts, estimates, make_plan

PRO = ("+flavour=t2v-pro-sft-5s-hd", "data.resolution=[512,768]")
LONG = ("+flavour=t2v-pro-sft-10s-hd", "data.resolution=[768,1280]")
LITE = ("+flavour=t2v-lite-sft-5s",)
FULL = "adapter=full"
H200, H100, SMALL = "NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA GeForce RTX 4090"
POLICY = "train.activation_checkpointing"


@functools.cache
def configure(*overrides: str) -> RunConfig:
    return to_run_config(compose(list(overrides)))


def check(*overrides: str, gpus: int, name: str | None = H200, assumed: bool = False) -> None:
    fit.check(configure(*overrides), ClusterFacts(gpus, name, assumed))


def refusal(*overrides: str, gpus: int, name: str = H200) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        check(*overrides, gpus=gpus, name=name)
    return caught.value


# What does not fit: overrides, GPUs, their kind, and what is proposed.
TOO_LARGE: list[tuple[tuple[str, ...], int, str, str]] = [
    (LONG, 2, H200, "parallel.context=2 or data.num_frames=121"),
    (LONG, 1, H200, "cluster.gpus_per_node=2 parallel.context=2 or data.num_frames=121"),
    ((*PRO, FULL), 2, H200, "cluster.gpus_per_node=4 or optimizer.kind=adamw_bf16 or adapter=lora"),
    ((*PRO, FULL, "optimizer.kind=adamw_bf16"), 2, H100, "cluster.gpus_per_node=4 parallel.context=2 or adapter=lora"),
    ((*PRO, FULL, "parallel.replicate=4"), 8, H200, "parallel.replicate=1"),
    ((*PRO, FULL, "parallel.shard=2"), 2, H200, "cluster.gpus_per_node=4 parallel.shard=null"),
    ((*PRO, FULL, "cluster.workers_per_node=2"), 8, H200, "cluster.workers_per_node=8"),
    (
        (*PRO, FULL, "train.batch_size=6"),
        2,
        H200,
        "cluster.gpus_per_node=4 parallel.context=2 or optimizer.kind=adamw_bf16",
    ),
    ((*LITE, FULL), 1, SMALL, "cluster.gpus_per_node=2 parallel.context=2 or adapter=lora"),
    (("+flavour=t2v-pro-sft-10s-hd", FULL), 8, H200, "parallel.context=2 or data.num_frames=121"),
    ((*PRO, FULL, "data.num_frames=25"), 1, SMALL, "cluster.nodes="),
    ((*LONG, f"{POLICY}=linear"), 2, H200, f"parallel.context=2 {POLICY}=auto or data.num_frames=121 {POLICY}=auto"),
    (PRO, 1, "NVIDIA L40S", "cluster.gpus_per_node=2 parallel.context=2 or train.stream_weights=true"),
    ((*PRO, f"{POLICY}=linear"), 2, H200, f"{POLICY}=attention or {POLICY}=auto"),
    ((*PRO, f"{POLICY}=linear"), 2, H100, f"{POLICY}=full or {POLICY}=auto"),
    ((*LITE, f"{POLICY}=attention", "data.num_frames=181"), 1, SMALL, f"{POLICY}=full or {POLICY}=auto"),
]


@pytest.mark.parametrize(("overrides", "gpus", "name", "proposed"), TOO_LARGE)
def test_what_is_proposed_fits(overrides: tuple[str, ...], gpus: int, name: str, proposed: str) -> None:
    error = refusal(*overrides, gpus=gpus, name=name)
    assert error.fix.startswith(proposed)
    assert "needs about" in error.rule
    assert name in error.rule
    proposals = error.fix.split(" or ")
    assert 1 <= len(proposals) <= 3
    assert proposals[0].startswith(error.key)
    for proposal in proposals:  # typed after the settings that were refused
        config = configure(*overrides, *proposal.split())
        facts = ClusterFacts(config.cluster.gpus_per_node or gpus, name)
        fit.check(config, facts)
        plan = make_plan(config, facts, "weights")
        costs = estimates(plan)
        assert costs.memory.total <= memory.usable(costs.gpu_bytes)
        assert costs.memory_note is None


def test_the_refusal_names_key_and_value_as_they_are() -> None:
    for overrides, gpus, key, value in [
        (LONG, 2, "parallel.context", 1),
        (LONG, 1, "cluster.gpus_per_node", 1),
        ((*PRO, FULL, "cluster.nodes=2"), 1, "cluster.gpus_per_node", 1),
        ((*PRO, f"{POLICY}=linear"), 2, POLICY, "linear"),
    ]:
        error = refusal(*overrides, gpus=gpus)
        assert (error.key, error.value) == (key, value)


def test_the_numbers_of_the_refusal_are_the_plans() -> None:
    error = refusal(*LONG, gpus=2)
    needed = estimates(make_plan(configure(*LONG), ClusterFacts(2, H200), "weights")).memory
    assert f"241×768×1280 needs about {needed.total / 2**30:.1f} GiB" in error.rule
    assert "of 140.4 (NVIDIA H200)" in error.rule


def test_no_setting_at_all_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "RUNTIME_BYTES", 1e12)
    error = refusal(*PRO, FULL, gpus=2)
    assert error.key == "data.resolution"
    assert "GPUs with more memory" in error.fix


def test_what_fits_is_not_refused() -> None:
    check(*LONG, "parallel.context=2", gpus=2)
    check(*PRO, gpus=2)
    check(*PRO, FULL, "optimizer.kind=adamw_bf16", gpus=2)
    check(*LITE, gpus=1)
    # Little of the card would stay free: doubtful, and the user's to decide.
    check(*PRO, FULL, "optimizer.kind=adamw_bf16", f"{POLICY}=attention", gpus=2)


def test_only_training_on_known_gpus_is_refused() -> None:
    refusal(*LONG, "stages=[plan]", gpus=2)
    refusal(*LONG, "stages=[train,export]", gpus=2)
    check(*LONG, "stages=[precache]", gpus=2)
    check(*LONG, "stages=[export]", gpus=2)
    check(*LONG, gpus=2, name=None)
    check(*LONG, gpus=2, name="Voodoo 2")
    check(*LONG, "stages=[plan]", gpus=1, name=None, assumed=True)
    check("+flavour=t2v-tiny", gpus=0, name=None)


def test_smaller_clips_keep_their_kind() -> None:
    """Lying clips stay lying, a preset becomes a preset, and most tokens come first."""
    lying = [fit.words(change) for change in fit._shapes(configure(*LONG)) if len(change) == 1]
    sizes = [word.removeprefix("data.resolution=") for word in lying if "resolution" in word]
    assert sizes == ["640x1408", "512x768", "384x640", "256x384"]
    assert lying.index("data.num_frames=121") == 1, "half the tokens: more than 512×768 at full length has"
    preset = [fit.words(change) for change in fit._shapes(configure("+flavour=t2v-pro-sft-10s-hd"))]
    assert preset[0] == "data.num_frames=121"
    assert "data.resolution=sd" in preset
    assert "data.resolution=512x768" not in preset
