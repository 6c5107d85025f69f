"""Collectives that others than the members call: one order on all members, however the calls come to them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from collective import CollectiveTimeout, GroupBroken, GroupClosed, PeerLost, ReduceOp
from collective._core import lanes
from collective._core.operations import AllReduce
from collective.testing import world
from collective.testing._world import outcomes, turns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from collective._core.engine import Engine
    from collective._core.operations import Operation
    from collective.group import Group


class Prepared:
    """How the members prepare one call: at once, at a word, or not at all."""

    def __init__(self, value: float, error: Exception | None = None, go: asyncio.Event | None = None) -> None:
        self.value = value
        self.error = error
        self.go = go

    async def __call__(self, engine: Engine) -> Sequence[Operation]:
        if self.go is not None:
            await self.go.wait()
        if self.error is not None:
            raise self.error
        return [AllReduce(engine.rank, engine.size, np.array([self.value]), ReduceOp.SUM, None)]


def call(group: Group, name: str, prepared: Prepared) -> asyncio.Task[float]:
    async def run() -> float:
        lane = group._engine.current.lane
        ((result,),) = await lane.run(name.encode(), name, "here", prepared)
        return float(result)

    return asyncio.get_running_loop().create_task(run())


def test_calls_that_come_in_other_orders_run_in_one() -> None:
    """To each of twelve members (two levels of the tree) the calls come in another order, amid collectives of its own,
    of which each member has called another number so far."""

    async def main() -> None:
        async with world("memory", 12) as opened, asyncio.timeout(60):
            own, calls = [], []
            for number in range(12):
                for rank, group in enumerate(opened.groups):
                    which = (number * 5 + rank * 7) % 12
                    calls.append((which, call(group, f"call {which}", Prepared(10.0**which))))
                    if (number + rank) % 3:
                        await turns(rank % 2)
            for rank, group in enumerate(opened.groups):
                own.append([group.allreduce(np.array([place + rank])) for place in range(rank)])
            for which, made in calls:
                assert await made == 12 * 10.0**which
            for rank, group in enumerate(opened.groups):
                own[rank] += [group.allreduce(np.array([place + rank])) for place in range(rank, 12)]
            sums = [[int((await work)[0]) for work in works] for works in own]
            assert sums == [[12 * place + 66 for place in range(12)]] * 12
            assert len({group.statistics().collectives for group in opened.groups}) == 1
            assert [len(group._engine.current.lane._calls) for group in opened.groups] == [0] * 12

    asyncio.run(main())


def test_what_one_member_refuses_all_refuse_and_no_place_is_lost() -> None:
    async def main() -> None:
        async with world("memory", 3) as opened, asyncio.timeout(20):
            errors = [None, None, ValueError("no room")]
            refused = [call(*each) for each in calls(opened.groups, "first", [Prepared(1.0, e) for e in errors])]
            taken = [call(*each) for each in calls(opened.groups, "second", [Prepared(2.0)] * 3)]
            said = await outcomes(refused)
            assert [str(error) for error in said] == ["no room"] * 3
            assert all("on rank 2 (worker[2])" in error.__notes__[0] for error in said)
            assert await asyncio.gather(*taken) == [6.0] * 3

    asyncio.run(main())


def test_a_caller_that_gives_up_withdraws_what_is_not_issued() -> None:
    async def main() -> None:
        async with world("memory", 3) as opened, asyncio.timeout(20):
            go = asyncio.Event()
            given_up = [call(*each) for each in calls(opened.groups, "first", [Prepared(1.0, go=go)] * 3)]
            waiting = [call(*each) for each in calls(opened.groups, "second", [Prepared(2.0)] * 3)]
            in_line = [call(*each) for each in calls(opened.groups, "third", [Prepared(3.0)] * 3)]
            await turns()
            assert not any(each.done() for each in (*given_up, *waiting, *in_line))
            for each in (given_up[0], *in_line):
                each.cancel()
            assert [type(error) for error in await outcomes(given_up[1:])] == [GroupBroken] * 2
            assert await asyncio.gather(*waiting) == [6.0] * 3
            await asyncio.wait([*given_up, *in_line])
            for group in opened.groups:
                lane = group._engine.current.lane
                assert (lane._calls, list(lane._line), lane._turn) == ({}, [], None)

    asyncio.run(main())


def test_a_call_that_does_not_come_to_all_ends_at_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "LATER", 0.2)

    async def main() -> None:
        async with world("memory", 12, timeout=1.0) as opened, asyncio.timeout(20):
            some = [call(group, "first", Prepared(1.0)) for group in opened.groups[:11]]
            said = await outcomes(some)
            assert [type(error) for error in said] == [CollectiveTimeout] * 11
            assert "waited 1.1 s for rank 11 (worker[11]);" in str(said[0])  # and not for rank 1, which is above that
            late = call(opened.groups[11], "first", Prepared(1.0))
            assert await asyncio.gather(*everybody(opened.groups, 2.0)) == [24.0] * 12
            late.cancel()

    asyncio.run(main())


def test_what_breaks_the_group_ends_its_calls_and_a_reset_mends_both() -> None:
    async def main() -> None:
        async with world("memory", 3) as opened, asyncio.timeout(20):
            for attempt in range(2):
                assert await asyncio.gather(*everybody(opened.groups, 1.0)) == [3.0] * 3
                waiting = everybody(opened.groups, 2.0, go=asyncio.Event())
                await turns()
                opened.groups[attempt]._engine.break_everywhere("for the test")
                later = everybody(opened.groups, 3.0)
                assert [type(error) for error in await outcomes([*waiting, *later])] == [GroupBroken] * 6
                await opened.reset()

    asyncio.run(main())


@pytest.mark.parametrize("how", ["dies", "leaves"])
@pytest.mark.parametrize("dead", [0, 2])
def test_a_member_that_dies_or_leaves_ends_all_calls(dead: int, how: str) -> None:
    async def main() -> None:
        async with world("memory", 3) as opened, asyncio.timeout(20):
            await asyncio.gather(*everybody(opened.groups, 1.0))
            waiting = everybody(opened.groups, 2.0, go=asyncio.Event())
            await turns()
            left = [rank for rank in range(3) if rank != dead]
            if how == "leaves":
                await opened.groups[dead].aclose()
                assert [type(error) for error in await outcomes([waiting[dead]])] == [GroupClosed]
            for rank in left if how == "dies" else ():
                opened.groups[rank].peer_lost(opened.groups[rank].members[dead], "for the test")
            assert [type(error) for error in await outcomes([waiting[rank] for rank in left])] == [PeerLost] * 2
            later = everybody([opened.groups[rank] for rank in left], 3.0)
            assert [type(error) for error in await outcomes(later)] == [PeerLost] * 2
            waiting[dead].cancel()

    asyncio.run(main())


def calls(groups: Sequence[Group], name: str, prepared: Sequence[Prepared]) -> list[tuple[Any, ...]]:
    return [(group, name, each) for group, each in zip(groups, prepared, strict=True)]


def everybody(groups: Sequence[Group], value: float, go: asyncio.Event | None = None) -> list[asyncio.Task[float]]:
    prepared = Prepared(value, go=go)
    return [call(group, f"call {value}", prepared) for group in groups]
