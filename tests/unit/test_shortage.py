"""Running out of memory: what used it, beside what was planned, and settings that would fit."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from k5dist import estimate, fit, memory
from k5dist.compose import compose, to_run_config
from k5dist.config import RunConfig
from k5dist.estimate import GIB
from k5dist.events import parse
from k5dist.plan import ClusterFacts, RunPlan, make_plan
from k5dist.train import step, worker
from k5dist.train.shortage import OutOfMemory, Usage, excess, report
from tests.distributed.gangs import make_run

CPU = torch.device("cpu")
H100 = "NVIDIA H100 80GB HBM3"
LITE = ("+flavour=t2v-lite-sft-5s", "data.resolution=[512,768]")
POLICY = "train.activation_checkpointing"
MESSAGE = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.19 GiB."


@functools.cache
def configure(*overrides: str) -> RunConfig:
    return to_run_config(compose(list(overrides)))


def planned(*overrides: str, gpus: int = 1, name: str = H100) -> RunPlan:
    return make_plan(configure(*overrides), ClusterFacts(gpus, name), "weights")


def prediction(plan: RunPlan) -> memory.Memory:
    return memory.predict(plan.config, plan.world, memory.largest(plan.buckets), plan.recompute)


def usage(plan: RunPlan, times: float, tried: float = 0, foreign: float = 1.2) -> Usage:
    """The plan's own numbers, with `times` as much at the peak."""
    parts = prediction(plan)
    sizes = [int(part) for part in (parts.weights, parts.gradients, parts.optimizer)]
    peak = int(times * parts.allocated)
    return Usage(*sizes, peak=peak, reserved=peak, tried=int(tried * GIB), foreign=int(foreign * GIB))


def rows(text: str) -> dict[str, list[float]]:
    """Numbers of the table by the names of its rows."""
    lines = [line for line in text.splitlines() if line.startswith("  ") and line[26:].strip()]
    table = {line[2:26].rstrip(): line[26:].split() for line in lines if "=" not in line}
    return {name: [float(number) for number in numbers] for name, numbers in table.items() if name != "GiB"}


def settings(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.startswith("  ") and "=" in line]


def test_every_part_stands_beside_its_prediction() -> None:
    plan = planned(*LITE)
    parts, used = prediction(plan), usage(plan, 1.3, tried=2.5)
    text = report(plan, 7, used)
    assert text.startswith(f"out of memory on {H100} after step 7, when 2.50 GiB more were asked for")
    table = rows(text)
    rounded = pytest.approx
    assert table["weights"] == rounded([parts.weights / GIB] * 2, abs=0.006)
    assert table["gradients"] == rounded([parts.gradients / GIB] * 2, abs=0.006)
    assert table["optimiser and averages"] == rounded([parts.optimizer / GIB] * 2, abs=0.006)
    passing = parts.gathered + parts.kept + parts.working + parts.sparse + parts.workspace
    found = used.peak - used.weights - used.gradients - used.optimizer
    assert table["activations and copies"] == rounded([passing / GIB, found / GIB], abs=0.006)
    assert table["  kept"] == rounded([parts.kept / GIB], abs=0.006)
    assert table["all of it, at the peak"] == rounded([parts.allocated / GIB, used.peak / GIB], abs=0.006)
    assert "planned for clips of 121×512×768" in text
    assert "hold" not in text and "pieces" not in text


@pytest.mark.parametrize(
    ("overrides", "gpus", "times"),
    [
        (LITE, 1, 1.3),
        (("+flavour=t2v-pro-sft-5s-hd", "data.resolution=[512,768]", "adapter=full"), 8, 1.6),
        (("+flavour=t2v-pro-sft-5s-hd", "data.resolution=[512,768]"), 1, 1.5),
        ((*LITE, f"{POLICY}=full"), 1, 6.0),
    ],
)
def test_what_is_proposed_would_fit_if_all_needs_as_much_more(
    overrides: tuple[str, ...], gpus: int, times: float
) -> None:
    plan = planned(*overrides, gpus=gpus)
    used = usage(plan, times)
    proposed = settings(report(plan, 1, used))
    assert 1 <= len(proposed) <= 3
    for change in proposed:
        config = configure(*overrides, *change.split())
        facts = ClusterFacts(config.cluster.gpus_per_node or gpus, H100)
        other = make_plan(config, facts, "weights")
        gpu_bytes = estimate.gpu_facts(H100)[2]
        assert times * prediction(other).total <= memory.usable(gpu_bytes), change


def test_an_adapters_base_can_leave_or_shrink() -> None:
    """A 24 GB card, and a model that fills it: first what changes no result."""
    plan = planned("+flavour=t2v-lite-sft-5s", "data.resolution=[256,384]", name="NVIDIA GeForce RTX 4090")
    text = report(plan, 1, usage(plan, 2.5))
    assert any("train.stream_weights=true" in change for change in settings(text)), text


