"""What FSDP2 gathers (every block once forward and once backward, nothing in vain) in which types, and what it leaves
of a graph."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.tensor.debug import CommDebugMode

from k5dist.model.lora import is_length
from k5dist.plan import RunPlan
from k5dist.train.parallelise import compile_blocks
from k5dist.train.worker import build_trainer
from tests.distributed.gangs import make_run

pytestmark = pytest.mark.timeout(120)
POLICIES = ("full", "attention", "linear", "linear")
DORA = ("lora.use_dora=true", "train.precision=bf16")


def _count_gathers(rank: int, plans: list[str], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    counts = []
    for path in plans:
        trainer, dataset = build_trainer(RunPlan.from_json(Path(path).read_text()), torch.device("cpu"))
        for block in trainer.transformer.get_submodule("visual_transformer_blocks").children():
            block.recompute = "none"  # type: ignore[assignment]  (counting and recomputation do not get on)
        clip, objective = dataset.read(0), trainer.work.objective
        text = clip.text.to(objective.device, objective.dtype)
        with CommDebugMode() as forward:
            loss = objective.training_loss(trainer.transformer, clip, text, 0)
        with CommDebugMode() as backward:
            loss.backward()
        counts.append([_gathers(forward), _gathers(backward)])
    if rank == 0:
        (Path(folder) / "counts.json").write_text(json.dumps(counts))
    dist.barrier()
    dist.destroy_process_group()


def _gathers(mode: CommDebugMode) -> int:
    return sum(count for op, count in mode.get_comm_counts().items() if "allgather" in str(op).replace("_", ""))


def test_every_group_is_gathered_once_a_pass(tmp_path: Path, tiny_t2v: Path) -> None:
    plans = [make_run(tmp_path, tiny_t2v, name, f"adapter={name}", workers=2) for name in ("lora", "full")]
    model = plans[0].config.model
    mp.spawn(_count_gathers, ([plan.plan_uri for plan in plans], str(tmp_path)), nprocs=2)
    (lora_forward, lora_backward), (full_forward, full_backward) = json.loads((tmp_path / "counts.json").read_text())
    blocks = model.num_text_blocks + model.num_visual_blocks
    # Each block and its modulation, the output's modulation, the time embedding, and the root, which stays whole.
    assert lora_forward == full_forward == 2 * blocks + 3
    assert full_backward == 2 * blocks + 2
    # Frozen modulations have no backward; one is still guessed ahead, after the last block.
    assert blocks <= lora_backward <= blocks + 1


def _count_graphs(rank: int, plan: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    trainer, dataset = build_trainer(RunPlan.from_json(Path(plan).read_text()), torch.device("cpu"))
    transformer: Any = trainer.transformer
    for block, policy in zip(transformer.visual_transformer_blocks, POLICIES, strict=True):
        block.recompute = policy
    counter = CompileCounterWithBackend("aot_eager")
    compile_blocks(transformer, counter)
    objective = trainer.work.objective
    counts = []
    for row in range(6):
        clip = dataset.read(row)
        text = clip.text.to(objective.device, objective.dtype)
        objective.training_loss(transformer, clip, text, 0).backward()
        objective.validation_loss(transformer, clip, text, 0, 2)
        counts.append(counter.frame_count)
    if rank == 0:
        (Path(folder) / "graphs.json").write_text(json.dumps(counts))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("adapter", [("adapter=full",), DORA], ids=["full", "dora"])
def test_captions_of_all_lengths_share_a_graph(tmp_path: Path, tiny_t2v: Path, adapter: tuple[str, ...]) -> None:
    """FSDP2's hooks hand a block new tensors: a mark on the old ones would be lost, and each length compiled anew."""
    plan = make_run(tmp_path, tiny_t2v, "graphs", *adapter, workers=2)
    mp.spawn(_count_graphs, (plan.plan_uri, str(tmp_path)), nprocs=2)
    # One for each policy and one for validation, from the first clip on; the captions have six lengths.
    assert json.loads((tmp_path / "graphs.json").read_text()) == [4] * 6


def _gather_lengths(rank: int, plan: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    trainer, dataset = build_trainer(RunPlan.from_json(Path(plan).read_text()), torch.device("cpu"))
    transformer: Any = trainer.transformer
    trained = {name: p for name, p in transformer.named_parameters() if is_length(name)}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.mul_(1 + 1e-3)  # moved by less than two bf16 are apart
    whole = {name: parameter.full_tensor() for name, parameter in trained.items()}
    found: dict[str, torch.Tensor] = {}

    def note(block: Any, *_: Any) -> None:
        path = next(path for path, module in transformer.named_modules() if module is block)
        found.update({f"{path}.{name}": p.detach().clone() for name, p in block.named_parameters() if is_length(name)})

    for block in (*transformer.text_transformer_blocks, *transformer.visual_transformer_blocks):
        block.register_forward_hook(note)
    objective, clip = trainer.work.objective, dataset.read(0)
    text = clip.text.to(objective.device, objective.dtype)
    for _ in range(2):  # after an update, too, what is gathered is what is trained
        objective.validation_loss(transformer, clip, text, 0, 2)  # leaves them whole
        objective.training_loss(transformer, clip, text, 0).backward()
        assert found.keys() == whole.keys() == trained.keys()
        for name, parameter in trained.items():
            assert found[name].dtype == torch.float32, name
            assert torch.equal(found[name], whole[name]), name
            assert parameter.grad is not None and parameter.grad.full_tensor().count_nonzero() > 0, name
        trainer.work.optimiser.step()
        trainer.work.optimiser.zero_grad()
        whole = {name: parameter.full_tensor() for name, parameter in trained.items()}
        assert all(not torch.equal(found[name], now) for name, now in whole.items())
    (Path(folder) / f"checked-{rank}").touch()
    dist.barrier()
    dist.destroy_process_group()


def test_lengths_of_dora_stay_in_fp32_among_bf16(tmp_path: Path, tiny_t2v: Path) -> None:
    plan = make_run(tmp_path, tiny_t2v, "lengths", *DORA, "lora.targets=attention+ffn", workers=2)
    mp.spawn(_gather_lengths, (plan.plan_uri, str(tmp_path)), nprocs=2)
    assert (tmp_path / "checked-0").exists() and (tmp_path / "checked-1").exists()
