"""What a forked child finds: nothing that a thread of its parent held just then, or that such a thread would do."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import threading

ROOT = Path(__file__).parent.parent
ROOMS = ("collective", "actors", "scheduling")


def with_locks() -> list[str]:
    """Return the modules of the library that mention locks."""
    paths = [path for room in ROOMS for path in (ROOT / room).rglob("*.py") if "threading.Lock(" in path.read_text()]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]


def locks_of_modules() -> dict[str, threading.Lock]:
    """Return the locks that modules hold for all threads, by where they are: in a global, or in an object of one."""
    found: dict[str, threading.Lock] = {}
    for name in with_locks():
        for known, value in vars(sys.modules[name]).items():
            inside = getattr(value, "__dict__", {}) if getattr(type(value), "__module__", "").startswith(ROOMS) else {}
            for path, each in [(known, value), *((f"{known}.{part}", each) for part, each in inside.items())]:
                if hasattr(each, "locked"):
                    found[f"{name}.{path}"] = each
    return found


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # Of threads that other tests have left.
def test_no_lock_of_the_library_stays_locked_in_a_forked_child() -> None:
    """Kind: locks that all threads share, any of which a thread may hold in the moment of a fork."""
    pytest.importorskip("ray")
    for name in with_locks():
        importlib.import_module(name)
    held = locks_of_modules()
    assert {"collective._store._ray_refs._starting", "scheduling._ray_start._starter._guard"} <= set(held)
    reader, writer = os.pipe()
    for lock in held.values():
        lock.acquire()
    try:
        child = os.fork()
        if child == 0:
            os.write(writer, " ".join(name for name, lock in locks_of_modules().items() if lock.locked()).encode())
            os._exit(0)
        os.waitpid(child, 0)
    finally:
        for lock in held.values():
            lock.release()
    os.close(writer)
    with open(reader) as locked:
        assert locked.read() == ""
