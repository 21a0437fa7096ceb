"""What a training worker needs of its GPU's memory, by parts, and how much the blocks may therefore keep.

`predict` is a pure function of configuration, world, bucket and recomputation: the plan chooses by it, refuses by it,
and the benchmark prints it beside what it measures. Every number that is no plain arithmetic is a named constant here,
with where it comes from.

A *unit* is one activation of model_dim a token, in the compute type, of the tokens that a worker holds.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

from k5dist import estimate, states
from k5dist.config import ModelConfig, RunConfig
from k5dist.estimate import GIB, MIB, Recompute
from k5dist.shapes import NABLA_BLOCK, Bucket
from k5dist.states import FP32
from k5dist.world import World

# Share of the card that a plan leaves free: the allocator's fragmentation, cuBLAS and cuDNN workspaces, NCCL's buffers
# beyond RUNTIME_BYTES. An assumption; to be set from measured peaks.
MARGIN = 0.08
# On a small card those take no smaller part: 12 GiB with 0.9 left free did not end its first step within two minutes.
LEAST_MARGIN = 2 * GIB
# CUDA's context, its loaded kernels and NCCL's channels: 1 to 1.5 GiB as nvidia-smi shows them on H200. Torch's
# allocator does not count them.
RUNTIME_BYTES = 1.25 * GIB

# Units that one block's backward needs at its peak beyond what it keeps, recomputed activations included, by what it
# recomputes. Measured on H200 with eight blocks of Pro, 121×512×768, compiled: the peaks less weights, states, gathered
# and kept. (With all weights trained every layer's input is live as well.)
WORKING_UNITS = {
    "lora": {"full": 25.9, "attention": 17.8, "linear": 6.6},
    "full": {"full": 27.0, "attention": 19.9, "linear": 8.6},
}
# Units beyond its input that a block keeps which recomputes no matrix product, and tensors of ff_dim a token. Measured
# the same way, one such block against eight.
KEPT_UNITS = {"lora": 6.8, "full": 7.7}
KEPT_FF = 1
ATTENTION_UNITS = 1  # the output of self-attention; arithmetic
EAGER_FACTOR = 1.6  # without fusion fp32 intermediates stand in memory; an assumption for both of the above
STAGED_BLOCKS = 2  # whose kept tensors are on their way to the host or back
HOST_SHARE = 0.9  # of the host's page-locked memory that pieces of any size fill
# Where workers swap tokens for heads: what is sent and received of queries, keys, values and the output. Set by a
# step of Pro at 241×768×1280 on two H200, which took 115.1 GiB; with 4 its prediction is 116.
ALL_TO_ALL_UNITS = 4
FORWARD_UNITS = 12  # of a forward that keeps nothing (sampling validation videos); an assumption

# NABLA's backward lists the kept blocks by rows and by columns, int16, in chunks of heads that stay below the cap with
# the partial sums of their passes; its map is made from fp32 scores, also in chunks. Facts of the kernels.
LISTS, LIST_BYTES, LISTS_CAP = 2, 2, 640 * MIB
MAP_CAP = 256 * MIB
MAP_WORD = 32  # blocks that one packed 4-byte word of the kept map tells of

# fp32 copies of the clip's latents at once (clip, noise, noisy input, conditioning, target, prediction, gradient) and
# the fp32 RoPE tables (cosine and sine for each of a head's dimensions). Counts of the code; small.
LATENT_COPIES = 8
ROPE_TABLES = 2


@dataclass(frozen=True)
class Memory:
    """Predicted bytes of one worker at its peak, by parts."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    kept: float
    working: float
    sparse: float
    workspace: float
    runtime: float

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))

    @property
    def allocated(self) -> float:
        """What torch's allocator counts: compare it with `torch.cuda.max_memory_allocated`."""
        return self.total - self.runtime


def predict(config: RunConfig, world: World, bucket: Bucket, recompute: Recompute) -> Memory:
    """Memory of a worker at the fullest moment of a backward over a clip of `bucket`, keeping what `recompute` says."""
    moments = [_moment(config, world, bucket, recompute, block) for block in _turning_points(config, recompute)]
    return max(moments, key=lambda moment: moment.total)


