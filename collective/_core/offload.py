"""Work that is too long for the loop, on threads that no user's blocking call can occupy."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

LONG = 4 << 20
"""Bytes whose copy takes about a millisecond: more than this is copied off the loop."""

_pool: ThreadPoolExecutor | None = None


def offload(function: Callable[[], T]) -> asyncio.Future[T]:
    """Run a function that does not block for long, only computes or copies, on a thread."""
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="collective-copy")
    return asyncio.get_running_loop().run_in_executor(_pool, function)


def in_thread(function: Callable[[], T], *, name: str) -> asyncio.Future[T]:
    """Run a function that blocks in a daemon thread of its own; cancelling the future abandons it there.

    It keeps nobody else's work waiting, as it would on a pool, and neither the loop nor the process from ending.

    Raises:
        RuntimeError: the system has no more threads.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def deliver(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)  # type: ignore[arg-type]  # what `function` returned, which may be None
        else:
            future.set_exception(error)

    def work() -> None:
        result, error = None, None
        try:
            result = function()
        except BaseException as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # The loop is closed, and nobody waits.
            loop.call_soon_threadsafe(deliver, result, error)

    threading.Thread(target=work, name=name, daemon=True).start()
    return future


def _forget_pool() -> None:
    global _pool
    _pool = None  # its threads stayed in the parent


os.register_at_fork(after_in_child=_forget_pool)
