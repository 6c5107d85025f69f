"""Members of a group on "shm", a process each, whose collectives are in one scope or in several."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import uvloop

from benchmarks.side import time_async_row, warmth
from benchmarks.sides.members import membership
from collective import scopes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.side import Turns
    from collective.types import Address


def main(turns: Turns) -> None:
    """Be a member."""
    uvloop.run(serve(turns))


async def serve(turns: Turns) -> None:
    source, out = np.ones(2, np.float32), np.ones(2, np.float32)
    calls = 0

    async def form(addresses: Sequence[Address], over_links: bool) -> None:
        await member.form(addresses)
        if over_links:
            from collective._core import cards

            cards.QUIET = sys.maxsize  # type: ignore[misc]  # it stays so once members have called in other orders
            await alternate(2)

    async def row(scope: str, count: int) -> list[float]:
        nonlocal calls
        calls += 1
        group = member.group
        with part_of_call(calls) if scope == "call" else contextlib.nullcontext():
            await group.barrier()
            return await time_async_row(lambda: group.allreduce(source, out=out), count)

    async def alternate(count: int) -> list[float]:
        """Both at once, in other orders: each half of what both take."""
        first, second = member.group.scope("a"), member.group.scope("b")
        if turns.rank:
            first, second = second, first
        samples = []
        for _ in range(warmth(count) + count // 2):
            start = time.perf_counter()
            works = first.allreduce(source), second.allreduce(source)
            await asyncio.gather(*works)
            samples += [(time.perf_counter() - start) / 2] * 2
        return samples[-count:]

    def part_of_call(number: int) -> Any:
        if not hasattr(scopes, "Call"):  # an older commit
            return scopes.CallScope()
        call = scopes.Call(number.to_bytes(16, "big"), "a call", ("member", range(2)))
        return scopes.CallScope(call, member.endpoint)

    async with membership(turns.rank) as member:
        await turns.serve_async({"setup": member.address, "form": form, "row": row, "alternate": alternate})
