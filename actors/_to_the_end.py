"""Waiting for what must not be left half done."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

T = TypeVar("T")


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
