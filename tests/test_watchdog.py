"""A rank that makes no progress ends, and says where it was."""

import os
import subprocess
import sys
import time

import torch
from conftest import ROOT
from helpers import ENVIRONMENT

from common.distributed import DistributedContext
from training.watchdog import Watchdog

PROGRAM = """
import time, torch
from common.distributed import DistributedContext
from training.watchdog import Watchdog

def read_from_a_lost_disk():
    time.sleep(60)

dist = DistributedContext(0, 1, torch.device("cpu"), torch.float32)
watchdog = Watchdog(dist, 0.6)
with watchdog.watching():
    watchdog.progress("step 19")
    read_from_a_lost_disk()
"""


def test_a_process_without_progress_ends_and_prints_its_position():
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert result.returncode == 75, result.stderr
    assert "rank 0: no progress for 0.6 s (train.hang_minutes) since step 19" in result.stderr
    assert "read_from_a_lost_disk" in result.stderr


def test_a_process_with_progress_does_not_end(monkeypatch):
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    watchdog = Watchdog(DistributedContext(0, 1, torch.device("cpu"), torch.float32), 0.5)
    with watchdog.watching():
        for step in range(20):
            watchdog.progress(f"step {step}")
            time.sleep(0.05)
    time.sleep(0.6)  # nothing watches after the block
    assert codes == []
