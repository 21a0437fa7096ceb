"""What `cluster=slurm` asks of Slurm. Machines and GPUs are those of `cluster.*`."""

from __future__ import annotations

import dataclasses
import re

from k5dist.schema import ConfigError, one_of, positive

_TIME = re.compile(r"\d+|\d+:\d{2}(:\d{2})?|\d+-\d{1,2}(:\d{2}){0,2}")


@dataclasses.dataclass(frozen=True)
class SlurmConfig:
    partition: str | None
    account: str | None
    qos: str | None
    time: str | None
    options: tuple[str, ...]
    output: str
    signal_seconds: int
    container: str | None
    container_kind: str
    container_mounts: tuple[str, ...]
    precache_partition: str | None
    precache_nodes: int
    precache_gpus_per_node: int | None

    def __post_init__(self) -> None:
        if self.time is not None and not _TIME.fullmatch(self.time):
            rule = "Slurm's times are minutes, minutes:seconds, hours:minutes:seconds or days-hours"
            raise ConfigError("slurm.time", self.time, rule, "slurm.time='\"24:00:00\"'")
        for option in self.options:
            if not option.startswith("--") or "\n" in option:
                rule = "options of sbatch, each a word that begins with --"
                raise ConfigError("slurm.options", option, rule, "slurm.options=[--constraint=h100,--exclusive]")
        positive("slurm.signal_seconds", self.signal_seconds)
        positive("slurm.precache_nodes", self.precache_nodes)
        one_of("slurm.container_kind", self.container_kind, ("pyxis", "apptainer"))
        if self.precache_gpus_per_node is not None and self.precache_gpus_per_node < 0:
            fix = "slurm.precache_gpus_per_node=1"
            raise ConfigError("slurm.precache_gpus_per_node", self.precache_gpus_per_node, "GPUs ≥ 0", fix)
