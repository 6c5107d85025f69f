"""The heap of an actor's process: what was freed is used again."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import numpy as np
from actors._runtimes import _heap

_heap.keep_warm()

def step():
    arrays = [np.ones(3 << 20, np.uint8) for _ in range(4)]
    return sum(array.nbytes for array in arrays)

step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
pages = sum(step() for _ in range(10)) // 4096
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, pages)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these options")
def test_arrays_that_are_made_and_dropped_in_each_step_touch_no_fresh_pages() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env=environment, stdout=subprocess.PIPE, text=True, timeout=60, check=True
    )
    faults, pages = map(int, done.stdout.split())
    assert faults < pages / 10
