"""The half of a benchmark that runs in a process of its own: it measures what it is told to, when it is its turn.

`python -m benchmarks.side MODULE SOCKET RANK` runs `main(turns)` of `benchmarks.sides.MODULE`. A module of its own for
each side, since a side's actors import it: those of peers import nothing of Gangline.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
import time
import traceback
from multiprocessing.connection import Client
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from multiprocessing.connection import Connection


class Turns:
    """What a side is asked, and by whom. Whoever waits for the next turn sleeps."""

    def __init__(self, connection: Connection, rank: int) -> None:
        self.rank = rank
        self._connection = connection

    def serve(self, handlers: Mapping[str, Callable[..., Any]]) -> None:
        """Answer requests by name until there are no more. A handler's failure is told, and the next one is served."""
        self._connection.send(self.rank)
        while (request := self._next()) is not None:
            name, arguments = request
            try:
                self._connection.send((True, handlers[name](*arguments)))
            except Exception:
                self._connection.send((False, traceback.format_exc()))

    async def serve_async(self, handlers: Mapping[str, Callable[..., Awaitable[Any]]]) -> None:
        """Do the same on a loop."""
        self._connection.send(self.rank)
        while (request := await asyncio.to_thread(self._next)) is not None:
            name, arguments = request
            try:
                self._connection.send((True, await handlers[name](*arguments)))
            except Exception:
                self._connection.send((False, traceback.format_exc()))

    def _next(self) -> tuple[str, tuple[Any, ...]] | None:
        try:
            return self._connection.recv()
        except EOFError:  # whoever asks is gone
            return None


def time_row(call: Callable[[], object], count: int) -> list[float]:
    """Return the seconds that each of a row of calls takes; some more go first, to warm up."""
    samples = []
    for _ in range(warmth(count)):
        call()
    for _ in range(count):
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return samples


async def time_async_row(call: Callable[[], Awaitable[object]], count: int) -> list[float]:
    """Do the same on a loop."""
    samples = []
    for _ in range(warmth(count)):
        await call()
    for _ in range(count):
        start = time.perf_counter()
        await call()
        samples.append(time.perf_counter() - start)
    return samples


def warmth(count: int) -> int:
    """Return how many calls go ahead of a row: the side slept, and others had the caches."""
    return max(1, count // 5)


def main(module: str, socket: str, rank: str) -> None:
    """Be a side."""
    with Client(socket) as connection:
        importlib.import_module(f"benchmarks.sides.{module}").main(Turns(connection, int(rank)))


if __name__ == "__main__":
    main(*sys.argv[1:])
