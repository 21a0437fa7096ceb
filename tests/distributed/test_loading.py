"""Loading a checkpoint takes each worker the memory of its own shard: nobody ever holds the whole."""

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor
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
OVERRIDES = ["+flavour=t2v-tiny", "adapter=full", f"cluster.workers_per_node={WORKERS}"]
OVERRIDES += ["model.model_dim=512", "model.ff_dim=2048", "model.time_dim=256", "model.num_visual_blocks=16"]
FILES = 4
# Beside its shard a worker holds what is being read: by each of 8 threads the bytes of its rows of one tensor, and a
# copy of them that may be written to: 8 × 2 × 2 MiB at most here, of which the allocator gives back little. Between 29
# and 37 MiB were measured.
SLACK = 64 * MIB
LOOKED_AT = (
    "visual_embeddings.in_layer.weight",
    "visual_transformer_blocks.7.visual_modulation.out_layer.bias",
    "visual_transformer_blocks.15.feed_forward.out_layer.weight",
    "out_layer.out_layer.weight",
)


@pytest.fixture
def pretrained(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "pretrained"
    write_checkpoint(folder / "transformer", run_config().model)
    yield folder
    shutil.rmtree(folder)  # pytest would keep it for the sessions to come


def run_config() -> RunConfig:
    return to_run_config(compose(OVERRIDES))


def write_checkpoint(folder: Path, model: ModelConfig) -> None:
    """A diffusers transformer folder of random fp32 weights in several files."""
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


def memory(field: str) -> int:
    """Bytes of this process's memory: VmRSS, or VmHWM for its peak."""
    (kib,) = re.findall(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(kib) * 1024


def _load(rank: int, pretrained: str, folder: str) -> None:
    """One worker: load the weights; leave what memory that took, and some of them whole."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORKERS)
    config = run_config()
    plan = make_plan(config, ClusterFacts(0), "generated:test")
    transformer = build_transformer(pretrained, config.model, lora=None, dtype=torch.float32)
    parallelise(transformer, make_mesh(plan.world), config.train, plan.recompute)
    before = memory("VmRSS")
    materialise(transformer, pretrained, device=torch.device("cpu"), seed=0)
    peak = memory("VmHWM")
    parameters = dict(base_parameters(transformer))
    shard = sum(local(parameter).nbytes for parameter in parameters.values())
    (Path(folder) / f"{rank}.json").write_text(json.dumps({"before": before, "peak": peak, "shard": shard}))
    whole = {name: parameters[name].detach() for name in LOOKED_AT}
    whole = {name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in whole.items()}
    if rank == 0:
        save_file(whole, Path(folder) / "loaded.safetensors")
    dist.barrier()
    dist.destroy_process_group()


def local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from Linux's /proc")
def test_loading_takes_each_worker_the_memory_of_its_shard(pretrained: Path, tmp_path: Path) -> None:
    files = sorted((pretrained / "transformer").glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    assert len(files) == FILES
    assert size > 300 * MIB
    mp.spawn(_load, (str(pretrained), str(tmp_path)), nprocs=WORKERS)
    facts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(WORKERS)]
    assert sum(each["shard"] for each in facts) == pytest.approx(size, rel=1e-3), "between them they hold it once"
    for each in facts:
        grown = each["peak"] - each["before"]
        assert grown > 0.9 * each["shard"], "the peak is that of loading"
        assert grown < each["shard"] + SLACK < 0.8 * size
    stored: dict[str, Tensor] = {}
    for file in files:
        stored |= load_file(file)
    for name, tensor in load_file(tmp_path / "loaded.safetensors").items():
        assert torch.equal(tensor, stored[name]), name
