"""What to say when a GPU's memory runs out: what used it, by parts, beside what the plan predicted, and what would fit.

Weights, gradients and the optimiser's states are counted where they lie. The rest of what was allocated at the peak is
what activations, gathered copies, workspaces and gradients that were not reduced yet took together: the allocator does
not tell them apart, the plan does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from k5dist import estimate, fit, memory
from k5dist.estimate import GIB
from k5dist.memory import Memory
from k5dist.model.weight_stream import WeightStream
from k5dist.plan import RunPlan
from k5dist.world import ClusterFacts

if TYPE_CHECKING:
    from k5dist.train.loop import Trainer

# The parts of a plan's prediction that come and go within a step.
_PASSING = ("gathered", "kept", "working", "sparse", "workspace")
_TRIED = re.compile(r"Tried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Usage:
    """Bytes on one worker's device: what was counted, and what its allocator says where there is one (0 elsewhere)."""

    weights: int
    gradients: int
    optimizer: int  # and an average of the weights
    peak: int = 0  # the most that was allocated at once
    reserved: int = 0  # held by the allocator, allocated or not, when it ran out
    tried: int = 0  # what was asked for then
    foreign: int = 0  # the device's memory that this process's allocator does not hold
    streamed: int = 0  # weights that lie in the host's memory

    @property
    def passing(self) -> int:
        """What was allocated at the peak beside the counted parts."""
        return max(0, self.peak - self.weights - self.gradients - self.optimizer)


class OutOfMemory(Exception):
    """The GPU's memory ran out; the message is a report for whoever started the run."""

    def __init__(self, report: str, usage: Usage) -> None:
        super().__init__(report)
        self.usage = usage


@contextlib.contextmanager
def explained(plan: RunPlan, device: torch.device, trainer: Trainer | None = None) -> Iterator[None]:
    """Where memory runs out inside, raises OutOfMemory with a report; without a trainer while it is being built."""
    # Within a step FSDP2 puts gathered copies in the place of the shards that are counted. Streamed weights come and
    # go, and the plan has those of two blocks among what is gathered.
    shards: list[Tensor] = []
    if trainer is not None:
        stream = _streamed(trainer)
        streamed = set() if stream is None else stream.parameters
        shards += trainer.transformer.buffers()
        shards += [parameter for parameter in trainer.transformer.parameters() if parameter not in streamed]
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "out of memory" not in str(error):
            raise
        log.exception("out of memory")
        usage = measure(device, error, shards, trainer)
        text = report(plan, None if trainer is None else trainer.state.step, usage)
        on_host = plan.config.train.stream_weights or plan.config.train.offload_gib
        if on_host and not isinstance(error, torch.OutOfMemoryError):
            text += "\nIt may be the host's memory, which train.stream_weights and train.offload_gib lock pages of."
        raise OutOfMemory(f"{text}\n{str(error).splitlines()[0]}", usage) from error


def _streamed(trainer: Trainer) -> WeightStream | None:
    return getattr(trainer.transformer, "stream", None)


def measure(device: torch.device, error: Exception, shards: Sequence[Tensor], trainer: Trainer | None) -> Usage:
    """What the parts of a training hold, and the device's allocator."""
    states: list[Any] = []
    stream = None
    if trainer is not None:
        stream = _streamed(trainer)
        states += [value for state in trainer.work.optimiser.state.values() for value in state.values()]
        states += trainer.ema.tensors.values() if trainer.ema is not None else []
    usage = Usage(
        weights=_bytes(shards, device),
        gradients=_bytes([shard.grad for shard in shards if shard.grad is not None], device),
        optimizer=_bytes([state for state in states if isinstance(state, Tensor)], device),
        tried=_tried(str(error)),
        streamed=0 if stream is None else sum(tensor.nbytes for block in stream.host for tensor in block),
    )
    if device.type != "cuda":
        return usage
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    return dataclasses.replace(
        usage,
        peak=torch.cuda.max_memory_allocated(device),
        reserved=reserved,
        foreign=max(0, total - free - reserved),
    )


