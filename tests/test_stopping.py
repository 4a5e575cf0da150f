"""What must stay true of optimus.stopping. Derived in notebooks/12f_stopping.ipynb."""
import os
import signal
from types import SimpleNamespace

import pytest

from optimus.training import StopRequest


def test_the_second_interrupt_stops_at_once():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        assert signal.getsignal(signal.SIGINT) != before
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_with_several_ranks_only_the_third_signal_interrupts():
    with pytest.raises(KeyboardInterrupt), StopRequest(SimpleNamespace(world_size=2)) as stop:
        for count in (1, 2, 3):
            assert stop.count == count - 1
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.count == 3


def test_a_system_without_sigterm_listens_to_ctrl_c(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.delattr(signal, "SIGTERM")
    with StopRequest() as stop:
        assert list(stop.previous) == [signal.SIGINT]
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) is before
