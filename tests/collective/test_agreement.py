"""Agreement and rounds alone, over a network that delays each pair's messages as it likes but keeps their order."""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from contextlib import closing, contextmanager
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collective._core import tree
from collective._core.agreement import Agreement, Record
from collective._core.cards import QUIET, Cards
from collective._core.operations import Barrier
from collective._core.pipeline import Pending
from collective._core.rounds import Rounds
from collective.scopes import DEFAULT, Ending, Scope

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator, Sequence

    from collective._core.agreement import Announcing


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


class Bell:
    """A data plane that can only exchange cards, of which each member learns when it pleases."""

    def __init__(self, size: int, loop: asyncio.AbstractEventLoop, rng: random.Random) -> None:
        self.size, self.loop, self.rng = size, loop, rng
        self.shown: dict[int, dict[int, bytes]] = {}
        self.done: dict[int, dict[int, asyncio.Future[list[bytes]]]] = {}
        self.ready: list[Callable[[], None]] = []

    def member(self, rank: int) -> Any:
        numbers = count()

        def exchange(card: bytes, head: int, on_misfit: Callable[[], None]) -> asyncio.Future[list[bytes]]:
            number = next(numbers)
            shown = self.shown.setdefault(number, {})
            if any(other[:head] != card[:head] for other in shown.values()):
                self.ready.append(on_misfit)
            shown[rank] = card
            waiting = self.done.setdefault(number, {})
            waiting[rank] = self.loop.create_future()
            if len(shown) == self.size:
                cards = [shown[other] for other in range(self.size)]
                self.ready += [partial(future.set_result, cards) for future in waiting.values()]
            return waiting[rank]

        return SimpleNamespace(exchange=exchange)

    def step(self) -> bool:
        if not self.ready:
            return False
        self.ready.pop(self.rng.randrange(len(self.ready)))()
        return True


class World:
    """Members that announce records in scopes, and note what they are told."""

    def __init__(self, size: int, rng: random.Random, kind: str, loop: asyncio.AbstractEventLoop) -> None:
        self.size, self.rng, self.loop = size, rng, loop
        self.network = Network(lambda src, dst, message: self.members[dst].hear(message))
        self.bell = Bell(size, loop, rng)
        self.later: list[Callable[[], None]] = []
        self.heard = [Heard(self, rank) for rank in range(size)]
        self.members: list[Announcing] = [self.member(rank, kind) for rank in range(size)]

    def member(self, rank: int, kind: str) -> Announcing:
        post = partial(self.network.post, rank)
        if kind == "links":
            return Agreement(rank, self.size, loop=self.loop, post=post, listener=self.heard[rank])
        plane = self.bell.member(rank)
        return Cards(rank, self.size, loop=self.loop, plane=plane, post=post, listener=self.heard[rank])

    def announce(self, rank: int, said: Said) -> None:
        if said.scope.root in self.heard[rank].ended:
            return
        barrier = Barrier(rank, self.size)
        barrier.meta = said.meta
        pending = Pending(0, said.scope, said.record, barrier, NO_WORK)
        self.heard[rank].pending.append(pending)
        self.members[rank].announce(pending)

    def end(self, rank: int, scope: Scope) -> None:
        """End a scope at a member, which tells all, as an engine does."""
        if scope.root in self.heard[rank].ended:
            return
        self.heard[rank].ended.add(scope.root)
        self.members[rank].end_scope(scope.root, Ending(rank, f"rank {rank}", "", "", "for the test"))
        for other in range(self.size):
            if other != rank:
                self.later.append(partial(self.end, other, scope))

    def step(self) -> bool:
        kinds = [partial(self.network.step, self.rng), self.bell.step, self._step_later, self._turn]
        self.rng.shuffle(kinds)
        return any(step() for step in kinds)

    def run(self) -> None:
        while self.step():
            pass

    def _step_later(self) -> bool:
        if not self.later:
            return False
        self.later.pop(0)()
        return True

    def _turn(self) -> bool:
        """Let the callbacks of futures run."""
        if not self.loop._ready:  # type: ignore[attr-defined]  # nothing public says whether anything waits
            return False
        self.loop.call_soon(self.loop.stop)
        self.loop.run_forever()
        return True


class Said(NamedTuple):
    scope: Scope
    record: Record
    meta: Any = None


