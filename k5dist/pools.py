"""The precache's workers, sized from the cluster: what cannot be placed would wait for ever, and is refused."""

from __future__ import annotations

from dataclasses import dataclass

from k5dist.config import ConfigError
from k5dist.config.precache import PrecacheConfig
from k5dist.world import World


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
