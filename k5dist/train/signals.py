"""Stopping together: a signal to any worker becomes the decision of all, at the same step."""

from __future__ import annotations

import ctypes
import signal
from types import FrameType

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
_PR_SET_PDEATHSIG = 1


class StopSignal:
    """Set by SIGUSR1 or SIGTERM; `requested` asks all ranks, over gloo, so that no device is waited for."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self._raised = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._raise)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self._raised = True

    def requested(self) -> bool:
        flag = torch.tensor([int(self._raised)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group)
        return bool(flag.item())


def die_with_parent() -> None:
    """Have the kernel kill this process when its launcher dies: torchrun's workers would train on without it."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
