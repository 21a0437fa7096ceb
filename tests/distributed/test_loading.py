"""Loading a checkpoint takes each worker the memory of its own shard: nobody ever holds the whole."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from k5dist.compose import compose, to_run_config
from k5dist.config import ModelConfig, RunConfig
from k5dist.model.transformer import build_transformer, materialise
from k5dist.model.weights import WEIGHTS_NAME, base_parameters
from k5dist.plan import ClusterFacts, make_plan
from k5dist.train.parallelise import make_mesh, parallelise

pytestmark = pytest.mark.timeout(300)

MIB = 2**20
WORKERS = 2
OVERRIDES = ["+flavour=t2v-tiny", "model.model_dim=1024", "model.ff_dim=4096", "model.time_dim=256"]
OVERRIDES += ["model.num_visual_blocks=4", f"cluster.workers_per_node={WORKERS}", "adapter=full"]
FILES = 4


def run_config() -> RunConfig:
    return to_run_config(compose(OVERRIDES))


def write_checkpoint(folder: Path, model: ModelConfig) -> dict[str, str]:
    """A diffusers transformer folder of random fp32 weights in several files; the file of each tensor."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(model)))
    (folder.parent / "model_index.json").write_text("{}")
    transformer = build_transformer(str(folder.parent), model, lora=None, dtype=torch.float32)
    shapes = {name: parameter.shape for name, parameter in base_parameters(transformer)}
    generator = torch.Generator().manual_seed(0)
    places = {}
    for at in range(FILES):
        names = sorted(shapes)[at::FILES]
        file = WEIGHTS_NAME.replace(".safetensors", f"-{at + 1:05d}-of-{FILES:05d}.safetensors")
        save_file({name: torch.rand(shapes[name], generator=generator) for name in names}, folder / file)
        places |= dict.fromkeys(names, file)
    (folder / f"{WEIGHTS_NAME}.index.json").write_text(json.dumps({"weight_map": places}))
    return places


def memory(field: str) -> int:
    """A field of this process's memory in bytes: VmRSS, or VmHWM for its peak."""
    (found,) = re.findall(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found) * 1024


def _load(rank: int, pretrained: str, folder: str) -> None:
    """One worker: load, report bytes, check the own rows against the files."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORKERS)
    config = run_config()
    plan = make_plan(config, ClusterFacts(0), "generated:test")
    mesh = make_mesh(plan.world)
    transformer = build_transformer(pretrained, config.model, lora=None, dtype=torch.float32)
    parallelise(transformer, mesh, config.train, plan.recompute)
    before = memory("VmRSS")
    materialise(transformer, pretrained, device=torch.device("cpu"), seed=0)
    after, peak = memory("VmRSS"), memory("VmHWM")
    print(rank, before/MIB, after/MIB, peak/MIB, flush=True)
    dist.barrier()
    dist.destroy_process_group()

def test_x(tmp_path: Path) -> None:
    import time
    t=time.time()
    config = run_config()
    write_checkpoint(tmp_path / "pretrained" / "transformer", config.model)
    print(time.time()-t, sum(f.stat().st_size for f in (tmp_path / "pretrained" / "transformer").iterdir())/MIB)
    mp.spawn(_load, (str(tmp_path / "pretrained"), str(tmp_path)), nprocs=2)
    print(time.time()-t)
