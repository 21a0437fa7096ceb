"""The GPUs of this machine, as the plan needs to know them."""

from __future__ import annotations

import os

from k5dist.config import ClusterConfig
from k5dist.world import ClusterFacts


def local_facts(config: ClusterConfig) -> ClusterFacts:
    """GPUs of a node: as configured, else those that the driver sees on this machine."""
    name, count = _local_gpus()
    if config.gpus_per_node is not None:
        return ClusterFacts(config.gpus_per_node, name)
    return ClusterFacts(count, name)


def _local_gpus() -> tuple[str | None, int]:
    """Name and number of this machine's GPUs, by NVML: importing torch for it would take seconds."""
    import pynvml

    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        name = pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0)) if count else None
    except pynvml.NVMLError:
        return None, 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        count = len([entry for entry in visible.split(",") if entry.strip() not in ("", "-1")])
    return (name.decode() if isinstance(name, bytes) else name), count
