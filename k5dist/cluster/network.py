"""Over which network interface a gang's workers talk: asked of the machine, so that nobody has to name it."""

from __future__ import annotations

import socket
from collections.abc import Mapping

import psutil

# NCCL finds InfiniBand and NVLink by itself; by this its workers find each other, and gloo does all that it does.
VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def interface_of(address: str) -> str | None:
    """The interface that has this IP address; None where none has."""
    families = (socket.AF_INET, socket.AF_INET6)
    for name, found in psutil.net_if_addrs().items():
        if any(each.family in families and each.address == address for each in found):
            return name
    return None


def socket_variables(nodes: int, address: str, interface: str | None, environment: Mapping[str, str]) -> dict[str, str]:
    """What the workers of a node get: `interface` where the user names one, else that of the node's address in the
    cluster, by which the other nodes reach it. Left alone, gloo takes what the host's name resolves to: on many a
    machine the loopback, which no other node reaches.

    What stands in the environment is the user's own and wins over what is found.
    """
    if interface is not None:
        return _of(interface)
    found = interface_of(address) if nodes > 1 else None
    return {} if found is None else {name: value for name, value in _of(found).items() if name not in environment}


def _of(interface: str) -> dict[str, str]:
    """NCCL takes names as beginnings (eth1 would be eth10, too) unless told that it is the whole; gloo always does."""
    return dict(zip(VARIABLES, (interface, f"={interface}"), strict=True))
