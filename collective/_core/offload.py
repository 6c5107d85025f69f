"""Work that is too long for the loop, on threads that no user's blocking call can occupy."""

from __future__ import annotations

import asyncio
import os
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


def _forget_pool() -> None:
    global _pool
    _pool = None  # its threads stayed in the parent


os.register_at_fork(after_in_child=_forget_pool)
