"""Ranks that are lost during joint work: real processes, killed or stopped."""

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
def group_of_one(monkeypatch):
    """A process group of one rank, the smallest that is monitored."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield Processes(dist.group.WORLD)
    dist.destroy_process_group()


def test_an_error_inside_gets_the_positions_of_all_ranks(group_of_one):
    def fail():
        with monitored(group_of_one), during("interval 3"):
            beat("batch 2 of 7")
            raise ValueError("overflow")

    with pytest.raises(ValueError, match="overflow") as caught:
        fail()
    assert "rank 0: interval 3, batch 2 of 7" in caught.value.__notes__[0]


def test_signal_handling_is_restored_afterwards(group_of_one):
    with monitored(group_of_one):
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.set_wakeup_fd(-1) == -1


def test_an_existing_signal_handler_is_kept(group_of_one):
    before = signal.signal(signal.SIGTERM, existing := lambda *_: None)
    try:
        with monitored(group_of_one):
            assert signal.getsignal(signal.SIGTERM) is existing
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_signals_do_not_stop_the_heartbeats(group_of_one):
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with monitored(group_of_one):
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.2)
            assert any(thread.name == "sage-select heartbeats" for thread in threading.enumerate())
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_an_event_loop_keeps_its_wakeup_file_descriptor(group_of_one):
    mine, theirs = socket.socketpair()
    with mine, theirs:
        theirs.setblocking(False)
        signal.set_wakeup_fd(theirs.fileno())
        try:
            with monitored(group_of_one):
                assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        finally:
            assert signal.set_wakeup_fd(-1) == theirs.fileno()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["DDP", "FSDP2"])
@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_lost_rank_is_reported_with_interval_and_pairs(how, strategy):
    done = launched(WORKER, how, strategy, processes=2, fails=True, SAGE_SELECT_PATIENCE="6")
    place = r"rank 1: interval 1, scoring, batch \d of \d, pairs in rows \d to \d \(last heartbeat"
    assert re.search(place, done.stderr), done.stderr[-3000:]
    if how == "hangs":
        assert re.search(r"rank 1 has sent no heartbeat for \d+ s", done.stderr)


@pytest.mark.slow
def test_a_rank_lost_in_an_update_is_reported_with_the_step():
    done = launched(WORKER, "dies in an update", "DDP", processes=2, fails=True)
    place = r"rank 1: step 2, pass 1 of 1 \(last heartbeat"
    assert re.search(place, done.stderr), done.stderr[-3000:]
