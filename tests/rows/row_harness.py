"""What the tests of row streams share: rows, the members of a group that streams them, and what they do."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from collective import (
    Group,
    RowStream,
)
from collective.testing import world

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine

ROW = 20
"""Bytes of a row of `rows`."""


def rows(producer: int, first: int, count: int) -> dict[str, np.ndarray]:
    return {
        "id": np.arange(first, first + count),
        "from": np.full((count, 3), producer, np.float32),
    }


def ids(batch: Any) -> list[tuple[int, int]]:
    """Return (producer, row) of each row that is no padding; padding is zero."""
    for name in ("id", "from"):
        assert not np.asarray(batch[name])[~batch.valid].any()
    return [(int(p[0]), int(i)) for p, i, valid in zip(batch["from"], batch["id"], batch.valid, strict=True) if valid]


class Cast:
    """The members of a group of readers and trainers, and their streams."""

    def __init__(self, groups: list[Group], readers: int) -> None:
        self.groups = groups
        self.readers = readers

    def open(self, each: Callable[[int], dict[str, Any]] = lambda rank: {}, **terms: Any) -> list[RowStream]:
        """Make a stream on every member; `each` gives arguments that differ from rank to rank."""
        terms = {"producers": "reader", "consumers": "trainer", "batch_size": 4} | terms
        return [RowStream(group, **(terms | each(rank))) for rank, group in enumerate(self.groups)]

    def open_one(self, rank: int) -> RowStream:
        """Make a member's stream."""
        return RowStream(self.groups[rank], producers="reader", consumers="trainer", batch_size=4)

    def ends(self, streams: list[RowStream]) -> tuple[list[RowStream], list[RowStream]]:
        return streams[: self.readers], streams[self.readers :]


@asynccontextmanager
async def cast(readers: int, trainers: int) -> AsyncIterator[Cast]:
    async with world("memory", readers + trainers, roles={"reader": readers, "trainer": trainers}) as opened:
        async with asyncio.timeout(15):
            yield Cast(opened.groups, readers)
        assert opened.unseen == []


async def feed(stream: RowStream, producer: int, count: int, block: int) -> None:
    """Put a producer's rows from its position on, in blocks."""
    while stream.position < count:
        await stream.put(rows(producer, stream.position, min(block, count - stream.position)))
    await stream.close()


async def drain(stream: RowStream) -> list[list[tuple[int, int]]]:
    return [ids(batch) async for batch in stream]


async def outcomes(*tasks: Awaitable[Any]) -> list[Any]:
    return await asyncio.gather(*tasks, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop turn until a condition holds; the test's own deadline bounds it."""
    while not condition():  # noqa: ASYNC110 (there is no event to wait for)
        await asyncio.sleep(0.001)


def by_the_book(counts: list[int]) -> list[tuple[int, int]]:
    return sorted(((p, row) for p, count in enumerate(counts) for row in range(count)), key=lambda row: row[::-1])


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())
