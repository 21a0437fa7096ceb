"""What FSDP2 gathers: every block once forward and once backward, and nothing in vain."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor.debug import CommDebugMode

from k5dist.plan import RunPlan
from k5dist.train.worker import build_trainer
from tests.distributed.gangs import make_run

pytestmark = pytest.mark.timeout(120)


def _count_gathers(rank: int, plans: list[str], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    counts = []
    for path in plans:
        trainer, dataset = build_trainer(RunPlan.from_json(Path(path).read_text()), torch.device("cpu"))
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
    kept = "train.activation_checkpointing=none"  # the counting mode and recomputation do not get on
    plans = [make_run(tmp_path, tiny_t2v, name, f"adapter={name}", kept, workers=2) for name in ("lora", "full")]
    model = plans[0].config.model
    mp.spawn(_count_gathers, ([plan.plan_uri for plan in plans], str(tmp_path)), nprocs=2)
    (lora_forward, lora_backward), (full_forward, full_backward) = json.loads((tmp_path / "counts.json").read_text())
    blocks = model.num_text_blocks + model.num_visual_blocks
    # Each block and its modulation, the output's modulation, the time embedding, and the root, which stays whole.
    assert lora_forward == full_forward == 2 * blocks + 3
    assert full_backward == 2 * blocks + 2
    # Frozen modulations have no backward; one is still guessed ahead, after the last block.
    assert blocks <= lora_backward <= blocks + 1
