"""The GPUs and the memory of this machine, as the plan needs to know them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from k5dist.config import ClusterConfig
from k5dist.world import ClusterFacts


def local_facts(config: ClusterConfig) -> ClusterFacts:
    """GPUs of a node: as configured, else those that the driver sees on this machine."""
    name, count = _local_gpus()
    if config.gpus_per_node is not None:
        count = config.gpus_per_node
    return ClusterFacts(count, name, store_bytes=_store_bytes())


def _store_bytes() -> int:
    """About what Ray's object store has on a machine like this one where nothing else is said: 30% of the memory that
    the system or the control group leaves, and no more than its shared memory holds. What it has, precache asks Ray."""
    import psutil

    limits = [psutil.virtual_memory().total]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            limits.append(int(Path(file).read_text()))
    limit = 0.3 * min(limits)
    with contextlib.suppress(OSError):
        shared = os.statvfs("/dev/shm")
        limit = min(limit, 0.95 * shared.f_bavail * shared.f_frsize)
    return int(limit)


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