def _turning_points(config: RunConfig, recompute: Recompute) -> list[int]:
    """Blocks at whose backward memory can be fullest: the first and last of each kind, in whatever order it goes."""
    blocks = config.model.num_visual_blocks
    starts = [0, recompute.offload, blocks - recompute.keep - recompute.attention, blocks - recompute.keep, blocks]
    for route in config.tread.resolve(blocks):
        starts += [route.first, route.last + 1]
    return sorted({block for start in starts for block in (start - 1, start) if 0 <= block < blocks})


def _moment(config: RunConfig, world: World, bucket: Bucket, recompute: Recompute, block: int) -> Memory:
    """While the backward of visual block `block` runs: what the blocks up to it keep is there, what the others kept is
    not, and those have their gradients."""
    model = config.model
    tokens = _tokens_of_blocks(config, bucket)[block]
    unit = _unit(config, world, tokens)
    kept = _kept(config, world, bucket, recompute, block)
    policy = policy_of(recompute, block, model.num_visual_blocks)
    working = WORKING_UNITS[config.adapter][policy] * unit * _eager_factor(config, world)
    working += ALL_TO_ALL_UNITS * unit if world.context > 1 else 0
    working += _unit(config, world, bucket.tokens - tokens)  # the gradient of what TREAD lets skip the block
    latents = math.prod(bucket.latent_shape) * model.out_visual_dim * FP32
    tables = ROPE_TABLES * _own_tokens(world, bucket.tokens) * model.head_dim * FP32
    return Memory(
        weights=states.weights(config, world),
        gradients=states.gradients(config, world, model.num_visual_blocks - 1 - block),
        optimizer=states.state_bytes(config) / world.weight_shards,
        gathered=states.gathered(config, world),
        kept=kept,
        working=working,
        sparse=_sparse(model, world, tokens),
        workspace=LATENT_COPIES * latents + tables + _validation(config, world, kept + working),
        runtime=RUNTIME_BYTES if world.device == "cuda" else 0,
    )


def policy_of(recompute: Recompute, block: int, blocks: int) -> str:
    """What visual block `block` of `blocks` computes again: linear (the least), attention or full."""
    to_come = blocks - 1 - block
    if to_come < recompute.keep:
        return "linear"
    return "attention" if to_come < recompute.keep + recompute.attention else "full"


def policy(name: str, blocks: int) -> Recompute:
    """`train.activation_checkpointing`, but for `auto`, in all blocks."""
    return {"linear": Recompute(blocks, 0), "attention": Recompute(0, blocks), "full": Recompute(0, 0)}[name]


def settle(config: RunConfig, world: World, buckets: Iterable[Bucket], gpu_bytes: float) -> Recompute:
    """The recomputation that a run gets: the one it asks for, or by `auto` as little as the GPU's memory allows.

    Greedily: attention outputs in as many blocks as fit (they are the dearest to compute again for their size), then
    everything in as many of those as fit. No more is moved to the host (`train.offload_gib`) than is needed for that.
    """
    blocks, name = config.model.num_visual_blocks, config.train.activation_checkpointing
    if world.device == "cpu":
        return policy("full" if name == "auto" else name, blocks)
    bucket, limit = largest(buckets), usable(gpu_bytes)
    if name != "auto":
        asked = policy(name, blocks)
        return _offloaded(config, world, bucket, asked, limit) or asked

    def best(options: Iterable[Recompute]) -> Recompute | None:
        return next(filter(None, (_offloaded(config, world, bucket, option, limit) for option in options)), None)

    # A last block that keeps everything needs less at its own backward, so a few of them can make room for the others.
    several = best(Recompute(k, n - k) for n in range(blocks, 0, -1) for k in range(min(n, 3) + 1))
    if several is None:
        return best([policy("full", blocks)]) or policy("full", blocks)
    count = several.keep + several.attention
    return best(Recompute(n, count - n) for n in range(count, -1, -1)) or several


