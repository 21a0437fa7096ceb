"""The training loop: take a step's clips, step, report, and at their intervals validate and save."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from k5dist.cache.keys import seed_of
from k5dist.estimate import forward_flops, gpu_facts
from k5dist.events import emit
from k5dist.plan import RunPlan
from k5dist.train.checkpoint import Checkpoints
from k5dist.train.feed import Feed, Step, TextStore
from k5dist.train.objective import Objective
from k5dist.train.optimiser import learning_rate, optimiser_tensors, set_learning_rate, trainable_parameters
from k5dist.train.parallelise import set_gradient_sync
from k5dist.train.signals import StopSignal
from k5dist.train.validate import Validator


@dataclass
class TrainState:
    """Everything a run must remember beside tensors. Randomness is keyed, so there is no generator among it."""

    step: int = 0  # optimiser steps taken
    epoch: int = 0  # of the next batch
    batch: int = 0  # its position in the epoch

    def tensor(self) -> Tensor:
        return torch.tensor([self.step, self.epoch, self.batch], dtype=torch.int64)

    @classmethod
    def of(cls, tensor: Tensor) -> TrainState:
        step, epoch, batch = tensor.tolist()
        return cls(step, epoch, batch)


@dataclass
class Trainer:
    """The parts of one training run on one worker, put together by `k5dist.train.worker`."""

    plan: RunPlan
    transformer: nn.Module
    optimiser: torch.optim.Optimizer
    objective: Objective
    texts: TextStore
    checkpoints: Checkpoints
    validator: Validator | None
    stop: StopSignal
    state: TrainState
    history: list[dict[str, Any]] = field(default_factory=list)  # metrics since the last checkpoint

    def run(self, feed: Feed) -> None:
        """Train to the last step, or until asked to stop; either way the state is saved when it returns."""
        config = self.plan.config
        steps = iter(feed)
        if self.state.step == 0 and self.validator is not None:
            self.validator.report_losses(self.transformer, 0)
        while self.state.step < config.train.steps:
            started = time.perf_counter()
            step = next(steps)
            loss, norm = self.train_step(step)
            self.report(step, loss, norm, time.perf_counter() - started)
            self.checkpoints.poll()
            if self.stop.requested():
                break
            if _due(self.state.step, config.validation.every) and self.state.step < config.train.steps:
                self.validate()
            if _due(self.state.step, config.checkpoint.every) and self.state.step < config.train.steps:
                self.save()
        self.save()
        self.checkpoints.finish()

    def train_step(self, step: Step) -> tuple[Tensor, Tensor]:
        """One optimiser step; the batch's mean loss and the gradient's norm before clipping, still on the device."""
        config = self.plan.config
        rate = learning_rate(config.optimizer, self.state.step + 1, config.train.steps)
        set_learning_rate(self.optimiser, rate)
        # Dropout (of an adapter, say) is the one draw that is not keyed by a clip: a function of step and rank.
        torch.manual_seed(seed_of(config.train.seed, "step", self.state.step, dist.get_rank()))
        total = torch.zeros((), device=self.objective.device)
        scale = self.plan.world.data_parallel / step.num_real  # FSDP2 averages over data-parallel workers
        for i, (clip, weight) in enumerate(step.clips):
            set_gradient_sync(self.transformer, i == len(step.clips) - 1)
            text = clip.text
            if self.objective.drops_caption(clip.key, step.epoch):
                text = self.texts.get("")
            text = text.to(self.objective.device, self.objective.dtype)
            loss = self.objective.training_loss(self.transformer, clip, text, step.epoch)
            (loss * (weight * scale)).backward()
            total += loss.detach() * weight
        parameters = list(trainable_parameters(self.transformer).values())
        norm = nn.utils.clip_grad_norm_(parameters, config.optimizer.max_grad_norm)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        dist.all_reduce(total)
        self.state.step += 1
        self.state.epoch, self.state.batch = (step.epoch + 1, 0) if step.last_of_epoch else (step.epoch, step.batch + 1)
        return total / step.num_real, norm.full_tensor() if isinstance(norm, DTensor) else norm

    def validate(self) -> None:
        if self.validator is not None:
            self.validator.run(self.transformer, self.state.step)

    def save(self) -> None:
        self.checkpoints.save(self.tensors(), self.state.step, self.history)
        self.history = []

    def tensors(self) -> dict[str, Any]:
        """What a checkpoint holds, whole: trainable weights, optimiser, and the run's counters."""
        return {
            "model": dict(trainable_parameters(self.transformer)),
            "optimizer": optimiser_tensors(self.transformer, self.optimiser),
            "train_state": {"counters": self.state.tensor()},
        }

    def resume(self, step: int) -> None:
        tensors = self.tensors()
        self.checkpoints.load(tensors, step)
        self.state = TrainState.of(tensors["train_state"]["counters"])
        assert self.state.step == step, "a checkpoint's folder is named after its step"
        if dist.get_rank() == 0:
            emit("resumed", step=step, history=self.checkpoints.history(step))

    def report(self, step: Step, loss: Tensor, norm: Tensor, seconds: float) -> None:
        config = self.plan.config
        tokens = sum(clip.tokens for clip, _ in step.clips) * self.plan.world.data_parallel
        metrics = {
            "loss": float(loss),
            "grad_norm": float(norm),
            "lr": learning_rate(config.optimizer, self.state.step, config.train.steps),
            "epoch": step.epoch,
            "step_seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "data_wait_share": step.waited / seconds,
            "checkpoint_stall_seconds": self.checkpoints.stall_seconds,
            **self.device_metrics(step, seconds),
        }
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss of step {self.state.step} is {metrics['loss']}")
        if dist.get_rank() == 0:
            self.history.append({"step": self.state.step, "metrics": metrics})
            emit("step", step=self.state.step, metrics=metrics)

    def device_metrics(self, step: Step, seconds: float) -> dict[str, float]:
        """On a GPU: model FLOPs utilisation against the data sheet's dense bf16 rate, and peak memory in GiB."""
        if self.objective.device.type != "cuda":
            return {}
        model, adapter = self.plan.config.model, self.plan.config.adapter
        flops = sum(forward_flops(model, clip.tokens).training(adapter) for clip, _ in step.clips)
        _, rate, _ = gpu_facts(self.plan.world.gpu_name)
        return {
            "mfu": flops / (seconds * rate),
            "memory_gib": torch.cuda.max_memory_allocated() / 2**30,
            "memory_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        }


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
