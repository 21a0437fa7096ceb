"""How busy a node is: its GPUs by NVML where there are any, its cores, its memory."""

from __future__ import annotations

import os
from typing import Any

import psutil


def node_load() -> dict[str, Any]:
    """CPU and memory in percent since the last call; GPUs that this process may use, memory in GiB."""
    return {"cpu": psutil.cpu_percent(), "memory": psutil.virtual_memory().percent, "gpus": _gpus()}


def _gpus() -> list[dict[str, Any]]:
    import pynvml

    try:
        pynvml.nvmlInit()
        return [_gpu(pynvml, handle) for handle in _handles(pynvml)]
    except pynvml.NVMLError:
        return []


def _handles(pynvml: Any) -> list[Any]:
    """Those of CUDA_VISIBLE_DEVICES, which Ray sets, by number or UUID; all where it is not set."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [pynvml.nvmlDeviceGetHandleByIndex(at) for at in range(pynvml.nvmlDeviceGetCount())]
    names = [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    by_number = pynvml.nvmlDeviceGetHandleByIndex
    return [by_number(int(name)) if name.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(name) for name in names]


def _gpu(pynvml: Any, handle: Any) -> dict[str, Any]:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    used, total = memory.used / 2**30, memory.total / 2**30
    try:
        busy: int | None = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu
    except pynvml.NVMLError:  # a slice of a GPU has none
        busy = None
    return {"busy": busy, "used_gib": round(used, 1), "total_gib": round(total, 1)}
