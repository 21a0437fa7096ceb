"""The training loop: take a step's clips, step, report, and at their intervals validate and save."""

from __future__ import annotations

import math
import resource
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from k5dist.estimate import clip_flops, gpu_facts
from k5dist.events import emit
from k5dist.plan import RunPlan
from k5dist.train.checkpoint import Checkpoints
from k5dist.train.feed import Feed, Step
from k5dist.train.optimiser import learning_rate, optimiser_tensors, trainable_parameters
from k5dist.train.signals import StopSignal
from k5dist.train.step import TrainStep
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
    work: TrainStep
    checkpoints: Checkpoints
    validator: Validator | None
    stop: StopSignal
    state: TrainState
    history: list[dict[str, Any]] = field(default_factory=list)  # metrics since the last checkpoint

    @property
    def transformer(self) -> nn.Module:
        return self.work.transformer

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
            # Saved first: the write runs on while videos are sampled, and a crash among them loses nothing.
            if _due(self.state.step, config.checkpoint.every) and self.state.step < config.train.steps:
                self.save()
            if _due(self.state.step, config.validation.every) and self.state.step < config.train.steps:
                self.validate()
        self.save()
        self.checkpoints.finish()

    def train_step(self, step: Step) -> tuple[float, float]:
        """One optimiser step; the batch's mean loss and the gradient's norm before clipping."""
        loss, norm = self.work.update(step, self.state.step + 1)
        self.state.step += 1
        self.state.epoch, self.state.batch = (step.epoch + 1, 0) if step.last_of_epoch else (step.epoch, step.batch + 1)
        return loss, norm

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
            "optimizer": optimiser_tensors(self.transformer, self.work.optimiser),
            "train_state": {"counters": self.state.tensor()},
        }

    def resume(self, step: int) -> None:
        tensors = self.tensors()
        self.checkpoints.load(tensors, step)
        self.state = TrainState.of(tensors["train_state"]["counters"])
        assert self.state.step == step, "a checkpoint's folder is named after its step"
        if dist.get_rank() == 0:
            emit("resumed", step=step, history=self.checkpoints.history(step))

    def report(self, step: Step, loss: float, norm: float, seconds: float) -> None:
        config = self.plan.config
        tokens = sum(clip.tokens for clip, _ in step.clips) * self.plan.world.data_parallel
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "lr": learning_rate(config.optimizer, self.state.step, config.train.steps),
            "epoch": step.epoch,
            "step_seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "data_wait_share": step.waited / seconds,
            "checkpoint_stall_seconds": self.checkpoints.stall_seconds,
            **self.device_metrics(step, seconds),
        }
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(f"step {self.state.step}: the loss is {loss}, the gradient's norm {norm}")
        if dist.get_rank() == 0:
            self.history.append({"step": self.state.step, "metrics": metrics})
            emit("step", step=self.state.step, metrics=metrics)

    def device_metrics(self, step: Step, seconds: float) -> dict[str, float]:
        """Peak memory in GiB; on a GPU also model FLOPs utilisation against the data sheet's dense bf16 rate."""
        if self.work.objective.device.type != "cuda":
            return {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
        memory = {
            "memory_gib": torch.cuda.max_memory_allocated() / 2**30,
            "memory_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        }
        config = self.plan.config
        # The share of blocks that NABLA keeps is not known here, and dense FLOPs would flatter it.
        if config.model.is_sparse:
            return memory
        flops = 0.0
        for clip, _ in step.clips:
            text_tokens = clip.text.qwen_1LD.shape[1]
            flops += clip_flops(config, clip.token_shape, text_tokens=text_tokens).training(config.adapter)
        _, rate, _ = gpu_facts(torch.cuda.get_device_name())
        return memory | {"mfu": flops / (seconds * rate)}


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
