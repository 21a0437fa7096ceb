"""Which CPUs a worker binds itself to, by what Linux says of its GPU; and the network that a node's gang talks over."""

from __future__ import annotations

import os
import types
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from k5dist.cluster.network import interface_of, socket_variables
from k5dist.train.affinity import bind_beside, cpus_of

ADDRESS = "0001:3b:00.0"
GPU = types.SimpleNamespace(pci_domain_id=1, pci_bus_id=0x3B, pci_device_id=0)


@pytest.fixture(autouse=True)
def all_cpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: GPU)  # no GPU has to be there
    allowed = os.sched_getaffinity(0)
    yield allowed
    os.sched_setaffinity(0, allowed)


def linux(folder: Path, node: str, cpus: str) -> Path:
    device, listed = folder / "bus/pci/devices" / ADDRESS, folder / "devices/system/node/node1"
    device.mkdir(parents=True)
    listed.mkdir(parents=True)
    (device / "numa_node").write_text(f"{node}\n")
    (listed / "cpulist").write_text(f"{cpus}\n")
    return folder


def test_a_worker_runs_beside_its_gpu(tmp_path: Path, all_cpus: set[int]) -> None:
    first = min(all_cpus)
    if len(all_cpus) == 1:
        pytest.skip("this machine gives the tests one CPU, which nothing can be bound out of")
    said = bind_beside(torch.device("cuda", 0), len(all_cpus), linux(tmp_path, "1", f"{first},4000-4003"))
    assert os.sched_getaffinity(0) == {first}
    assert said == f"bound to 1 of {len(all_cpus)} CPUs, those of NUMA node 1"


def test_too_few_cpus_beside_the_gpu_are_left(tmp_path: Path, all_cpus: set[int]) -> None:
    if len(all_cpus) == 1:
        pytest.skip("this machine gives the tests one CPU")
    assert bind_beside(torch.device("cuda", 0), 1, linux(tmp_path, "1", f"{min(all_cpus)}")) is None
    assert os.sched_getaffinity(0) == all_cpus


@pytest.mark.parametrize(("node", "cpus"), [("-1", "0-3"), ("1", "4000-4003"), ("1", "0-4000"), ("1", "")])
def test_it_keeps_its_cpus_where_none_are_nearer(node: str, cpus: str, tmp_path: Path, all_cpus: set[int]) -> None:
    assert bind_beside(torch.device("cuda", 0), 1, linux(tmp_path, node, cpus)) is None
    assert os.sched_getaffinity(0) == all_cpus


def test_a_machine_that_says_nothing(tmp_path: Path) -> None:
    assert bind_beside(torch.device("cuda", 0), 1, tmp_path) is None
    assert cpus_of(0, tmp_path) == set()


def test_lists_of_cpus(tmp_path: Path) -> None:
    assert cpus_of(1, linux(tmp_path, "1", "0-2,8,10-11")) == {0, 1, 2, 8, 10, 11}


def test_the_interface_is_that_of_the_address() -> None:
    for name, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            if address.family.name in ("AF_INET", "AF_INET6"):
                assert interface_of(address.address) == name
    assert interface_of("203.0.113.1") is None


def test_variables_of_the_user_stand() -> None:
    plain = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}
    assert socket_variables(2, "127.0.0.1", None, {}) == plain
    assert socket_variables(1, "127.0.0.1", None, {}) == {}, "one machine: nothing to choose"
    assert socket_variables(2, "127.0.0.1", None, {"NCCL_SOCKET_IFNAME": "ib0"}) == {"GLOO_SOCKET_IFNAME": "lo"}
    assert socket_variables(1, "127.0.0.1", "eth7", {"GLOO_SOCKET_IFNAME": "a"}) == {
        "GLOO_SOCKET_IFNAME": "eth7",
        "NCCL_SOCKET_IFNAME": "=eth7",
    }
    assert socket_variables(2, "203.0.113.1", None, {}) == {}