class Heard:
    """What a member was told."""

    def __init__(self, world: World, rank: int) -> None:
        self.world, self.rank = world, rank
        self.pending: list[Pending] = []
        self.agreed: list[tuple[bytes, str, Any]] = []
        self.refused: list[tuple[bytes, Any]] = []
        self.withdrawn: list[Pending] = []
        self.ended: set[bytes] = set()

    def on_agreed(self, pending: Pending, metas: Any, briefs: Any = None) -> None:
        self.pending.remove(pending)
        self.agreed.append((pending.scope.bytes, pending.record.what, metas))
        self.world.later.append(partial(self.world.members[self.rank].issued, pending))

    def on_mismatch(self, pending: Pending | None, scope: bytes, calls: Any) -> None:
        self.refused.append((scope, calls))
        self._drop([each for each in self.pending if each.scope.root == scope[:16]])
        self.ended.add(scope[:16])

    def on_scope_ended(self, root: bytes, ending: Any) -> None:
        self.ended.add(root)
        self._drop([each for each in self.pending if each.scope.root == root])

    def on_withdrawn(self, withdrawn: Any, ending: Any) -> None:
        self._drop(withdrawn)

    def on_failure(self, pending: Pending, error: BaseException) -> None:
        raise AssertionError(f"{pending} failed with {error!r}")

    def _drop(self, dropped: Any) -> None:
        for pending in dropped:
            self.pending.remove(pending)
            self.withdrawn.append(pending)


@contextmanager
def opened(size: int, rng: random.Random, kind: str) -> Iterator[World]:
    with closing(asyncio.new_event_loop()) as loop:
        yield World(size, rng, kind, loop)


def record(what: str, *, failed: bool = False) -> Record:
    return Record(hashlib.blake2b(what.encode(), digest_size=16).digest(), what, "here", failed)


def scope(name: str) -> Scope:
    root = hashlib.blake2b(name.encode(), digest_size=16).digest()
    return Scope(root, root, name)


def drive(world: World, script: list[list[Said]], ends: Sequence[tuple[int, Scope]] = ()) -> None:
    """Let each member announce its script in order, and end scopes, at any moment between deliveries."""
    rng = world.rng
    todo: list[deque[Callable[[], None]]] = [
        deque(partial(world.announce, rank, said) for said in lines) for rank, lines in enumerate(script)
    ]
    for rank, ended in ends:
        todo[rank].insert(rng.randrange(len(todo[rank]) + 1), partial(world.end, rank, ended))
    while any(todo):
        rng.choice([lines for lines in todo if lines]).popleft()()
        for _ in range(rng.randrange(4)):
            world.step()
    world.run()


def shuffled(rng: random.Random, lines: list[list[Said]]) -> list[Said]:
    """Merge the programs of several scopes as one member may run them: each in its order."""
    queues = [deque(each) for each in lines]
    merged = []
    while any(queues):
        merged.append(rng.choice([queue for queue in queues if queue]).popleft())
    return merged


NO_WORK: Any = SimpleNamespace()
KINDS = pytest.mark.parametrize("kind", ["links", "cards"])
drawn = settings(max_examples=60, deadline=None)
rngs = st.randoms(use_true_random=False)


@KINDS
@drawn
@given(size=st.integers(1, 30), places=st.integers(1, 5), rng=rngs)
def test_all_agree_in_order_of_places(kind: str, size: int, places: int, rng: random.Random) -> None:
    with opened(size, rng, kind) as world:
        drive(world, [[Said(DEFAULT, record(f"{p}"), (rank, p)) for p in range(places)] for rank in range(size)])
        expected = [(DEFAULT.bytes, f"{p}", [(rank, p) for rank in range(size)]) for p in range(places)]
        assert [heard.agreed for heard in world.heard] == [expected] * size


@KINDS
@settings(max_examples=150, deadline=None)
@given(size=st.integers(1, 12), scopes=st.integers(1, 5), places=st.integers(1, 6), rng=rngs)
def test_scopes_never_mix_and_never_wait_for_each_other(
    kind: str, size: int, scopes: int, places: int, rng: random.Random
) -> None:
    """Whatever the order in which members call different scopes, all of it is agreed, in one order on all."""
    names = [scope(f"scope {number}") for number in range(scopes)]
    with opened(size, rng, kind) as world:
        programs = [[[Said(s, record("x"), (s.name, p, r)) for p in range(places)] for s in names] for r in range(size)]
        drive(world, [shuffled(rng, programs[rank]) for rank in range(size)])
        orders = [heard.agreed for heard in world.heard]
        assert all(order == orders[0] for order in orders)
        for s in names:
            mine = [metas for of, _, metas in orders[0] if of == s.bytes]
            assert mine == [[(s.name, place, rank) for rank in range(size)] for place in range(places)]
        assert not any(heard.pending for heard in world.heard)


