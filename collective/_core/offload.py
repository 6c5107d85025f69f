"""Work that is too long for the loop, on threads that no user's blocking call can occupy."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, TypeVar

from collective._gate import Gate
from collective.errors import OutOfResources

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

LONG = 4 << 20
"""Bytes whose copy takes about a millisecond: more than this is copied off the loop."""

_THREADS = 2


class _Pool:
    """Daemon threads, started at the first use; fewer, or none, where the system has no more."""

    def __init__(self) -> None:
        self.jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._started = 0
        self._lock = threading.Lock()

    def ready(self) -> bool:
        """Start what is missing; return whether there is any thread."""
        if self._started < _THREADS:
            with self._lock, contextlib.suppress(RuntimeError):
                while self._started < _THREADS:
                    name = f"collective-copy {self._started}"
                    threading.Thread(target=self._serve, name=name, daemon=True).start()
                    self._started += 1
        return self._started > 0

    def _serve(self) -> None:
        while True:
            self.jobs.get()()


_pool = _Pool()


def offload(function: Callable[[], T]) -> asyncio.Future[T]:
    """Run a function that does not block for long, only computes or copies, on a thread.

    A cancelled one is not begun. Where the system has no thread to give, it holds up the loop: late is better than not.
    """
    future, work = _on_loop(function)
    if _pool.ready():
        _pool.jobs.put(work)
    else:
        work()
    return future


def in_thread(function: Callable[[], T], *, name: str) -> asyncio.Future[T]:
    """Run a function that blocks in a daemon thread of its own; cancelling the future abandons it there.

    It keeps nobody else's work waiting, as it would on a pool, and neither the loop nor the process from ending.

    Raises:
        OutOfResources: the system has no more threads.
    """
    future, work = _on_loop(function)
    try:
        threading.Thread(target=work, name=name, daemon=True).start()
    except RuntimeError as error:
        exhausted = OutOfResources.of(error, f"this process ({os.getpid()})", f"run {name}")
        raise exhausted or error from error
    return future


def _on_loop(function: Callable[[], T]) -> tuple[asyncio.Future[T], Callable[[], None]]:
    """Return a future of the running loop, and what a thread runs for it to get what `function` returns or raises."""
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
        if future.cancelled():
            return
        result, error = None, None
        try:
            result = function()
        except BaseException as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # The loop is closed, and nobody waits.
            loop.call_soon_threadsafe(deliver, result, error)

    return future, work


async def offload_through(function: Callable[[Gate], T]) -> T:
    """Run a function on a thread, as `offload`, that goes through a gate to a caller's memory; cancelling shuts it."""
    gate = Gate()
    try:
        return await offload(partial(function, gate))
    except asyncio.CancelledError:
        gate.shut()
        raise


def _forget_pool() -> None:
    global _pool
    _pool = _Pool()  # The threads of the other stayed in the parent.


os.register_at_fork(after_in_child=_forget_pool)
