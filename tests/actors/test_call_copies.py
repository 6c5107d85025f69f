"""Arguments, results and items are what they were when they were given, whoever changes their memory since."""

from __future__ import annotations

import asyncio
import gc
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from actor_harness import run, team

from actors import Actor, lend
from collective._links import arena, snapshots
from collective.links import allocate
from collective.testing._world import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SIZES = [1 << 10, 60 << 10, 200 << 10, 1 << 20, 3 << 20, 9 << 20]
MIB = 1 << 20


class Changing(Actor):
    def __init__(self) -> None:
        self.array = np.zeros(0, np.int64)
        self.reached = threading.Event()
        self.seen: list[int] = []
        self.counts: dict[tuple[int, int], int] = {}

    async def hold(self, nbytes: int) -> None:
        self.array = np.zeros(nbytes // 8, np.int64)

    async def step(self) -> Any:
        self.array += 1
        return {"state": [self.array]}

    async def step_lent(self) -> Any:
        self.array += 1
        return {"state": [lend(self.array)]}

    def step_plainly(self) -> Any:
        self.array += 1
        if self.array[0] == 2:
            self.reached.set()
        return self.array

    def see(self, number: int) -> list[int]:
        self.seen.append(number)
        return self.seen

    def count(self, number: int) -> dict[tuple[int, int], int]:
        self.counts |= {(number, each): 1 for each in range(50)}
        return self.counts

    async def look(self, *arrays: Any) -> list[tuple[int, int]]:
        return [(int(array.min()), int(array.max())) for array in arrays]

    async def look_at(self, nest: Any) -> int:
        return len(nest)

    async def steps(self, count: int, *first: Any) -> AsyncIterator[Any]:
        for array in first:
            yield int(array.min()), int(array.max())
        for _ in range(count):
            self.array += 1
            yield self.array

    async def new(self, nbytes: int) -> Any:
        return np.ones(nbytes, np.uint8)

    async def keep(self, value: Any) -> None:
        self.value = value


class Copies:
    """Counts the copies that are made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made = self.most = 0
        copied = snapshots._copied

        def counted(views: list[memoryview], *, shared: bool) -> memoryview:
            self.made += 1
            memory = copied(views, shared=shared)
            self.most = max(self.most, sum(snapshots._under_way.values()))
            return memory

        monkeypatch.setattr(snapshots, "_copied", counted)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Copies:
    gc.collect()
    monkeypatch.setattr(snapshots, "_under_way", {})
    return Copies(monkeypatch)


def everywhere(array: Any) -> tuple[int, int]:
    return int(array.min()), int(array.max())


def test_plain_results_are_taken_before_the_next_plain_method(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Changing) as actors:
            seen = await asyncio.gather(*(actors[0].see(number) for number in range(100)))
            assert [len(each) for each in seen] == list(range(1, 101))
            counts = await asyncio.gather(*(actors[0].count(number) for number in range(50)))
            assert [len(each) for each in counts] == [50 * number for number in range(1, 51)]
            for size in SIZES:
                await actors[0].hold(size)
                calls = 30 if size < MIB else 6
                got = await asyncio.gather(*(actors[0].step_plainly() for _ in range(calls)))
                assert [everywhere(each) for each in got] == [(k, k) for k in range(1, calls + 1)]

    run(kind, main())


def test_async_results_are_taken_when_they_are_returned(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Changing) as actors:
            for size in SIZES:
                await actors[0].hold(size)
                calls = 30 if size < MIB else 6
                got = await asyncio.gather(*(actors[0].step() for _ in range(calls)))
                assert [everywhere(each["state"][0]) for each in got] == [(k, k) for k in range(1, calls + 1)]

    run(kind, main())


def test_arguments_are_taken_at_the_first_step(kind: str) -> None:
    """Of calls, broadcast calls, maps and streams; also before there is a connection."""

    async def main() -> None:
        for size in SIZES:
            async with team(kind, Changing, 2) as actors:
                array, calls = np.zeros(size // 8, np.int64), []

                async def first_of(stream: Any) -> Any:
                    async with stream as items:
                        return [[tuple(item)] async for item in items]

                async def first_of_each(streams: Any) -> Any:
                    async with streams:
                        return [[tuple(item)] for items in streams async for item in items]

                for number in range(5):
                    array[:] = number
                    for call in (
                        actors[0].look(array),
                        actors.handles.look(array, array[::-1]),
                        actors.handles.look.map([array, array]),
                        first_of(actors[0].steps(0, array)),
                        first_of_each(actors.handles.steps(0, array)),
                    ):
                        calls.append(asyncio.ensure_future(call))
                        await asyncio.sleep(0)
                array[:] = -1
                for at, got in enumerate(await asyncio.gather(*calls)):
                    assert np.unique(np.array(got)).tolist() == [at // 5]

    run(kind, main())


def test_items_are_taken_when_they_are_yielded(kind: str) -> None:
    """Also that which waits because the reader is as far behind as it may be."""

    async def main() -> None:
        async with team(kind, Changing) as actors:
            for size in SIZES:
                await actors[0].hold(size)
                async with actors[0].steps(20) as items:
                    await until(lambda: actors.instances[0].array[0] > 0)
                    await asyncio.sleep(0.05)  # it runs ahead; how far does not matter
                    actors.instances[0].array[:] += 1000
                    ahead = [everywhere(each) async for each in items]
                steps = [low - number for number, (low, _) in enumerate(ahead, 1)]
                assert all(low == high for low, high in ahead)
                assert sorted(steps) == steps
                assert set(steps) <= {0, 1000}
                assert steps[0] == 0

    run(kind, main())


def test_what_is_lent_is_not_copied(kind: str, copies: Copies) -> None:
    """Not in arguments, results and items, nested or not; beside it all is. It arrives as it is where it stays so."""

    async def main() -> None:
        async with team(kind, Changing) as actors:
            await actors[0].hold(2 * MIB)
            array = np.zeros(2 * MIB, np.uint8)
            assert everywhere((await actors[0].step_lent())["state"][0]) == (1, 1)
            assert await actors[0].look_at(lend([{"a": array}, array[5:]])) == 2
            async with actors[0].steps(0, lend(array)) as items:
                assert [item async for item in items] == [(0, 0)]
            assert copies.made == 0
            first = asyncio.ensure_future(actors[0].look(array))
            waits = asyncio.ensure_future(actors[0].look(array, lend(np.flip(array)), lend(array[1:]), array[2:]))
            await asyncio.sleep(0)
            array[:] = 1
            assert await first == [(0, 0)]
            assert await waits == [(0, 0), (0, 0), (1, 1), (0, 0)]

    run(kind, main())


def test_what_nobody_else_holds_is_not_copied(kind: str, copies: Copies) -> None:
    async def main() -> None:
        async with team(kind, Changing, 2) as actors:
            assert everywhere(await actors[0].new(2 * MIB)) == (1, 1)
            assert await actors[0].look(np.ones(2 * MIB, np.uint8)) == [(1, 1)]
            assert await actors[0].look(np.ones(2 * MIB, np.uint8)[MIB:].reshape(8, -1)) == [(1, 1)]
            await actors.handles.look(np.ones(2 * MIB, np.uint8))
            await actors.handles.look.map(np.ones(2 * MIB, np.uint8) for _ in range(2))
            assert await actors[0].look(np.frombuffer(bytes(2 * MIB), np.uint8)) == [(0, 0)]
            block = allocate(2 * MIB)
            await actors[0].look(np.frombuffer(block.memory, np.uint8))
            assert copies.made == 0
            held = np.ones(2 * MIB, np.uint8)
            await actors[0].look(held[MIB:])
            assert copies.made == 1

    run(kind, main())


def test_memory_of_a_store_that_is_not_put_is_copied(kind: str) -> None:
    """Over shared memory it would be read in place for as long as somebody holds it; also where it is lent."""

    async def main() -> None:
        async with team(kind, Changing) as actors:
            memory = arena.arena().allocate(MIB, watch=lambda _: None).memory  # as `TensorStore.empty` does
            actors.instances[0].array = np.frombuffer(memory, np.int64)
            actors.instances[0].array[:] = 0
            got = [await actors[0].step() for _ in range(3)]
            got += [await actors[0].step_lent() for _ in range(3)]
            assert [everywhere(each["state"][0]) for each in got] == [(k, k) for k in range(1, 7)]

    run(kind, main())


def test_receivers_of_a_broadcast_have_one_copy_in_common(kind: str, copies: Copies) -> None:
    async def main() -> None:
        async with team(kind, Changing, 3) as actors:
            array = np.ones(2 * MIB, np.uint8)
            assert await actors.handles.look(array) == [[(1, 1)]] * 3
            assert copies.made == 1
            async with actors.handles.steps(0, array) as streams:
                assert [item for items in streams async for item in items] == [(1, 1)] * 3
            assert copies.made == 2

    run(kind, main())


def test_copies_that_wait_are_bounded(kind: str, copies: Copies, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the arena's limit, and one of each connection in each direction; plain methods wait for room with the next."""
    monkeypatch.setattr(arena, "_arena", arena.Arena(8 * MIB))

    async def main() -> None:
        async with team(kind, Changing) as actors:
            await actors[0].hold(3 * MIB)
            array = np.ones(3 * MIB, np.uint8)
            assert await asyncio.gather(*(actors[0].look(array) for _ in range(12))) == [[(1, 1)]] * 12
            got = await asyncio.gather(*(actors[0].step_plainly() for _ in range(12)))
            assert [everywhere(each) for each in got] == [(k, k) for k in range(1, 13)]
            got = await asyncio.gather(*(actors[0].step() for _ in range(12)))
            assert all(low == high for low, high in (everywhere(each["state"][0]) for each in got))
            assert await actors[0].look(np.ones(12 * MIB, np.uint8), array) == [(1, 1)] * 2
            few = [np.ones(60 << 10, np.uint8) for _ in range(50)]
            assert await asyncio.gather(*(actors[0].look(*few) for _ in range(12))) == [[(1, 1)] * 50] * 12
            assert 3 * MIB < copies.most <= 14 * MIB
            del got
        gc.collect()
        assert not snapshots._under_way

    run(kind, main())


def test_a_cancelled_call_whose_result_has_no_room_frees_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "_arena", arena.Arena(MIB))

    async def main() -> None:
        async with team("memory", Changing) as actors:
            await actors[0].hold(3 * MIB)
            calls = [asyncio.ensure_future(actors[0].step_plainly()) for _ in range(4)]
            assert await asyncio.to_thread(actors.instances[0].reached.wait, 10)
            for call in calls:
                call.cancel()
            async with asyncio.timeout(10):
                assert await actors[0].see(1) == [1]

    run("memory", main())


def test_nothing_of_a_call_stays_when_it_is_over(kind: str, copies: Copies) -> None:
    async def main() -> None:
        async with team(kind, Changing, 2) as actors:
            array = np.ones(2 * MIB, np.uint8)
            await actors[0].hold(2 * MIB)
            await actors.handles.keep(array)
            await actors[0].keep(array)
            await actors[0].step()
            await actors[0].step_plainly()
            assert copies.made == 4
            await actors[0].see(0)  # The last result has left, and so has what carried it.
            assert not snapshots._under_way

    run(kind, main())
