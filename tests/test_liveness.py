"""Processes that are lost while they measure: real ones, killed or stopped."""

import os
import re
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import launched

from sage_select import Processes
from sage_select.system.heartbeats import beat, during, monitored

WORKER = Path(__file__).with_name("liveness_worker.py")


@pytest.fixture
def lonely(monkeypatch):
    """A group of one process, so that there is something to watch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield Processes(dist.group.WORLD)
    dist.destroy_process_group()


def test_an_error_inside_says_where_all_processes_were(lonely):
    def fail():
        with monitored(lonely), during("interval 3"):
            beat("batch 2 of 7")
            raise ValueError("overflow")

    with pytest.raises(ValueError, match="overflow") as caught:
        fail()
    assert "process 0: interval 3, batch 2 of 7" in caught.value.__notes__[0]


def test_signals_are_as_they_were_afterwards(lonely):
    with monitored(lonely):
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.set_wakeup_fd(-1) == -1


def test_somebody_elses_signals_are_left_alone(lonely):
    before = signal.signal(signal.SIGTERM, theirs := lambda *_: None)
    try:
        with monitored(lonely):
            assert signal.getsignal(signal.SIGTERM) is theirs
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_signals_do_not_end_the_watch(lonely):
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with monitored(lonely):
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.2)
            assert any(thread.name == "sage-select watch" for thread in threading.enumerate())
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_an_event_loop_keeps_its_signals(lonely):
    mine, theirs = socket.socketpair()
    with mine, theirs:
        theirs.setblocking(False)
        signal.set_wakeup_fd(theirs.fileno())
        try:
            with monitored(lonely):
                assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        finally:
            assert signal.set_wakeup_fd(-1) == theirs.fileno()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["DDP", "FSDP2"])
@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_lost_process_is_named_with_interval_and_pairs(how, strategy):
    done = launched(WORKER, how, strategy, processes=2, fails=True, SAGE_SELECT_PATIENCE="6")
    place = r"process 1: interval 1, scoring, batch \d of \d, pairs in rows \d to \d \(heard"
    assert re.search(place, done.stderr), done.stderr[-3000:]
    if how == "hangs":
        assert re.search(r"process 1 has given no sign of life for \d+ s", done.stderr)


@pytest.mark.slow
def test_a_process_lost_in_an_update_is_told_with_the_step():
    done = launched(WORKER, "dies in an update", "DDP", processes=2, fails=True)
    assert re.search(r"process 1: step 2, pass 1 of 1 \(heard", done.stderr), done.stderr[-3000:]
