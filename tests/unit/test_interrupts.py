"""Ctrl-C waits for a good moment, is never lost, and is the old one again afterwards."""

from __future__ import annotations

import os
import signal

import pytest

from k5dist.cluster.interrupts import Interrupts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_until_it_is_asked_for(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Interrupts() as interrupts:
        interrupts.check()
        os.kill(os.getpid(), number)
        signal.sigtimedwait([signal.SIGUSR2], 0.01)  # gives the handler its turn
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
        interrupts.check()
    assert signal.getsignal(number) == before


def test_one_that_comes_last_is_not_lost() -> None:
    with pytest.raises(KeyboardInterrupt), Interrupts():
        os.kill(os.getpid(), signal.SIGINT)


def test_an_error_is_not_hidden_by_it() -> None:
    def fails() -> None:
        with Interrupts():
            os.kill(os.getpid(), signal.SIGINT)
            raise ValueError("first")

    with pytest.raises(ValueError, match="first"):
        fails()
