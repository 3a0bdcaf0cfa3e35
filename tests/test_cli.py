"""Long work shows how far it is: a bar on a terminal, plain lines elsewhere."""

import sys

import pytest
from conftest import Stream

from common import cli
from common.cli import info, progress, progress_bar

COLUMNS = 60


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(cli.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def watch(monkeypatch):
    """Puts a stream in the place of stderr; only the test can, as pytest does so before it."""

    def replace(terminal: bool) -> Stream:
        monkeypatch.setenv("COLUMNS", str(COLUMNS))
        monkeypatch.setattr(sys, "stderr", Stream(terminal))
        return sys.stderr

    return replace


def test_a_file_gets_a_plain_line_every_fifteen_seconds(watch, clock):
    stderr = watch(terminal=False)
    for _ in progress(range(4000), "checking", "pictures"):
        clock[0] += 0.01  # 40 s
    assert stderr.getvalue().splitlines() == [
        "checking: 1,500 of 4,000 pictures, 00:25 left",
        "checking: 3,000 of 4,000 pictures, 00:10 left",
    ]


def test_without_a_total_the_line_counts_alone(watch, clock):
    stderr = watch(terminal=False)
    with progress_bar("predict", None, "frames") as advance:
        clock[0] += 20
        advance(1300)
    assert stderr.getvalue() == "predict: 1,300 frames\n"


def test_short_work_and_silent_processes_say_nothing(watch, clock):
    stderr = watch(terminal=False)
    for _ in progress(range(10), "checking", "pictures"):
        clock[0] += 1.4
    assert list(progress(iter("ab"), "checking", "pictures", shown=False)) == ["a", "b"]
    for _ in progress(range(10), "checking", "pictures", shown=False):
        clock[0] += 20
    assert stderr.getvalue() == ""


def test_a_terminal_gets_a_bar_with_room_for_the_echo_of_control_c(watch):
    stderr = watch(terminal=True)
    assert list(progress(range(3), "checking", "pictures")) == [0, 1, 2]
    line = stderr.screen()[0]
    assert line.startswith("checking: 100%") and "3/3" in line and "pictures/s" in line
    assert len(line) <= COLUMNS - 3


def test_a_printed_line_stays_above_the_bar(watch):
    stderr = watch(terminal=True)
    for number in progress(range(2), "checking", "pictures"):
        if number:
            info("left out: a.jpg")
    assert stderr.screen()[0] == "left out: a.jpg"
    assert stderr.screen()[1].startswith("checking: 100%")
