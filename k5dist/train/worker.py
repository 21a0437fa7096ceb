"""One torchrun worker: `torchrun … -m k5dist.train.worker <plan.json>`. It reads the plan and nothing else."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import sys
import traceback

import torch
import torch.distributed as dist

from k5dist import memory, storage
from k5dist.cache.layout import TextEncoding
from k5dist.config import ConfigError
from k5dist.estimate import GIB, Bucket
from k5dist.events import emit
from k5dist.model.encoders import text_encoding
from k5dist.model.pretrained import read_config, scheduler_shift
from k5dist.model.transformer import build_transformer, materialise
from k5dist.plan import RunPlan
from k5dist.train.affinity import bind_beside
from k5dist.train.checkpoint import Checkpoints
from k5dist.train.ema import Ema
from k5dist.train.feed import Dataset, Feed
from k5dist.train.loop import Trainer, TrainState
from k5dist.train.objective import Objective
from k5dist.train.optimiser import make_optimiser, parameter_groups, trained_dtype
from k5dist.train.parallelise import compute_dtype, make_mesh, parallelise
from k5dist.train.shortage import OutOfMemory, explained
from k5dist.train.signals import StopSignal, die_with_parent
from k5dist.train.step import TrainStep
from k5dist.train.validate import Validator, probe_uri, probed_step, write_probe

START_TIMEOUT = datetime.timedelta(minutes=30)  # one node may download a checkpoint while the others wait
log = logging.getLogger(__name__)


def main(plan_uri: str) -> int:
    die_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    plan = RunPlan.from_json(storage.read_text(plan_uri))
    device = start_process_group(plan)
    try:
        with contextlib.ExitStack() as stack:
            work(plan, device, stack)
    except ConfigError as error:
        # An error of the user's, not one to start again from; other ranks may not see it, and must not be waited for.
        emit("config_error", key=error.key, value=str(error.value), rule=error.rule, fix=error.fix)
        os._exit(2)
    except OutOfMemory as error:
        emit("failed", rank=dist.get_rank(), error=str(error), traceback="", communication=False)
        os._exit(1)
    except Exception as error:
        text = traceback.format_exc()
        emit("failed", rank=dist.get_rank(), error=repr(error), traceback=text, communication=_is_communication(error))
        # No farewell to the others: they wait in a collective that will not come, and torchrun ends them.
        os._exit(1)
    # gloo aborts now and then when one rank tears down while another still talks.
    dist.barrier()
    dist.destroy_process_group()
    return 0


def _is_communication(error: Exception) -> bool:
    """Whether a peer's loss, rather than this worker's own doing, is what went wrong."""
    words = ("Connection closed by peer", "Connection reset by peer", "NCCL", "gloo", "Timed out waiting")
    return isinstance(error, (dist.DistError, RuntimeError)) and any(word in str(error) for word in words)


def start_process_group(plan: RunPlan) -> torch.device:
    if plan.world.device == "cuda":
        # Segments that grow instead of new ones beside them: sizes change from moment to moment, and what no longer
        # fits its segment would lie waste (in full fine-tuning 17% of the peak). Read when the first tensor is made.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        if (said := bind_beside(device, int(os.environ["LOCAL_WORLD_SIZE"]))) is not None:
            log.info("%s", said)
        if plan.config.train.gpu_memory_gib is not None:
            _, total = torch.cuda.mem_get_info(device)
            allowed = plan.config.train.gpu_memory_gib * GIB - memory.RUNTIME_BYTES
            torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total), device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, timeout=START_TIMEOUT)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    if dist.get_world_size() != plan.world.size:
        rule = f"the plan is for {plan.world.size} workers"
        raise ConfigError("plan.json", dist.get_world_size(), rule, "start that many, or plan again")
    return device


def work(plan: RunPlan, device: torch.device, stack: contextlib.ExitStack) -> None:
    """Everything between the process group's start and its end."""
    if dist.get_rank() == 0:
        emit("started", world=plan.world.size)
    with explained(plan, device):
        trainer, dataset = build_trainer(plan, device)
    with explained(plan, device, trainer):
        run_stages(plan, trainer, dataset, stack)
    if dist.get_rank() == 0:
        emit("finished", step=trainer.state.step)


