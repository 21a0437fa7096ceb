"""Gradients of all weights at the size that is trained: finite, and the same from step to step of one clip."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from k5dist.benchmark.settings import Benchmark, BenchmarkSettings, plan_benchmark
from k5dist.benchmark.train import build, make_clip, make_objective
from k5dist.compose import compose, to_run_config
from k5dist.world import ClusterFacts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = torch.device("cuda", 0)
TURNS = 4


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29534"})
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=GPU)
    yield
    dist.destroy_process_group()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("policy", ["linear", "attention", "full"])
@pytest.mark.parametrize("flavour", ["t2v-lite-sft-5s", "t2v-pro-sft-5s-hd"])
def test_every_gradient_is_finite_each_time(flavour: str, policy: str) -> None:
    overrides = [f"+flavour={flavour}", "adapter=full", "data.num_frames=121", "data.resolution=[512,768]"]
    overrides += ["model.attention_type=regular", "optimizer.kind=adamw_bf16"]
    config = to_run_config(compose([*overrides, f"train.activation_checkpointing={policy}"]))
    settings = BenchmarkSettings(4, 1, 1, 256, 1.0, "none", False, None, None, None)
    plan = plan_benchmark(config, settings, ClusterFacts(1, torch.cuda.get_device_name()))
    benchmark = Benchmark(dataclasses.replace(plan), settings, "k5dist")
    transformer = build(benchmark, GPU)
    objective, clip = make_objective(plan.config, GPU), make_clip(benchmark)
    text = clip.text.to(GPU, torch.bfloat16)
    norms: list[dict[str, float]] = []
    for turn in range(TURNS):
        # What memory held before must not matter: the next step's buffers are made of it.
        junk = [torch.full((1 << 28,), float("nan"), device=GPU, dtype=torch.bfloat16) for _ in range(8)]
        del junk
        objective.training_loss(transformer, clip, text, epoch=1).backward()
        found: dict[str, float] = {}
        for name, parameter in transformer.named_parameters():
            assert isinstance(parameter.grad, DTensor)
            found[name] = float(parameter.grad.to_local().float().norm())
            parameter.grad = None
        bad = [name for name, norm in found.items() if not norm < float("inf")]
        assert not bad, f"turn {turn}: {len(bad)} of {len(found)}, the last of the forward first: {bad[::-1][:12]}"
        norms.append(found)
    for name, norm in norms[0].items():
        assert all(other[name] == pytest.approx(norm, rel=5e-2, abs=1e-6) for other in norms[1:]), name
