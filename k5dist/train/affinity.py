"""A worker's CPUs: those beside its GPU, so that what it copies there does not cross from socket to socket."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def bind_beside(device: torch.device, workers: int, sys_folder: Path = Path("/sys")) -> str | None:
    """Let this process, and what it starts, run on the CPUs of its GPU's NUMA node alone.

    Of the CPUs that the process may use (a scheduler's share, which `workers` of this machine have together); where too
    few of them are on that node for one worker, or nobody says which node it is (one socket, many virtual machines),
    all stay. Returns what was done, in words; None where nothing was.
    """
    facts = torch.cuda.get_device_properties(device)
    address = f"{facts.pci_domain_id:04x}:{facts.pci_bus_id:02x}:{facts.pci_device_id:02x}.0"
    node = numa_node(address, sys_folder)
    if node is None:
        return None
    allowed = os.sched_getaffinity(0)
    beside = cpus_of(node, sys_folder) & allowed
    if not beside or beside == allowed or len(beside) * workers < len(allowed):
        return None
    os.sched_setaffinity(0, beside)
    return f"bound to {len(beside)} of {len(allowed)} CPUs, those of NUMA node {node}"


def numa_node(pci_address: str, sys_folder: Path) -> int | None:
    """The NUMA node of a PCI device as Linux knows it; None where it does not (it says -1, or has no such file)."""
    try:
        node = int((sys_folder / "bus/pci/devices" / pci_address / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def cpus_of(node: int, sys_folder: Path) -> set[int]:
    """From Linux's list of ranges, such as 0-15,64-79; empty where there is none."""
    try:
        listed = (sys_folder / f"devices/system/node/node{node}/cpulist").read_text().strip()
    except OSError:
        return set()
    cpus: set[int] = set()
    for part in filter(None, listed.split(",")):
        first, _, last = part.partition("-")
        cpus |= set(range(int(first), int(last or first) + 1))
    return cpus
