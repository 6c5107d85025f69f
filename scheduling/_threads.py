"""Blocking calls off the event loop, in threads that nobody has to wait for."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


def in_thread(function: Callable[[], T]) -> asyncio.Future[T]:
    """Run `function` in a daemon thread of its own; cancelling the future abandons it there.

    Unlike the threads of `asyncio.to_thread`, one that is stuck (in a call to a cluster that is gone) delays neither
    the end of the loop nor that of the process.
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

    def run() -> None:
        result, error = None, None
        try:
            result = function()
        except BaseException as raised:
            error = raised
        post(loop, deliver, result, error)

    threading.Thread(target=run, name=f"scheduling {getattr(function, '__name__', '')}", daemon=True).start()
    return future


def post(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *args: object) -> None:
    """Call back on a loop from another thread, unless the loop has been closed: then nobody waits any more."""
    try:
        loop.call_soon_threadsafe(callback, *args)
    except RuntimeError:
        if not loop.is_closed():
            raise
