"""Row streams over groups: what producers put, consumers get, and what every member hears when something goes wrong."""

from __future__ import annotations

import asyncio
import gc
import pickle
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from collective import (
    ConsumerLeft,
    Group,
    GroupBroken,
    PeerLost,
    ProducerFailed,
    RowsLeftOver,
    RowsMismatch,
    RowState,
    RowStream,
    StreamClosed,
    WrongThread,
)
from collective._core.faults import LEFT
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


@pytest.mark.parametrize(("counts", "trainers"), [([10, 25, 40], 2), ([0, 31], 3), ([5, 5, 5, 5], 1)])
@pytest.mark.parametrize("tail", ["drop", "pad"])
@pytest.mark.parametrize("order", ["round-robin", "arrival"])
def test_every_consumer_gets_as_many_batches(counts: list[int], trainers: int, tail: str, order: str) -> None:
    async def test() -> None:
        async with cast(len(counts), trainers) as members:
            streams = members.open(order=order, tail=tail)
            givers, takers = members.ends(streams)
            blocks = [feed(stream, p, counts[p], 1 + 3 * p) for p, stream in enumerate(givers)]
            got = (await asyncio.gather(*blocks, *map(drain, takers)))[len(givers) :]
            size, total = 4 * trainers, sum(counts)
            assert {len(batches) for batches in got} == {total // size if tail == "drop" else -(-total // size)}
            every = [row for batches in got for batch in batches for row in batch]
            assert len(every) == len(set(every)) == (total // size * size if tail == "drop" else total)
            if order == "round-robin":
                in_order = [row for step in zip(*got, strict=True) for batch in step for row in batch]
                assert in_order == by_the_book(counts)[: len(every)]

    run(test)


def test_the_order_depends_neither_on_blocks_nor_on_time() -> None:
    async def once(blocks: list[int], late: int) -> list[Any]:
        async with cast(3, 2) as members:
            givers, takers = members.ends(members.open(tail="pad", budget=8 * ROW))
            pending = [asyncio.ensure_future(drain(stream)) for stream in takers]
            feeds = [feed(stream, p, 30 + p, blocks[p]) for p, stream in enumerate(givers)]
            last = feeds.pop(late)
            early = [asyncio.ensure_future(each) for each in feeds]
            for _ in range(100):
                await asyncio.sleep(0)
            await asyncio.gather(*early, last)
            return await asyncio.gather(*pending)

    async def test() -> None:
        assert await once([1, 7, 100], 0) == await once([30, 2, 5], 2)

    run(test)


def test_a_round_comes_only_when_all_its_rows_are_there_and_arrival_waits_for_nobody() -> None:
    async def test() -> None:
        for order, comes in (("round-robin", False), ("arrival", True)):
            async with cast(2, 2) as members:
                (first, second), (one, two) = members.ends(members.open(order=order))
                await second.put(rows(1, 0, 0))  # its columns are known, its rows are to come
                await first.put(rows(0, 0, 8))
                pending = [asyncio.ensure_future(anext(stream)) for stream in (one, two)]
                done, _ = await asyncio.wait(pending, timeout=None if comes else 0.05)
                assert bool(done) == comes
                closing = [asyncio.ensure_future(stream.close()) for stream in (first, second)]
                batches = [await each for each in pending]
                assert [ids(batch) for batch in batches] == [[(0, r) for r in range(4)], [(0, r) for r in range(4, 8)]]
                await outcomes(*closing)

    run(test)


@pytest.mark.parametrize("order", ["round-robin", "arrival"])
def test_resuming_gives_each_row_once_also_to_another_number_of_consumers(order: str) -> None:
    counts = [40, 90, 10]

    async def first() -> tuple[RowState, list[Any]]:
        async with cast(3, 2) as members:
            givers, takers = members.ends(members.open(order=order, budget=16 * ROW))
            feeding = [asyncio.ensure_future(feed(stream, p, counts[p], 7)) for p, stream in enumerate(givers)]
            seen = [[ids(await anext(stream)) for _ in range(n)] for stream, n in zip(takers, (5, 3), strict=True)]
            await takers[0].close()
            await until(lambda: takers[1]._end._farewell.end is not None)
            seen[1] += await drain(takers[1])
            assert [isinstance(each, ConsumerLeft) for each in await outcomes(*feeding)].count(True) >= 1
            await until(lambda: takers[1].state() == takers[0].state())
            state: RowState = pickle.loads(pickle.dumps(takers[0].state()))
            return state, seen

    async def second(state: RowState) -> list[Any]:
        async with cast(3, 3) as members:
            streams = members.open(order=order, resume=state, tail="pad", batch_size=3)
            givers, takers = members.ends(streams)
            assert tuple(stream.position for stream in givers) == state.positions
            feeds = [feed(stream, p, counts[p], 11) for p, stream in enumerate(givers)]
            return (await asyncio.gather(*feeds, *map(drain, takers)))[3:]

    async def test() -> None:
        state, seen = await first()
        assert len(pickle.dumps(state)) < 300
        before = {(p, row) for p, at in enumerate(state.positions) for row in range(at)}
        assert before <= {row for batches in seen for batch in batches for row in batch}
        if order == "round-robin":  # both ended at one round, and had done it
            assert [len(batches) for batches in seen] == [5, 5]
            assert state.rows == 40
        after = [row for batches in await second(state) for batch in batches for row in batch]
        assert len(after) == len(set(after))
        assert not before & set(after)
        assert before | set(after) == set(by_the_book(counts))

    run(test)


def test_a_batch_tells_the_state_after_its_round_at_once() -> None:
    async def test() -> None:
        async with cast(2, 2) as members:
            givers, takers = members.ends(members.open())
            feeding = [asyncio.ensure_future(feed(stream, p, 50, 50)) for p, stream in enumerate(givers)]
            for step in range(1, 4):
                states = [(await anext(stream)).state for stream in takers]
                assert states == [RowState((4 * step, 4 * step), (0, 0))] * 2
            assert all(stream.state().rows <= 16 for stream in takers)  # the third round is not done
            await takers[1].close()
            await outcomes(*feeding, drain(takers[0]))

    run(test)


def test_a_slow_consumer_slows_the_producers() -> None:
    async def test() -> None:
        async with cast(2, 2) as members:
            budget = 40 * ROW
            givers, takers = members.ends(members.open(budget=budget))
            feeding = [asyncio.ensure_future(feed(stream, p, 1000, 7)) for p, stream in enumerate(givers)]
            fast = asyncio.ensure_future(drain(takers[0]))
            for taken in range(60):
                await anext(takers[1])
                for _ in range(20):
                    await asyncio.sleep(0)
                assert max(stream.held_bytes for stream in (*givers, *takers)) <= budget
                # What the producers are ahead: their own budget, and what the consumers have asked for.
                assert sum(stream.position for stream in givers) <= 8 * (taken + 1) + 2 * 40 + 2 * 40
            await asyncio.gather(*feeding, fast, drain(takers[1]))

    run(test)


@pytest.mark.parametrize("budget", [8 * ROW, 11 * ROW])
def test_a_budget_of_little_more_than_a_round_is_enough_for_blocks_of_any_size(budget: int) -> None:
    async def test() -> None:
        async with cast(2, 2) as members:
            givers, takers = members.ends(members.open(budget=budget))
            feeds = [feed(stream, p, (300, 500)[p], (5, 499)[p]) for p, stream in enumerate(givers)]
            got = (await asyncio.gather(*feeds, *map(drain, takers)))[2:]
            assert [len(batches) for batches in got] == [100, 100]

    run(test)


def test_cancelled_calls_lose_nothing() -> None:
    async def test() -> None:
        async with cast(1, 1) as members:
            (giver,), (taker,) = members.ends(members.open(budget=8 * ROW))
            got: list[tuple[int, int]] = []
            cancelled = 0

            async def take() -> None:
                nonlocal cancelled
                while True:
                    task = asyncio.ensure_future(anext(taker))
                    for _ in range(cancelled % 5):
                        await asyncio.sleep(0)
                    cancelled += task.cancel()
                    try:
                        got.extend(ids(await task))
                    except asyncio.CancelledError:
                        continue
                    except StopAsyncIteration:
                        return

            taking = asyncio.ensure_future(take())
            tries = 0
            while giver.position < 200:
                tries += 1
                at = giver.position
                put = asyncio.ensure_future(giver.put(rows(0, at, min(3 + tries % 20, 200 - at))))
                for _ in range(tries % 7):
                    await asyncio.sleep(0)
                put.cancel()
                await asyncio.wait([put])
                if put.cancelled() and tries % 20 < 2:
                    assert giver.position == at  # a block that fits the budget less a round: whole, or not at all
            await giver.close()
            await taking
            assert cancelled > 10
            assert got == [(0, row) for row in range(200)]

    run(test)


@pytest.mark.parametrize("how", ["raises in its with block", "is dropped", "fails"])
def test_a_failing_producer_ends_it_on_every_consumer_at_one_round(how: str) -> None:
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
                    givers[1].fail(KeyError("bad file"))
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
                    assert isinstance(error, KeyError)
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


def test_streams_of_a_group_follow_one_another_and_need_no_meeting() -> None:
    async def test() -> None:
        async with cast(2, 2) as members:

            async def produce(number: int) -> None:
                for _ in range(3):
                    stream = members.open_one(number)
                    await feed(stream, number, 16, 5)

            async def consume(number: int) -> list[int]:
                return [len(await drain(members.open_one(number))) for _ in range(3)]

            results = await asyncio.gather(produce(0), produce(1), consume(2), consume(3))
            assert results[2:] == [[4, 4, 4]] * 2
            await until(lambda: not any(group._engine.current.streams._ends for group in members.groups))

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


def test_a_tail_that_is_an_error_comes_after_the_whole_rounds() -> None:
    async def test() -> None:
        async with cast(2, 2) as members:
            givers, takers = members.ends(members.open(tail="error"))
            feeding = [asyncio.ensure_future(feed(stream, p, (9, 10)[p], 20)) for p, stream in enumerate(givers)]
            for stream in takers:
                await anext(stream)
                await anext(stream)
                with pytest.raises(RowsLeftOver, match=r"3 rows left .* 2 consumers x 4 rows.* rows 9, 10"):
                    await anext(stream)
            await asyncio.gather(*feeding)

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


def test_bad_arguments_and_bad_rows_are_errors_at_the_call() -> None:
    async def test() -> None:
        async with cast(1, 1) as members:
            for wrong in (
                {"batch_size": 0},
                {"order": "random"},
                {"tail": "keep"},
                {"producers": "nobody"},
                {"producers": "trainer"},
                {"resume": RowState((1, 2), (0, 0))},
                {"budget": 0},
            ):
                with pytest.raises(ValueError, match=r"\w"):
                    members.open(**wrong)
            (giver,), (taker,) = members.ends(members.open())
            for bad, said in (
                ({}, "empty dict"),
                ({"a": np.ones(3), "b": np.ones(4)}, "'a' has 3, 'b' has 4"),
                ({"a": np.float32(3)}, "no dimensions"),
            ):
                with pytest.raises(ValueError, match=said):
                    await giver.put(bad)
            for bad in ([1, 2], {"a": [1, 2]}, {1: np.ones(2)}, {"a": np.array([object()])}):
                with pytest.raises(TypeError):
                    await giver.put(bad)
            await giver.put(rows(0, 0, 4))
            with pytest.raises(ValueError, match="all blocks have the same columns"):
                await giver.put({"id": np.arange(4)})
            with pytest.raises(TypeError, match="only producers"):
                await taker.put(rows(0, 0, 1))
            with pytest.raises(TypeError, match="only consumers"):
                await anext(giver)
            with pytest.raises(WrongThread):
                await asyncio.to_thread(asyncio.run, giver.put(rows(0, 4, 1)))
            first = asyncio.ensure_future(anext(taker))
            assert ids(await first) == [(0, row) for row in range(4)]
            waiting = asyncio.ensure_future(anext(taker))
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="two tasks"):
                await anext(taker)
            await giver.close()
            with pytest.raises(StopAsyncIteration):
                await waiting
            with pytest.raises(StreamClosed):
                await giver.put(rows(0, 4, 1))

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