def test_what_lies_in_the_hosts_memory_is_told_and_proposed() -> None:
    """A share of 24 GiB for Pro: weights leave the GPU, and what blocks keep; the report of a shortage names both."""
    pro = ("+flavour=t2v-pro-sft-5s-hd", "data.resolution=[512,768]", "train.gpu_memory_gib=24")
    config, facts = configure(*pro), ClusterFacts(1, H100)
    found = [change for tried in fit._more_host(config, facts) for change in tried if fit.fits(config, facts, change)]
    moved = fit.words(found[0])
    assert "train.stream_weights=true" in moved
    assert not fit._more_host(config, ClusterFacts(8, H100)), "eight workers would lock that much each"
    plan = planned(*pro, *moved.split())
    assert plan.recompute.offload > 0
    text = report(plan, 1, dataclasses.replace(usage(plan, 1.1), streamed=35 * 2**30))
    assert "35.00 GiB of streamed weights" in text
    assert f"what the first {plan.recompute.offload} blocks keep, up to {moved[-2:]} GiB" in text
    assert rows(text)["weights"][0] == pytest.approx(prediction(plan).weights / GIB, abs=0.006)
    assert "host's memory" not in report(planned(*LITE), 1, usage(planned(*LITE), 1.1))


def test_others_memory_and_fragments_are_named() -> None:
    plan = planned(*LITE)
    used = usage(plan, 0.6, foreign=32.0)
    text = report(plan, 3, used)
    assert "other processes, or libraries of this one, hold 30.8 GiB" in text
    gpu_bytes = estimate.gpu_facts(H100)[2]
    assert excess(prediction(plan), used, gpu_bytes, gpu_bytes / 2) == 2.0
    fragments = Usage(used.weights, used.gradients, used.optimizer, used.peak, used.peak + 9 * 2**30, 0, used.foreign)
    assert "9.00 GiB were held in pieces" in report(plan, 3, fragments)


def test_where_nothing_is_known_to_fit_that_is_said() -> None:
    text = report(planned(*LITE, f"{POLICY}=full"), 1, usage(planned(*LITE, f"{POLICY}=full"), 1e6))
    assert "no other setting is known to fit" in text


# The real thing, on one worker


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out in step 2, when its gradients are there."""
    clip, calls = step.clip_gradients, []

    def clip_gradients(*arguments: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError(MESSAGE)
        return clip(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(step, "clip_gradients", clip_gradients)


def test_a_step_counts_what_lies_there(tmp_path: Path, tiny_t2v: Path, group: None, scarce: None) -> None:
    plan = make_run(tmp_path, tiny_t2v, "scarce", "ema.enabled=true", "train.batch_size=1")
    with pytest.raises(OutOfMemory) as caught, contextlib.ExitStack() as stack:
        worker.work(plan, CPU, stack)
    used, trained = caught.value.usage, 4 * memory_trained(plan.config)
    assert used.tried == 2.5 * 2**30
    assert used.gradients == trained
    assert used.optimizer == 3 * trained + 4 * len(adapters(plan.config)), "two moments, an average, counts of steps"
    exact = 4 * estimate.parameters(plan.config.model) + trained
    assert exact <= used.weights < 1.2 * exact, "RoPE's tables are a little more"
    text = str(caught.value)
    assert text.startswith("out of memory on worker after step 1, when 2.50 GiB more were asked for")
    assert text.endswith(MESSAGE)


def test_streamed_weights_are_counted_where_they_lie(tmp_path: Path, tiny_t2v: Path, group: None, scarce: None) -> None:
    plan = make_run(tmp_path, tiny_t2v, "streamed", "train.stream_weights=true", "train.batch_size=1")
    with pytest.raises(OutOfMemory) as caught, contextlib.ExitStack() as stack:
        worker.work(plan, CPU, stack)
    used, model = caught.value.usage, plan.config.model
    streamed = 4 * model.num_visual_blocks * estimate.visual_block_parameters(model)
    assert used.streamed == streamed
    exact = 4 * estimate.parameters(model) + memory_trained(plan.config) * 4 - streamed
    assert exact <= used.weights < 1.4 * exact, "of the streamed ones none, though two blocks' are there"
    assert f"{streamed / GIB:.2f} GiB of streamed weights" in str(caught.value)


def memory_trained(config: RunConfig) -> int:
    return estimate.lora_parameters(config.model, config.lora)


def adapters(config: RunConfig) -> list[str]:
    from k5dist.config.names import adapter_names

    return list(adapter_names(config.model, config.lora))


def test_the_worker_tells_the_driver(
    tmp_path: Path, tiny_t2v: Path, scarce: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_run(tmp_path, tiny_t2v, "told", "train.batch_size=1")

    def leave(status: int) -> None:
        raise SystemExit(status)

    def start(_: RunPlan) -> torch.device:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return CPU

    monkeypatch.setattr(worker.os, "_exit", leave)
    monkeypatch.setattr(worker, "die_with_parent", lambda: None)
    monkeypatch.setattr(worker, "start_process_group", start)
    try:
        with pytest.raises(SystemExit) as left:
            worker.main(plan.plan_uri)
    finally:
        dist.destroy_process_group()
    assert left.value.code == 1
    events = [event for event in map(parse, capsys.readouterr().out.splitlines()) if event]
    (failed,) = [event for event in events if event["kind"] == "failed"]
    assert failed["error"].startswith("out of memory on worker after step 1")
    assert not failed["communication"], "it would run out again"