def _offloaded(config: RunConfig, world: World, bucket: Bucket, recompute: Recompute, limit: float) -> Recompute | None:
    """`recompute` with as few blocks offloaded as bring it below `limit`; None where none or too many would."""
    host = config.train.offload_gib * GIB * HOST_SHARE
    if predict(config, world, bucket, recompute).total <= limit:
        return recompute
    kept = _kept_by_blocks(config, world, bucket, recompute)
    room = sum(1 for used in itertools.accumulate(kept) if used <= host)  # blocks that the host can take

    def fits(offload: int) -> bool:
        option = dataclasses.replace(recompute, offload=offload)
        return predict(config, world, bucket, option).total <= limit

    if not room or not fits(room):
        return None
    fewest = 1 + bisect.bisect_left(range(1, room), True, key=fits)
    return dataclasses.replace(recompute, offload=fewest)


def largest(buckets: Iterable[Bucket]) -> Bucket:
    return max(buckets, key=lambda bucket: bucket.tokens)


def gpu_bytes(config: RunConfig, world: World) -> float:
    """What a worker may take of its GPU."""
    _, _, card = estimate.gpu_facts(world.gpu_name)
    return card if config.train.gpu_memory_gib is None else min(card, config.train.gpu_memory_gib * GIB)


def usable(limit: float) -> float:
    return limit - max(MARGIN * limit, LEAST_MARGIN)


def _eager_factor(config: RunConfig, world: World) -> float:
    return 1 if config.train.compile and world.device == "cuda" else EAGER_FACTOR


def _tokens_of_blocks(config: RunConfig, bucket: Bucket) -> tuple[int, ...]:
    first_frame = config.flavour.task == "i2v"
    return config.tread.tokens_of_blocks(config.model, bucket.token_shape, first_frame=first_frame)


def _own_tokens(world: World, tokens: int) -> int:
    return -(-tokens // world.context)


def _unit(config: RunConfig, world: World, tokens: int) -> int:
    return _own_tokens(world, tokens) * config.model.model_dim * states.element(config, world)


def _kept(config: RunConfig, world: World, bucket: Bucket, recompute: Recompute, last: int) -> float:
    """What blocks 0 to `last` keep on the GPU between forward and backward."""
    kept = _kept_by_blocks(config, world, bucket, recompute)[: last + 1]
    staged = sorted(kept[: recompute.offload])[-STAGED_BLOCKS:]
    return sum(kept[recompute.offload :]) + sum(staged)


def _kept_by_blocks(config: RunConfig, world: World, bucket: Bucket, recompute: Recompute) -> list[float]:
    counts, blocks = _tokens_of_blocks(config, bucket), config.model.num_visual_blocks
    kinds = [(count, policy_of(recompute, block, blocks)) for block, count in enumerate(counts)]
    sizes = {kind: _kept_by(config, world, *kind) for kind in set(kinds)}
    return [sizes[kind] for kind in kinds]


def _kept_by(config: RunConfig, world: World, tokens: int, policy: str) -> float:
    """What one block keeps, its input included."""
    model, unit = config.model, _unit(config, world, tokens)
    if policy == "full":
        return unit
    heads = model.num_heads / world.context
    lse_and_map = tokens * heads * FP32  # the log-sum-exp is fp32
    if model.is_sparse:
        side = _blocks_a_side(tokens)
        lse_and_map += heads * side * math.ceil(side / MAP_WORD) * 4
    if policy == "attention":
        return unit + ATTENTION_UNITS * unit + lse_and_map
    ff = KEPT_FF * _own_tokens(world, tokens) * model.ff_dim * states.element(config, world)
    return unit + (KEPT_UNITS[config.adapter] * unit + ff) * _eager_factor(config, world) + lse_and_map


def _blocks_a_side(tokens: int) -> int:
    return math.ceil(tokens / NABLA_BLOCK**2)


def _sparse(model: ModelConfig, world: World, tokens: int) -> float:
    if not model.is_sparse:
        return 0
    cells = model.num_heads / world.context * _blocks_a_side(tokens) ** 2
    return min(LISTS * cells * LIST_BYTES, LISTS_CAP) + min(cells * FP32, MAP_CAP)


def _validation(config: RunConfig, world: World, training: float) -> float:
    """What sampling videos needs beyond what `training` has for its activations, which are not there then."""
    if not config.validation.prompts:
        return 0
    unit = _unit(config, world, Bucket(*config.validation_shape).tokens)
    return max(0, FORWARD_UNITS * unit * _eager_factor(config, world) - training)
