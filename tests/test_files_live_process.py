"""A process of this machine that has ended is known as such, one of another machine never."""

from __future__ import annotations

import os
import signal
from multiprocessing import get_context
from pathlib import Path

import pytest

from qdora.files import live_process as on
from qdora.files.live_process import has_ended, live_process


def test_a_process_has_ended_once_it_is_killed_and_not_while_it_stands() -> None:
    context = get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=lambda: (theirs.send(live_process()), signal.pause()))
    process.start()
    found = ours.recv()
    assert found is not None
    assert found[2] == str(process.pid)
    assert not has_ended(found)
    os.kill(int(found[2]), signal.SIGSTOP)
    assert not has_ended(found)
    process.kill()
    os.waitid(os.P_PID, int(found[2]), os.WEXITED | os.WNOWAIT)
    assert has_ended(found), "its parent has not asked yet"
    process.join()
    assert has_ended(found)


def test_a_number_is_not_that_of_another_start_or_machine() -> None:
    mine = live_process()
    assert mine is not None
    assert not has_ended(mine)
    assert has_ended([*mine[:3], "1"]), "the number belongs to a later process"
    assert not has_ended(["another machine", *mine[1:3], "1"])
    assert not has_ended([mine[0], "another container", mine[2], "1"])


def test_where_the_system_says_nothing_no_process_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = live_process()
    assert mine is not None
    monkeypatch.setattr(on, "_BOOT", Path("/none"))
    assert live_process() is None
    assert not has_ended([*mine[:3], "1"])
