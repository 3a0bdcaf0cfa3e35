"""Freed blocks are kept: using them again costs no page faults."""

import subprocess
import sys

import pytest
from conftest import ROOT

COUNT = """
import resource, sys
import numpy as np
from common.system import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else True
def faults_of_filling():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        np.ones(8 << 20, dtype=np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults_of_filling()
print(faults_of_filling() if kept else -1)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a switch of glibc")
def test_freed_blocks_are_used_again_without_page_faults():
    faults = {}
    # The variable switches off glibc's own adaptation of the threshold.
    for what, variables in (("keep", {}), ("default", {"MALLOC_MMAP_THRESHOLD_": "131072"})):
        words = [sys.executable, "-c", COUNT, what]
        environment = {"PYTHONPATH": str(ROOT), **variables}
        faults[what] = int(subprocess.check_output(words, cwd=ROOT, env=environment))
    if faults["keep"] < 0:
        pytest.skip("this C library has no mallopt")
    # The default clears the 2,048 pages of each of the 20 blocks again; large pages are fewer.
    assert faults["keep"] < 20 and faults["default"] > 10 * max(faults["keep"], 1)
