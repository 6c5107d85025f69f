"""Row streams over groups: what producers put, and what consumers get."""

from __future__ import annotations

import asyncio
import pickle
from typing import Any

import numpy as np
import pytest
from row_harness import ROW, by_the_book, cast, drain, feed, ids, outcomes, rows, run, until

from collective import ConsumerLeft, RowsLeftOver, RowState, StreamClosed, WrongThread


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
