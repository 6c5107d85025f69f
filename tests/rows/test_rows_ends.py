"""Row streams that end early: what every member hears of failures, leavers, deaths and disagreements."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import numpy as np
import pytest
from row_harness import ROW, Cast, cast, drain, feed, outcomes, rows, run, until

from collective import ConsumerLeft, GroupBroken, PeerLost, ProducerFailed, RowsMismatch, StreamClosed
from collective._core.faults import LEFT
from collective.testing import world


@pytest.mark.parametrize("how", ["raises in its with block", "is dropped", "fails"])
def test_a_failing_producer_ends_it_on_every_consumer_at_one_round(how: str) -> None:
    class BadFile(KeyError):
        """As those of `__main__` do, it has to go by value."""

    async def test() -> None:
        async with cast(3, 2) as members:
            streams = members.open(budget=8 * ROW)
            givers, takers = members.ends(streams)
            seen: dict[int, int] = {}

            async def take(number: int) -> None:
                async for _ in takers[number]:
                    seen[number] = seen.get(number, 0) + 1

            async def produce() -> None:
                for _ in range(5):
                    await givers[1].put(rows(1, givers[1].position, 4))
                if how == "fails":
                    givers[1].fail(BadFile("bad file"))
                elif how == "raises in its with block":
                    async with givers[1]:
                        raise KeyError("bad file")
                else:
                    streams.pop(1)
                    del givers[1]
                    gc.collect()

            others = [feed(stream, p, 10_000, 9) for p, stream in enumerate(givers) if p != 1]
            results = await outcomes(*others, take(0), take(1), produce())
            assert seen[0] == seen[1]
            for error in results[:2]:
                assert isinstance(error, ProducerFailed)
                assert (error.role, error.rank) == ("reader", 1)
            for error in results[2:4]:
                if how == "is dropped":
                    assert isinstance(error, ProducerFailed)
                    assert "dropped" in str(error)
                else:
                    assert type(error) is (BadFile if how == "fails" else KeyError)
                    assert error.args == ("bad file",)
                    assert isinstance(error.__cause__, ProducerFailed)
            with pytest.raises((KeyError, ProducerFailed)):
                await anext(takers[0])

    run(test)


def test_two_consumers_that_leave_at_the_same_time_end_it_at_one_round() -> None:
    async def test() -> None:
        async with cast(2, 3) as members:
            givers, takers = members.ends(members.open(budget=24 * ROW))
            feeding = [asyncio.ensure_future(feed(stream, p, 10_000, 9)) for p, stream in enumerate(givers)]
            for stream, count in zip(takers, (2, 4, 1), strict=True):
                for _ in range(count):
                    await anext(stream)
            await asyncio.gather(takers[0].close(), takers[2].close())
            await until(lambda: takers[1]._end._farewell.end is not None)
            assert len(await drain(takers[1])) == 0
            assert takers[1].state().rows <= 12  # what the one that left first had done
            for error in await outcomes(*feeding):
                assert isinstance(error, ConsumerLeft)
            with pytest.raises(StreamClosed):
                await anext(takers[0])
            await givers[0].close()

    run(test)


def test_who_has_got_everything_may_go_and_others_may_still_leave() -> None:
    async def test() -> None:
        async with cast(1, 2) as members:
            (giver,), (fast, slow) = members.ends(members.open())
            feeding = asyncio.ensure_future(feed(giver, 0, 80, 80))
            assert len(await drain(fast)) == 10
            await anext(slow)
            await feeding
            await members.groups[1].aclose()
            await anext(slow)
            await slow.close()
            with pytest.raises(StreamClosed):
                await anext(slow)

    run(test)


def test_rows_that_differ_are_an_error_on_every_member_before_any_are_given_out() -> None:
    async def test() -> None:
        async with cast(2, 2) as members:
            givers, takers = members.ends(members.open())

            async def produce(number: int) -> None:
                block = rows(number, 0, 100)
                if number == 1:
                    block["id"] = block["id"].astype(np.int32)
                await givers[number].put(block)
                await givers[number].close()

            for error in await outcomes(produce(0), produce(1), *map(drain, takers)):
                assert isinstance(error, RowsMismatch)
                assert "reader[0] has {from: numpy float32[3], id: numpy int64}" in str(error)
                assert "reader[1] has {from: numpy float32[3], id: numpy int32}" in str(error)

    run(test)


def test_terms_that_differ_are_an_error_on_every_member() -> None:
    async def test() -> None:
        async with cast(2, 2) as members:
            givers, takers = members.ends(members.open(lambda rank: {"tail": "pad"} if rank == 3 else {}))
            feeds = [feed(stream, p, 20, 20) for p, stream in enumerate(givers)]
            for error in await outcomes(*feeds, *map(drain, takers)):
                assert isinstance(error, RowsMismatch)
                assert "trainer[1] has RowStream(batch_size=4, order='round-robin', tail='pad')" in str(error)

    run(test)


def test_a_budget_below_a_round_is_an_error_on_every_member() -> None:
    async def test() -> None:
        async with cast(2, 2) as members:
            givers, takers = members.ends(members.open(budget=8 * ROW - 1))
            feeds = [feed(stream, p, 20, 20) for p, stream in enumerate(givers)]
            for error in await outcomes(*feeds, *map(drain, takers)):
                assert isinstance(error, ValueError)
                assert "budget is 159 bytes and a round of 2 consumers x 4 rows takes 160" in str(error)

    run(test)


@pytest.mark.parametrize("dead", [0, 3])
def test_a_death_is_peer_lost_on_all(dead: int) -> None:
    async def test() -> None:
        async with world("memory", 4, roles={"reader": 2, "trainer": 2}) as opened, asyncio.timeout(10):
            givers, takers = (members := Cast(opened.groups, 2)).ends(members.open(budget=8 * ROW))
            acts = [feed(stream, p, 10_000, 9) for p, stream in enumerate(givers)] + [drain(each) for each in takers]
            tasks = [asyncio.ensure_future(act) for act in acts]
            for _ in range(200):
                await asyncio.sleep(0)
            opened.endpoints[dead].abort()
            results = await outcomes(*tasks)
            for rank, error in enumerate(results):
                if rank != dead:
                    assert isinstance(error, PeerLost)
                    assert (error.role, error.rank) == str_of(dead)

    run(test)


def str_of(rank: int) -> tuple[str, int]:
    return ("reader", rank) if rank < 2 else ("trainer", rank - 2)


@pytest.mark.parametrize("member", [1, 2], ids=["producer", "consumer"])
def test_a_channel_that_ends_before_the_news_of_why_is_explained_by_it(member: int) -> None:
    """Ranks 1 and 2 hear of breaks from rank 0: each of them sees the other's channel end before that."""

    async def test() -> None:
        async with world("shm", 3, roles={"reader": 2, "trainer": 1}, link="unix") as opened, asyncio.timeout(20):
            for delay in range(50, 250, 40):
                givers, takers = (members := Cast(opened.groups, 2)).ends(members.open(budget=4 * ROW))
                acts = [feed(stream, p, 10_000, 9) for p, stream in enumerate(givers)] + [drain(takers[0])]
                tasks = [asyncio.ensure_future(act) for act in acts]
                for _ in range(delay):
                    await asyncio.sleep(0)
                if delay < 200:
                    opened.groups[member]._engine.break_everywhere("for the test")
                    for error in await outcomes(*tasks):
                        assert isinstance(error, GroupBroken)
                    await opened.reset()
            await opened.groups[member].aclose()
            del tasks[member]
            for error in await outcomes(*tasks):
                assert isinstance(error, PeerLost)
                assert (str(opened.member(member)), error.cause) == (f"{error.role}[{error.rank}]", LEFT)

    run(test)


