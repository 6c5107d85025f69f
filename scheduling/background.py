"""Work beside the event loop: blocking calls in threads that nobody has to wait for, and what must not be cut short."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

T = TypeVar("T")


def in_thread(function: Callable[[], T]) -> asyncio.Future[T]:
    """Run `function` in a daemon thread of its own; cancelling the future abandons it there.

    Unlike the threads of `asyncio.to_thread`, one that is stuck (in a call to a cluster that is gone) delays neither
    the end of the loop nor that of the process.
    """
    future, work = for_thread(function)
    try:
        threading.Thread(target=work, name=f"scheduling {getattr(function, '__name__', '')}", daemon=True).start()
    except RuntimeError as error:
        raise RuntimeError(
            f"this process ({os.getpid()}) has no threads left for a call to Ray ({error}); raise its limit "
            "(`ulimit -u`, the container's pids.max) or have it hold fewer, then try again"
        ) from error
    return future


def for_thread(function: Callable[[], T]) -> tuple[asyncio.Future[T], Callable[[], None]]:
    """Return a future of the running loop, and what a thread runs for it to get what `function` returns or raises.

    Cancelling the future drops that; the thread is not interrupted.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def deliver(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)  # type: ignore[arg-type]  # the result of `function`, which may be None
        else:
            future.set_exception(error)

    def work() -> None:
        result, error = None, None
        try:
            result = function()
        except BaseException as raised:
            error = raised
        post(loop, deliver, result, error)

    return future, work


def post(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *args: object) -> None:
    """Call back on a loop from another thread, unless the loop has been closed: then nobody waits any more."""
    try:
        loop.call_soon_threadsafe(callback, *args)
    except RuntimeError:
        if not loop.is_closed():
            raise


async def to_the_end(
    work: Coroutine[Any, Any, T] | asyncio.Task[T], *, on_cancel: Callable[[], None] | None = None
) -> T:
    """Await `work` to its end even where this task is cancelled meanwhile; then let the cancellation through.

    :param on_cancel: called at each cancellation, to make the work hurry.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
            if on_cancel is not None:
                on_cancel()
    if cancelled is None:
        return task.result()
    if not task.cancelled() and (failure := task.exception()) is not None:
        raise cancelled from failure
    raise cancelled