def run_stages(plan: RunPlan, trainer: Trainer, dataset: Dataset, stack: contextlib.ExitStack) -> None:
    """Train from the newest checkpoint on, validating, or validate alone."""
    config = plan.config
    # With resume=never the driver has emptied the folder: what is found is of this very run, before a crash.
    found = trainer.checkpoints.latest()
    if found is not None:
        trainer.resume(found)
    if "train" in config.stages:
        if trainer.validator is not None and dataset.held_out_rows:
            trainer.remember()
        if not trainer.ended:
            trainer.run(make_feed(plan, trainer, dataset, stack))
        if trainer.ended and probed_step(plan) != trainer.state.step:
            if not trainer.validated:
                trainer.validate()
            # The last thing a training leaves: its presence says that nothing is missing.
            validator = make_validator(plan, trainer, dataset)
            step = trainer.state.step
            write_probe(probe_uri(plan), trainer.transformer, validator, step, trainer.evaluated)
    else:
        trainer.validate()


def make_feed(plan: RunPlan, trainer: Trainer, dataset: Dataset, stack: contextlib.ExitStack) -> Feed:
    feed = Feed(
        dataset,
        seed=plan.config.train.seed,
        batch_size=plan.batch_size,
        rank=data_parallel_rank(plan),
        size=plan.world.data_parallel,
        epoch=trainer.state.epoch,
        batch=trainer.state.batch,
        rolls_out=plan.config.rollout.enabled,
    )
    stack.callback(feed.close)
    return feed


def build_trainer(plan: RunPlan, device: torch.device) -> tuple[Trainer, Dataset]:
    config = plan.config
    encoding = plan_encoding(plan)
    dataset = Dataset.open(plan, encoding)
    dataset.check_batch(plan.batch_size)
    dtype = compute_dtype(config.train)
    mesh = make_mesh(plan.world)
    lora = config.lora if config.adapter == "lora" else None
    transformer = build_transformer(
        plan.pretrained,
        config.model,
        lora=lora,
        dtype=dtype,
        trained=trained_dtype(config.optimizer),
        crepa=config.crepa,
        feature_dim=dataset.feature_dim,
    )
    parameter_groups(transformer, config.optimizer)  # refuses what finds no weight, before any is allocated
    parallelise(transformer, mesh, config.train, plan.recompute)
    materialise(transformer, plan.pretrained, device=device, seed=config.train.seed, lora=lora)
    transformer.train()
    shift, reference = config.train.timestep_shift, None
    if shift == "resolution":
        shape = config.train.timestep_shift_reference
        reference = (memory.largest(plan.buckets) if shape is None else Bucket(*shape)).tokens
    objective = Objective(
        model=config.model,
        train=config.train,
        first_frame=config.flavour.task == "i2v",
        shift=shift if isinstance(shift, float) else scheduler_shift(plan.pretrained),
        scaling_factor=float(read_config(plan.pretrained, "vae")["scaling_factor"]),
        draw=config.precache.latents == "sample",
        device=device,
        dtype=dtype,
        reference_tokens=reference,
        crepa_weight=config.crepa.weight if config.crepa.enabled else 0.0,
        routes=config.tread.resolve(config.model.num_visual_blocks),
    )
    # Saves run on a thread: their collectives must not meet those of the loop, so each has a group of its own.
    checkpoints = Checkpoints(
        plan.checkpoints_uri,
        fingerprint=plan.run_fingerprint,
        keep=config.checkpoint.keep,
        group=new_gloo_group(),
    )
    stop = StopSignal(new_gloo_group())
    optimiser = make_optimiser(transformer, config.optimizer, device, dtype)
    step = TrainStep(plan, transformer, optimiser, objective, dataset.texts)
    ema = Ema(transformer, config.ema) if config.ema.enabled else None
    trainer = Trainer(plan, step, checkpoints, None, stop, TrainState(), ema)
    if "validate" in config.stages:
        trainer.validator = make_validator(plan, trainer, dataset)
    return trainer, dataset


def new_gloo_group() -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return group


def make_validator(plan: RunPlan, trainer: Trainer, dataset: Dataset) -> Validator:
    if trainer.validator is not None:
        return trainer.validator
    rank, size = data_parallel_rank(plan), plan.world.data_parallel
    return Validator(
        plan.config,
        plan.pretrained,
        plan.run_uri,
        dataset,
        trainer.work.objective,
        rank=rank,
        size=size,
        ema=trainer.ema,
    )


def plan_encoding(plan: RunPlan) -> TextEncoding:
    precache = plan.config.precache
    return text_encoding(precache.prompt_template, precache.prompt_template_start, precache.max_text_tokens)


def data_parallel_rank(plan: RunPlan) -> int:
    return dist.get_rank() // plan.world.context


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
