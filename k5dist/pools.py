"""The precache's workers, sized from the cluster: what cannot be placed would wait for ever, and is refused.

And how much may be under way between them: decoded clips and unwritten latents lie in Ray's object store, which spills
to disk when it is full.
"""

from __future__ import annotations

from dataclasses import dataclass

from k5dist.config import ConfigError
from k5dist.config.precache import PrecacheConfig
from k5dist.shapes import Bucket
from k5dist.world import World

STORE_SHARE = 0.7  # of the object store for what is under way: what has been used goes a moment later
_ROWS_PER_BLOCK, _BLOCK_BYTES = 64, 16 * 2**20  # of decoded clips


@dataclass(frozen=True)
class Pool:
    """`workers` of one kind, each with a share of a GPU (`gpus`, 0 < share ≤ 1) or, where that is 0, a CPU core."""

    workers: int
    gpus: float


@dataclass(frozen=True)
class Pools:
    """Text and VAE workers, which work in turn; `decode_tasks` at once, None: as many as there are free cores."""

    text: Pool
    vae: Pool
    decode_tasks: int | None


@dataclass(frozen=True)
class Flow:
    """What may be under way at once: decoded blocks of at most `block_bytes`, from the beginning of their decoding to
    the end of their encoding, and `shards` of at most `shard_bytes` being written while one more collects."""

    blocks: int
    block_bytes: int
    shards: int
    shard_bytes: int
    store_bytes: int

    @property
    def decoded_bytes(self) -> int:
        return self.blocks * self.block_bytes

    @property
    def bound_bytes(self) -> int:
        """More than this never lies in the object store because of clips."""
        return self.decoded_bytes + (self.shards + 1) * self.shard_bytes


def settle_flow(store_bytes: int, block_bytes: int, shard_bytes: int, workers: int) -> Flow:
    """What fits STORE_SHARE of a store. One block and one shard always flow, in a store too small for them by spilling.

    A writer for each worker, as far as shards then leave half of the share to decoded blocks.
    """
    share = int(STORE_SHARE * store_bytes)
    shards = max(1, min(workers, share // (2 * max(1, shard_bytes)) - 1))
    blocks = max(1, (share - (shards + 1) * shard_bytes) // block_bytes)
    return Flow(blocks, block_bytes, shards, shard_bytes, store_bytes)


def rows_per_block(buckets: tuple[Bucket, ...]) -> int:
    """A decoded clip is large (up to hundreds of megabytes), and one a block keeps memory in hand; small ones share a
    block, for each costs Ray as much as a small clip's work."""
    return max(1, min(_ROWS_PER_BLOCK, _BLOCK_BYTES // _pixel_bytes(buckets)))


def block_bytes(buckets: tuple[Bucket, ...]) -> int:
    return rows_per_block(buckets) * _pixel_bytes(buckets)


def _pixel_bytes(buckets: tuple[Bucket, ...]) -> int:
    """Of the largest clip: uint8 RGB."""
    return 3 * max(bucket.frames * bucket.height * bucket.width for bucket in buckets)


def settle_pools(config: PrecacheConfig, world: World) -> Pools:
    """Raises ConfigError where a pool has more workers than the GPUs have room for."""
    return Pools(
        text=_pool("text", config.text_workers, config.text_gpus, world),
        vae=_pool("vae", config.vae_workers, config.vae_gpus, world),
        decode_tasks=config.decode_workers,
    )


def _pool(name: str, workers: int | None, gpus: float, world: World) -> Pool:
    if world.device != "cuda":
        return Pool(workers or 1, 0.0)
    a_gpu = int(1 / gpus + 1e-9)  # a worker's share lies on one GPU, never on parts of two
    room = a_gpu * world.size
    if workers is not None and workers > room:
        key = f"precache.{name}_workers"
        rule = f"with precache.{name}_gpus={gpus:g} a GPU has room for {a_gpu}, and the world has {world.size} GPUs"
        raise ConfigError(key, workers, rule, f"{key}={room}")
    return Pool(workers or room, gpus)