def test_a_broken_group_breaks_its_streams_and_a_reset_one_has_new_ones() -> None:
    async def test() -> None:
        async with cast(2, 2) as members:
            givers, takers = members.ends(members.open(budget=8 * ROW))
            tasks = [asyncio.ensure_future(feed(stream, p, 10_000, 9)) for p, stream in enumerate(givers)]
            tasks += [asyncio.ensure_future(drain(stream)) for stream in takers]
            await asyncio.sleep(0)
            await asyncio.gather(*(group.reset() for group in members.groups))
            for error in await outcomes(*tasks):
                assert isinstance(error, GroupBroken)
            givers, takers = members.ends(members.open())
            feeds = [feed(stream, p, 8, 3) for p, stream in enumerate(givers)]
            assert [len(each) for each in (await asyncio.gather(*feeds, *map(drain, takers)))[2:]] == [2, 2]

    run(test)


@pytest.mark.parametrize("method", ["ArrayStorage.piece", "ArrayLanding.place", "ArrayFormat.landing"])
def test_what_fails_inside_is_raised_and_not_waited_for(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    def fail(*args: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(f"collective._rows.arrays.{method}", fail)

    async def test() -> None:
        async with cast(2, 2) as members:
            givers, takers = members.ends(members.open(budget=8 * ROW))
            feeds = [feed(stream, p, 1000, 9) for p, stream in enumerate(givers)]
            for error in await outcomes(*feeds, *map(drain, takers)):
                assert isinstance(error, ProducerFailed | MemoryError)
                assert "no room" in str(error)

    run(test)
