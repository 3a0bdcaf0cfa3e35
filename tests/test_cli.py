"""Long work shows how far it is, and in a log file rarely."""

import sys

import pytest
import tqdm
from conftest import Stream

from common.cli import info, progress

COLUMNS = 60


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    return now


@pytest.fixture
def watch(monkeypatch):
    """Puts a stream in the place of stderr; only the test can, as pytest does so before it."""

    def replace(terminal: bool) -> Stream:
        monkeypatch.setenv("COLUMNS", str(COLUMNS))
        monkeypatch.setattr(sys, "stderr", Stream(terminal))
        return sys.stderr

    return replace


def test_a_file_gets_the_progress_every_fifteen_seconds_and_at_the_end(watch, clock):
    stderr = watch(terminal=False)
    for _ in progress(range(4000), "checking", "pictures"):
        clock[0] += 0.01  # 40 s
    shown = [text.split("|")[-1].split("[")[0] for text in stderr.getvalue().split("\r")[1:]]
    assert shown == [" 1500/4000 ", " 3000/4000 ", " 4000/4000 "]


def test_without_a_total_the_count_is_shown(watch, clock):
    stderr = watch(terminal=False)
    with progress(None, "predict", "frames") as bar:
        clock[0] += 20
        bar.update(1300)
    assert stderr.getvalue().startswith("\rpredict: 1300 frames [00:20, 65.00 frames/s]")


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