def _bytes(tensors: Iterable[Tensor], device: torch.device) -> int:
    """Of this worker's part of them on the device, shared memory counted once."""
    storages: dict[int, int] = {}
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.device.type == device.type:
            storage = local.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tried(message: str) -> int:
    found = _TRIED.search(message)
    return int(float(found[1]) * _UNITS[found[2]]) if found else 0


def report(plan: RunPlan, step: int | None, usage: Usage) -> str:
    """A table of the parts, and settings that the plan finds to fit if everything needs as much more as was seen."""
    gpu, _, card = estimate.gpu_facts(plan.world.gpu_name)
    limit = memory.gpu_bytes(plan.config, plan.world)
    bucket = memory.largest(plan.buckets)
    planned = memory.predict(plan.config, plan.world, bucket, plan.recompute)
    where = gpu if plan.world.device == "cuda" else "worker"
    when = "before the first step" if step is None else f"after step {step}"
    tried = f", when {_gib(usage.tried)} GiB more were asked for" if usage.tried else ""
    lines = [f"out of memory on {where} {when}{tried}", *_table(planned, usage)]
    lines.append(f"planned for clips of {bucket}, the largest bucket")
    on_host = [f"{_gib(usage.streamed)} GiB of streamed weights"] if usage.streamed else []
    if plan.recompute.offload:
        room = f"up to {plan.config.train.offload_gib:g} GiB"
        on_host.append(f"what the first {plan.recompute.offload} blocks keep, {room}")
    if on_host:
        lines.append(f"beside them in the host's memory: {' and '.join(on_host)}")
    held = max(0.0, usage.foreign - planned.runtime)
    available = min(limit, card - held)
    if available < 0.97 * limit:
        lines.append(f"other processes, or libraries of this one, hold {held / GIB:.1f} GiB of the GPU's {_gib(card)}")
    if usage.reserved - usage.peak > 0.05 * limit:
        lines.append(f"{_gib(usage.reserved - usage.peak)} GiB were held in pieces that nothing asked for fitted into")
    if plan.world.device != "cuda":
        return "\n".join(lines)  # of a host's memory the plan knows nothing
    facts = ClusterFacts(plan.world.workers_per_node, plan.world.gpu_name)
    found = fit.remedies(plan.config, facts, excess(planned, usage, limit, available))
    if found:
        lines.append("settings that would fit, if all needs as much more than planned as it did here:")
        lines += [f"  {fit.words(change)}" for change in found]
    else:
        lines.append("no other setting is known to fit: GPUs with more memory, or a smaller data.resolution")
    return "\n".join(lines)


def excess(planned: Memory, usage: Usage, limit: float, available: float) -> float:
    """By how much the need was greater than its prediction, or the GPU smaller than planned by."""
    needed = (usage.peak + usage.tried) / planned.allocated
    return max(1.0, needed, limit / max(available, 1.0))


def _table(planned: Memory, usage: Usage) -> list[str]:
    """Rows of GiB; of what comes and goes the plan's parts stand below their sum."""
    passing = {name: getattr(planned, name) for name in _PASSING}
    rows = [
        ("weights", planned.weights, usage.weights),
        ("gradients", planned.gradients, usage.gradients),
        ("optimiser and averages", planned.optimizer, usage.optimizer),
        ("activations and copies", sum(passing.values()), usage.passing),
        *[(f"  {name}", size, None) for name, size in passing.items() if size >= 0.005 * GIB],
        ("all of it, at the peak", planned.allocated, usage.peak),
    ]
    lines = [f"  {'GiB':<24}{'planned':>9}{'measured':>10}"]
    for name, expected, found in rows:
        measured = "" if found is None or (found == 0 and not usage.peak) else _gib(found)
        lines.append(f"  {name:<24}{_gib(expected):>9}{measured:>10}".rstrip())
    return lines


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
