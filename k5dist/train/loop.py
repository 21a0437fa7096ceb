"""The training loop: take a step's clips, step, report, and at their intervals validate and save."""

from __future__ import annotations

import contextlib
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
from k5dist.train.adaptive import Prodigy
from k5dist.train.checkpoint import Checkpoints
from k5dist.train.ema import Ema, replaced
from k5dist.train.feed import Feed, Step
from k5dist.train.history import LossHistory
from k5dist.train.optimiser import learning_rate, optimiser_tensors, trainable_parameters
from k5dist.train.sharded import ShardedOptimizer
from k5dist.train.signals import StopSignal
from k5dist.train.step import TrainStep
from k5dist.train.validate import Validator, best_probe_uri, write_probe


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
    ema: Ema | None = None
    history: list[dict[str, Any]] = field(default_factory=list)  # metrics since the last checkpoint
    held_out: LossHistory | None = None  # None where nothing is held out or nothing validates
    saved: int | None = None  # the step of the newest checkpoint

    @property
    def transformer(self) -> nn.Module:
        return self.work.transformer

    def run(self, feed: Feed) -> None:
        """Train to the last step, or until asked to stop; either way the state is saved when it returns."""
        config = self.plan.config
        steps = iter(feed)
        if self.validator is not None:
            if self.state.step == 0:
                with self.validating():
                    self.validator.report_losses(self.transformer, 0)
                self.validator.sample_base(self.transformer, 0)
            elif self.held_out is not None and _due(self.state.step, config.validation.every) and not self.validated:
                self.validate()  # which was cut off
        while not self.ended:
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
        if self.ema is not None:
            self.ema.update(self.state.step)
        self.state.epoch, self.state.batch = (step.epoch + 1, 0) if step.last_of_epoch else (step.epoch, step.batch + 1)
        return loss, norm

    @property
    def ended(self) -> bool:
        """Whether the last step is reached, or no better loss is waited for any longer."""
        config = self.plan.config
        if self.state.step >= config.train.steps:
            return True
        return self.held_out is not None and self.held_out.exhausted(config.validation.patience)

    @property
    def validated(self) -> bool:
        """Whether the validation of the present step is behind us, by what is on record."""
        return self.held_out is not None and self.state.step in self.held_out.losses

    def validate(self) -> None:
        """Held-out losses, which may make this step's checkpoint the best; videos; then it is on record."""
        if self.validator is None:
            return
        step, history = self.state.step, self.held_out
        with self.validating():
            losses = self.validator.report_losses(self.transformer, step)
        if losses and history is not None:
            history.losses[step] = losses
            if self.plan.config.checkpoint.keep_best and history.best_step == step:
                self.keep_best()
        with self.validating():
            self.validator.sample_videos(self.transformer, step)
        if losses and history is not None and dist.get_rank() == 0:
            history.publish(self.plan)
            if history.exhausted(self.plan.config.validation.patience):
                emit("patience", step=step, best=history.best_step)

    def keep_best(self) -> None:
        """This step's checkpoint, beyond all others, with a probe of its own for its export."""
        assert self.validator is not None
        self.save()
        self.checkpoints.keep_best(self.state.step)
        write_probe(best_probe_uri(self.plan), self.transformer, self.validator, self.state.step, self.evaluated)

    def validating(self) -> contextlib.AbstractContextManager[None]:
        """Weights for a validation: those that are exported, but where it shows the raw ones beside their average."""
        beside = self.ema is not None and "ema" in self.plan.config.validation.compare
        return contextlib.nullcontext() if beside else self.evaluated()

    def evaluated(self) -> contextlib.AbstractContextManager[None]:
        """The transformer with the weights to export: an average's where one is kept."""
        if self.ema is not None:
            return self.ema.applied(self.transformer)
        optimiser = self.work.optimiser
        average = optimiser.average() if isinstance(optimiser, ShardedOptimizer) else None
        return contextlib.nullcontext() if average is None else replaced(self.transformer, average)

    def save(self) -> None:
        if self.saved != self.state.step:
            self.checkpoints.save(self.tensors(), self.state.step, self.history)
            self.history, self.saved = [], self.state.step

    def remember(self) -> None:
        """What was measured up to the present step, as rank 0 reads it."""
        found = [LossHistory.read(self.plan, self.state.step) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(found, src=0, group=self.checkpoints.group)
        self.held_out = found[0]
        assert self.held_out is not None
        if self.plan.config.checkpoint.keep_best:
            self.checkpoints.best = self.held_out.best_step

    def tensors(self) -> dict[str, Any]:
        """What a checkpoint holds, whole: trainable weights, optimiser, and the run's counters."""
        return {
            "model": dict(trainable_parameters(self.transformer)),
            "optimizer": optimiser_tensors(self.transformer, self.work.optimiser),
            **({} if self.ema is None else {"ema": self.ema.tensors}),
            "train_state": {"counters": self.state.tensor()},
        }

    def resume(self, step: int) -> None:
        tensors = self.tensors()
        self.checkpoints.load(tensors, step)
        self.state = TrainState.of(tensors["train_state"]["counters"])
        assert self.state.step == step, "a checkpoint's folder is named after its step"
        self.saved = step
        if dist.get_rank() == 0:
            validations = LossHistory.read(self.plan, step).losses
            emit("resumed", step=step, history=self.checkpoints.history(step), validations=validations)

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
            **{f"loss/{name}": value for name, value in self.work.of_dataset.items()},
            **self.device_metrics(step, seconds),
        }
        if self.work.alignment is not None:
            metrics["crepa_alignment"] = self.work.alignment
        if isinstance(self.work.optimiser, Prodigy):
            metrics["prodigy_d"] = float(self.work.optimiser.shared["d"])  # times lr: the rate that is taken
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
