"""Agreement and rounds alone, over a network that delays each pair's messages as it likes but keeps their order."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collective._core import tree
from collective._core.agreement import Agreement, Record
from collective._core.rounds import Rounds

if TYPE_CHECKING:
    import random


class Network:
    """Queues of undelivered messages, one a (source, destination)."""

    def __init__(self, deliver: Any) -> None:
        self.queues: dict[tuple[int, int], deque[tuple[Any, ...]]] = {}
        self.deliver = deliver

    def post(self, src: int, dst: int, message: tuple[Any, ...]) -> None:
        self.queues.setdefault((src, dst), deque()).append(message)

    def step(self, rng: random.Random) -> bool:
        waiting = [pair for pair, queue in self.queues.items() if queue]
        if not waiting:
            return False
        src, dst = rng.choice(waiting)
        self.deliver(src, dst, self.queues[src, dst].popleft())
        return True

    def run(self, rng: random.Random) -> None:
        while self.step(rng):
            pass


class World:
    """Members that announce records and note verdicts."""

    def __init__(self, size: int, loop: asyncio.AbstractEventLoop) -> None:
        self.agreed: list[list[tuple[int, Any]]] = [[] for _ in range(size)]
        self.refused: list[tuple[int, Any] | None] = [None] * size
        self.network = Network(lambda src, dst, message: self.members[dst].hear(message))
        self.members = [self.member(rank, size, loop) for rank in range(size)]

    def member(self, rank: int, size: int, loop: asyncio.AbstractEventLoop) -> Agreement:
        def refuse(place: int, calls: Any) -> None:
            assert self.refused[rank] is None
            self.refused[rank] = (place, calls)

        return Agreement(
            rank,
            size,
            loop=loop,
            post=lambda dst, message: self.network.post(rank, dst, message),
            on_agreed=lambda place, metas: self.agreed[rank].append((place, metas)),
            on_mismatch=refuse,
        )


def record(what: str, *, failed: bool = False) -> Record:
    return Record(what.encode(), what, "here", failed)


def drive(world: World, script: list[list[tuple[int, Record, Any]]], rng: random.Random) -> None:
    """Let each member announce its script in order, at any moment between deliveries."""
    todo = [deque(lines) for lines in script]
    while any(todo):
        rank = rng.choice([rank for rank, lines in enumerate(todo) if lines])
        world.members[rank].announce(*todo[rank].popleft())
        for _ in range(rng.randrange(4)):
            world.network.step(rng)
    world.network.run(rng)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 30), places=st.integers(1, 5), rng=st.randoms(use_true_random=False))
def test_all_agree_in_order_of_places(size: int, places: int, rng: random.Random) -> None:
    with closing(asyncio.new_event_loop()) as loop:
        world = World(size, loop)
        drive(world, [[(p, record("x"), (rank, p)) for p in range(places)] for rank in range(size)], rng)
        expected = [(place, [(rank, place) for rank in range(size)]) for place in range(places)]
        assert world.agreed == [expected] * size
        assert world.refused == [None] * size


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(2, 30), places=st.integers(1, 4), odd=st.integers(0, 1000), rng=st.randoms(use_true_random=False)
)
def test_one_that_differs_is_named_on_all(size: int, places: int, odd: int, rng: random.Random) -> None:
    with closing(asyncio.new_event_loop()) as loop:
        world = World(size, loop)
        place, stranger = odd % places, odd % size
        script = [
            [(p, record("y" if (rank, p) == (stranger, place) else "x"), None) for p in range(places)]
            for rank in range(size)
        ]
        drive(world, script, rng)
        others = [rank for rank in range(size) if rank != stranger]
        calls = sorted([(others, "x at here"), ([stranger], "y at here")])
        assert world.refused == [(place, calls)] * size
        assert all([number for number, _ in agreed] == list(range(place)) for agreed in world.agreed)


@pytest.mark.parametrize("size", [2, 9, 10, 30])
def test_a_failed_call_is_told_without_the_others(size: int, random_: random.Random) -> None:
    with closing(asyncio.new_event_loop()) as loop:
        world = World(size, loop)
        world.members[size - 1].announce(0, record("bad", failed=True))
        world.network.run(random_)
        assert world.refused == [(0, [([size - 1], "bad at here")])] * size


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 40), rng=st.randoms(use_true_random=False))
def test_nobody_passes_a_round_before_all_have_come(size: int, rng: random.Random) -> None:
    async def main() -> None:
        network = Network(lambda src, dst, message: members[dst].hear(message))
        loop = asyncio.get_running_loop()
        members = [
            Rounds(rank, size, loop=loop, post=lambda dst, message, rank=rank: network.post(rank, dst, message))
            for rank in range(size)
        ]
        order = rng.sample(range(size), size)
        tasks = []
        for rank in order:
            assert not any(task.done() for task in tasks)
            tasks.append(loop.create_task(members[rank].join("open", 3)))
            await asyncio.sleep(0)
            network.run(rng)
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)

    asyncio.run(main())


def test_a_round_that_a_member_gave_up_is_not_waited_for_again(random_: random.Random) -> None:
    async def main() -> None:
        network = Network(lambda src, dst, message: members[dst].hear(message))
        loop = asyncio.get_running_loop()
        members = [
            Rounds(rank, 2, loop=loop, post=lambda dst, message, rank=rank: network.post(rank, dst, message))
            for rank in range(2)
        ]
        early = loop.create_task(members[1].join("reset", 1))
        await asyncio.sleep(0)
        early.cancel()
        network.run(random_)
        await members[0].join("reset", 1)
        network.run(random_)
        await members[1].join("reset", 1)

    asyncio.run(main())


@pytest.mark.parametrize("size", [1, 2, 8, 9, 10, 73, 74, 500])
def test_the_tree_spans_all_ranks_once(size: int) -> None:
    seen = [0]
    for rank in seen:
        for child in tree.children(rank, size):
            assert tree.parent(child) == rank
            seen.append(child)
    assert sorted(seen) == list(range(size))
    assert tree.subtree_size(0, size) == size
    for rank in range(size):
        below = [rank]
        for one in below:
            below.extend(tree.children(one, size))
        assert tree.subtree_size(rank, size) == len(below)


@pytest.fixture
def random_() -> random.Random:
    import random

    return random.Random(7)