@KINDS
@settings(max_examples=150, deadline=None)
@given(size=st.integers(1, 10), scopes=st.integers(2, 5), places=st.integers(1, 4), rng=rngs)
def test_a_scope_that_ends_ends_alike_on_all_and_leaves_the_others(
    kind: str, size: int, scopes: int, places: int, rng: random.Random
) -> None:
    """What was agreed of it was agreed on all; what was not is withdrawn on all; other scopes lose nothing."""
    names = [scope(f"scope {number}") for number in range(scopes)]
    doomed = names[: rng.randrange(1, scopes)]
    with opened(size, rng, kind) as world:
        script = [
            shuffled(rng, [[Said(s, record("x"), (s.name, p)) for p in range(places)] for s in names])
            for _ in range(size)
        ]
        drive(world, script, [(rng.randrange(size), s) for s in doomed])
        orders = [heard.agreed for heard in world.heard]
        assert all(order == orders[0] for order in orders)
        for s in names[len(doomed) :]:
            assert len([of for of, *_ in orders[0] if of == s.bytes]) == places
        assert not any(heard.pending for heard in world.heard), "somebody waits for ever"


@KINDS
@drawn
@given(size=st.integers(2, 30), places=st.integers(1, 4), odd=st.integers(0, 1000), rng=rngs)
def test_one_that_differs_is_named_on_all(kind: str, size: int, places: int, odd: int, rng: random.Random) -> None:
    with opened(size, rng, kind) as world:
        place, stranger = odd % places, odd % size
        script = [
            [Said(DEFAULT, record("y" if (rank, p) == (stranger, place) else "x")) for p in range(places)]
            for rank in range(size)
        ]
        drive(world, script)
        others = [rank for rank in range(size) if rank != stranger]
        calls = sorted([(others, "x at here"), ([stranger], "y at here")])
        assert [heard.refused for heard in world.heard] == [[(DEFAULT.bytes, calls)]] * size
        assert all(len(heard.agreed) == place for heard in world.heard)


@KINDS
@drawn
@given(size=st.integers(2, 8), rng=rngs)
def test_a_disagreement_in_a_scope_ends_that_alone(kind: str, size: int, rng: random.Random) -> None:
    first, second = scope("first"), scope("second")
    with opened(size, rng, kind) as world:
        script = [
            shuffled(rng, [[Said(first, record("y" if rank else "x"))], [Said(second, record("z"))] * 3])
            for rank in range(size)
        ]
        drive(world, script)
        assert all(len(heard.agreed) == 3 for heard in world.heard)
        assert all([of for of, _ in heard.refused] == [first.bytes] for heard in world.heard)


@KINDS
@pytest.mark.parametrize("size", [2, 9, 10, 30])
def test_a_failed_call_is_told_without_the_others(kind: str, size: int, random_: random.Random) -> None:
    with opened(size, random_, kind) as world:
        world.announce(size - 1, Said(DEFAULT, record("bad", failed=True)))
        world.run()
        told = [(DEFAULT.bytes, [([size - 1], "bad at here")])]
        assert [heard.refused for heard in world.heard] == [told] * size


def test_cards_are_shown_again_once_all_call_in_one_order(random_: random.Random) -> None:
    with opened(3, random_, "cards") as world:
        first, second = scope("first"), scope("second")
        orders = [first, second], [second, first], [first, second]
        drive(world, [[Said(s, record("x")) for s in order] for order in orders])
        exchanges = len(world.bell.shown)
        over_links = 0
        while len(world.bell.shown) == exchanges:
            assert over_links <= QUIET, "cards are never shown again"
            drive(world, [[Said(first, record("x"))]] * 3)
            over_links += 1
        assert over_links >= QUIET - 1
        assert all(len(heard.agreed) == over_links + 2 for heard in world.heard)


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
