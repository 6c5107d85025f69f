"""Timers of loops that are not lost when the loop is closed before they are due."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable


class _Timer:
    """A timer's callback. A loop lets go of it when it was called, and when it is closed, whoever closes it and how."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._end = weakref.finalize(self, function)
        self._end.atexit = False

    def __call__(self) -> None:
        self._end()


def call_later_or_at_close(loop: asyncio.AbstractEventLoop, seconds: float, function: Callable[[], None]) -> None:
    """Have a function called once: by the loop after so many seconds, or in the middle of `loop.close()` before that.

    No loop has a hook for its end; `shutdown_asyncgens`, which `asyncio.run` awaits, is left out by others.
    """
    loop.call_later(seconds, _Timer(function))
