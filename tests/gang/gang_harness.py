"""How tests of gangs run, and what they look for afterwards."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psutil
import uvloop

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

BLOCKED = 1.0
"""Seconds that a callback may take on a driver's loop: far more than any does, far less than what blocks."""


def run(main: Coroutine[Any, Any, Any], *, loop: str = "asyncio", debug: bool = True) -> Any:
    """Run a test's coroutine; fail where it blocked the loop (seen with `debug`), or left tasks behind."""

    async def watched() -> Any:
        asyncio.get_running_loop().slow_callback_duration = BLOCKED
        result = await main
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left
        return result

    with logged("asyncio") as records:
        result = (asyncio.run if loop == "asyncio" else uvloop.run)(watched(), debug=debug)
    # Slow callbacks, exceptions that nobody retrieved, and tasks that were destroyed while pending.
    assert [record.getMessage() for record in records if record.levelno >= logging.WARNING] == []
    return result


@contextmanager
def logged(name: str) -> Iterator[list[logging.LogRecord]]:
    """Collect what a logger gets."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        yield records
    finally:
        logger.removeHandler(handler)


def actor_processes() -> dict[int, str]:
    """Return the processes below this one in which Ray runs an actor of a gang: pid and title."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            title = process.cmdline()[:1]
        except psutil.Error:
            continue
        if title and title[0].startswith("ray::") and "[" in title[0]:
            found[process.pid] = title[0]
    return found


def live_placement_groups() -> list[str]:
    """Return the names of Ray's placement groups that are not removed."""
    from ray.util import placement_group_table

    return [group["name"] for group in placement_group_table().values() if group["state"] != "REMOVED"]


def is_there(pid: int) -> bool:
    """Return whether a process exists."""
    return os.path.exists(f"/proc/{pid}")


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def __float__(self) -> float:
        return time.monotonic() - self._start


@contextmanager
def starved() -> Iterator[None]:
    """Leave this process no descriptor that it could open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
