"""Freed blocks are kept: using them again costs no page faults."""

import subprocess
import sys

import pytest
from conftest import ROOT

COUNT = """
import resource, sys
import numpy as np
from common.system import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else None
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def fill():
    for _ in range(20):
        np.ones(8 << 20, dtype=np.uint8)
fill()
before = faults()
fill()
print(kept, faults() - before)
"""


def count(what: str) -> tuple[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", COUNT, what], cwd=ROOT, capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "131072"} if what != "keep" else
        {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    kept, faults = done.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(sys.platform != "linux", reason="a switch of glibc")
def test_blocks_that_were_freed_are_used_again_without_page_faults():
    kept, faults = count("keep")
    if kept == "False":
        pytest.skip("this C library has no mallopt")
    assert faults < 20
    # Without it the kernel clears the 2,048 pages of each of the 20 blocks anew; large pages make
    # it fewer.
    assert count("default")[1] > 10 * max(faults, 1)
