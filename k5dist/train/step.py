"""One optimiser step: forward and backward over a step's clips, clipping, update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from k5dist.cache.keys import seed_of
from k5dist.model.forward import Text
from k5dist.model.lora import dropout_key
from k5dist.plan import RunPlan
from k5dist.train.feed import Step, TextStore
from k5dist.train.objective import Clip, Objective
from k5dist.train.optimiser import learning_rate, set_learning_rate, trainable_parameters
from k5dist.train.parallelise import set_gradient_sync
from k5dist.train.rollout import Rollout


@dataclass
class TrainStep:
    """What a step works with. The benchmark times this very thing."""

    plan: RunPlan
    transformer: nn.Module
    optimiser: torch.optim.Optimizer
    objective: Objective
    texts: TextStore | None  # for captions that are dropped; None where none ever is

    def __post_init__(self) -> None:
        # What a rule of `optimizer.groups` freezes must not shrink the others' gradients when they are clipped.
        groups = self.optimiser.param_groups
        frozen = {id(p) for group in groups if not group.get("lr_scale", 1) for p in group["params"]}
        self.parameters = [p for p in trainable_parameters(self.transformer).values() if id(p) not in frozen]
        names = [dataset.name for dataset in self.plan.config.datasets]
        self.places = {name: i for i, name in enumerate(names)} if len(names) > 1 else {}
        self.of_dataset: dict[str, float] = {}  # mean losses of the last step's datasets, where a run has several
        self.alignment: float | None = None  # CREPA's of the last step, the mean over its clips; None without
        self.dropout = dropout_key(self.transformer)

    def update(self, step: Step, number: int) -> tuple[float, float]:
        """Take optimiser step `number` (from 1 on): the batch's mean loss and the gradient's norm before clipping.

        Returns when the device is done: the step's one synchronisation, so that its time is the step's.
        """
        config, world = self.plan.config, self.plan.world
        set_learning_rate(self.optimiser, learning_rate(config.optimizer, number, config.train.steps))
        # What is not drawn by a clip's own key is a function of step and worker; workers that share a clip draw alike.
        torch.manual_seed(seed_of(config.train.seed, "step", number - 1, dist.get_rank() // world.context))
        # Of the batch: loss, alignment, and the loss by dataset.
        sums = torch.zeros(2 + len(self.places), device=self.objective.device)
        rollout = Rollout.of_step(config.rollout, config.train.seed, number)
        scale = world.data_parallel / step.num_real  # FSDP2 averages over data-parallel (× context) workers
        for i, (clip, weight) in enumerate(step.clips):
            set_gradient_sync(self.transformer, last=i == len(step.clips) - 1, full=config.adapter == "full")
            if self.dropout is not None:
                self.dropout.set(
                    seed_of(config.train.seed, step.epoch, clip.key, "adapter dropout"), self.objective.device
                )
            position = i * world.data_parallel + dist.get_rank() // world.context  # in the global batch
            quantile = self.objective.quantile(clip, step.epoch, step.batch, position, step.num_real)
            rolled = rollout if step.draws and step.draws[i] < rollout.chance else None
            text = self._text(step, clip)
            loss, alignment = self.objective.training_losses(self.transformer, clip, text, step.epoch, quantile, rolled)
            (loss * (weight * scale)).backward()
            sums[0] += loss.detach() * weight
            if alignment is not None:
                sums[1] += alignment * weight
            if self.places and step.datasets:
                sums[2 + self.places[step.datasets[i]]] += loss.detach() * weight
        norm = clip_gradients(self.parameters, config.optimizer.max_grad_norm)
        # Stochastic rounding draws for a shard, alike on its replicas.
        torch.manual_seed(seed_of(config.train.seed, "update", number, dist.get_rank() % world.weight_shards))
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        dist.all_reduce(sums)
        norm_value, total, alignments, *by_dataset = torch.cat(
            [norm.to(sums.dtype)[None], sums / world.context]
        ).tolist()
        sizes = step.of_dataset
        self.of_dataset = {name: by_dataset[at] / sizes[name] for name, at in self.places.items() if name in sizes}
        self.alignment = alignments / step.num_real if self.objective.crepa_weight else None
        return total / step.num_real, norm_value

    def _text(self, step: Step, clip: Clip) -> Text:
        text = clip.text
        if self.texts is not None and self.objective.drops_caption(clip.key, step.epoch):
            config = self.plan.config
            negative = config.train.unconditional == "negative"
            text = self.texts.get(config.validation.negative_prompt if negative else "")
        return text.to(self.objective.device, self.objective.dtype)


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scale FSDP2's sharded gradients in place to a norm of at most `max_norm`; the norm before, fp32, 0-dim.

    `clip_grad_norm_` takes the norm in the gradients' own type, which for bf16 is three digits.
    """
    gradients = [p.grad for p in parameters if isinstance(p.grad, DTensor)]
    assert gradients, "FSDP2 gives gradients as DTensors"
    local = [gradient.to_local() for gradient in gradients]
    square = torch.stack(torch._foreach_norm(local, 2, torch.float32)).square().sum()
    mesh = gradients[0].device_mesh  # (shards), or (replicate, shards): replicas hold the same
    dist.all_reduce(square, group=mesh.get_group(mesh.ndim - 1))
    norm = square.sqrt()
    torch._foreach_mul_(local, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
