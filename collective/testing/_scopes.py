"""Checks of scopes: what is paired with what, in which order it runs, and how a scope ends."""

from __future__ import annotations

import asyncio
import gc
import os
import random
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from collective.errors import CollectiveMismatch, CollectiveTimeout, GroupError, ScopeEnded
from collective.layouts import Layout, Replicate, Shard
from collective.scopes import Call, CallScope
from collective.testing._arrays import check_array
from collective.testing._calls import collectives, unfinished, works_again
from collective.testing._cases import check
from collective.testing._world import attempt, outcome, outcomes, refused, turns, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from collective.group import Group
    from collective.scopes import Key
    from collective.testing._world import World


def parts_of_call(world: World, name: str) -> list[CallScope]:
    """Return each rank's part in a call that reaches all of them."""
    ranks = {member.role: range(world.size) for member in world.groups[0].members}
    ((role, reached),) = ranks.items()
    call = Call(os.urandom(16), name, (role, reached))
    return [CallScope(call, endpoint, f"{name} on rank {rank}") for rank, endpoint in enumerate(world.endpoints)]


@contextmanager
def _calls(parts: list[CallScope]) -> Iterator[list[CallScope]]:
    yield parts
    for part in parts:
        part.finish()


@check(sizes=(1, 2, 3, 4))
async def scopes_run_in_any_order(world: World) -> None:
    """Members call collectives of several scopes, each in an order of its own; every one has its own values."""
    rng = random.Random(world.size)
    keys: list[Key] = ["a", 7, b"raw", ("a", 7), ("a", (b"", 1))]
    for length in (1, 3000):
        works: list[tuple[int, Any]] = []
        for group in world.groups:
            for number in rng.sample(range(len(keys)), len(keys)):
                with group.scope(keys[number]):
                    works += [(number + step, group.allreduce(np.full(length, number + step))) for step in (0, 10)]
        for value, work in works:
            check_array(await work, np.full(length, value * world.size), "numpy")
    await works_again(world)


@check(sizes=(2, 3))
async def every_collective_in_scopes(world: World) -> None:
    """Every collective is paired by its scope, where the first and the last rank call two scopes in opposite orders."""
    x = np.arange(2.0 * world.size)
    expected = {name: await outcomes([call(group) for group in world.groups]) for name, call in collectives(x).items()}
    for name, call in collectives(x).items():
        works: list[tuple[int, Any]] = []
        for group in world.groups:
            keys = ("first", "second") if group.rank else ("second", "first")
            works += [(group.rank, call(group.scope(key))) for key in keys]
        for rank, work in works:
            found, wanted = await work, expected[name][rank]
            pairs = zip(found, wanted, strict=True) if isinstance(wanted, list) else [(found, wanted)]
            for one, other in pairs:
                assert (one is None and other is None) or (one == other).all(), f"{name} in a scope gave {one}"
    await works_again(world)


@check(sizes=(2, 3, 4))
async def calls_never_mix(world: World) -> None:
    """Each call has a scope of its own, whatever the members await between its collectives."""
    rng = random.Random(world.size)
    group_count = 12

    async def answer(group: Group, part: CallScope, value: int) -> None:
        with part:
            for step in range(3):
                await turns(rng.randrange(6))
                total = await group.allreduce(np.array([value + step]))
                check_array(total, np.array([(value + step) * world.size]), "numpy")
            following, before = (group.rank + 1) % world.size, (group.rank - 1) % world.size
            await group.send(np.array([value]), following)
            await turns(rng.randrange(6))
            check_array(await group.recv(before), np.array([value]), "numpy")

    async with asyncio.TaskGroup() as tasks:
        for number in range(group_count):
            with _calls(parts_of_call(world, f"call {number}")) as parts:
                pairs = list(zip(world.groups, parts, strict=True))
                for group, part in rng.sample(pairs, len(pairs)):
                    tasks.create_task(answer(group, part, 100 * number))
    await works_again(world)


@check(sizes=(2, 3))
async def a_part_is_over_with_its_tasks(world: World) -> None:
    """A recv of a call ends once the sender's part is over, and its tasks too; what they have sent arrives."""
    sender, receiver = world.groups[0], world.groups[-1]
    with _calls(parts_of_call(world, "call of one")) as parts:
        go = asyncio.Event()

        async def send_late() -> None:
            await go.wait()
            await sender.send(np.array([5]), receiver.rank)

        with parts[0]:
            late = asyncio.create_task(send_late())
        parts[0].finish()
        with parts[-1]:
            first, second = receiver.recv(0), receiver.recv(0)
            lost = receiver.recv(0, tag=1)
        await turns()
        assert not first.done()
        go.set()
        await late
        check_array(await first, np.array([5]), "numpy")
        for error in await outcomes([second, lost]):
            assert isinstance(error, ScopeEnded), f"got {error!r}"
            assert (error.group, error.rank) == (receiver.name, 0)
    await works_again(world)


@check(sizes=(2, 3))
async def what_a_part_leaves_unread_is_dropped(world: World) -> None:
    """Messages of a call that its receiver has left are dropped, early and late ones; who waits to send one is told."""
    sender, receiver = world.groups[0], world.groups[-1]
    parts = parts_of_call(world, "call of one")
    with parts[0]:
        await sender.send(np.ones(10), receiver.rank)
        large = sender.send(np.ones(2_000_000), receiver.rank)
    await turns()
    parts[-1].finish()
    assert isinstance(await outcome(large), ScopeEnded)
    with parts[0]:
        await sender.send(np.ones(10), receiver.rank)
        late = sender.send(np.ones(2_000_000), receiver.rank)
    assert isinstance(await outcome(late), ScopeEnded)
    parts[0].finish()
    await until(lambda: receiver.statistics().buffered_bytes == 0)
    await works_again(world)


@check(sizes=(2, 3, 4))
async def a_call_that_ends_badly_ends_its_scope_alone(world: World) -> None:
    """Whoever waits in it, or comes later, gets ScopeEnded with rank, operation and line; the group goes on."""
    for rank in world.ranks:
        for name, issue in unfinished(np.ones(8)).items():
            parts, others = parts_of_call(world, "the call"), parts_of_call(world, "another call")
            with parts[rank]:
                left = issue(world.groups[rank])
            waiting = []
            for group in world.groups[1:2] if rank == 0 else world.groups[:1]:
                with parts[group.rank]:
                    waiting += [] if world.size == 2 else [issue(group)]
                    waiting.append(group.recv(rank, tag=9))
            beside = []
            for group in world.groups[:-1]:
                with others[group.rank]:
                    beside.append(group.allreduce(np.ones(2)))
            await turns()
            parts[rank].abandon("it was cancelled")
            await parts[rank].settle()
            for error in await outcomes([left, *waiting]):
                assert isinstance(error, ScopeEnded), f"{name} left by rank {rank} gave {error!r}"
                assert (error.rank, error.cause, error.scope) == (rank, "it was cancelled", "the call")
                assert name in error.operation, f"{name} left by rank {rank}: {error}"
                assert "_calls.py:" in error.line
            for group in world.groups:
                with parts[group.rank]:
                    for error in await outcomes([attempt(group.barrier), attempt(group.recv, 0)]):
                        assert isinstance(error, ScopeEnded), f"after {name} was left, rank {group.rank} got {error!r}"
            with others[-1]:
                beside.append(world.groups[-1].allreduce(np.ones(2)))
            for work in beside:
                check_array(await work, np.full(2, float(world.size)), "numpy")
            await works_again(world)
            assert {group.epoch for group in world.groups} == {0}


@check(sizes=(2, 3))
async def what_was_agreed_completes_though_its_scope_ends(world: World) -> None:
    """A scope ends at any moment of its collectives: each has its result on all, or an error on all that wait."""
    for delay in range(0, 40, 2):
        parts = parts_of_call(world, "the call")
        works = []
        for group, part in zip(world.groups, parts, strict=True):
            with part:
                works.append([group.allreduce(np.full(3 + 50_000 * (step % 2), 1.0)) for step in range(4)])
        await turns(delay)
        parts[delay % world.size].abandon("it was cancelled")
        await parts[delay % world.size].settle()
        ended = [[isinstance(result, ScopeEnded) for result in await outcomes(mine)] for mine in works]
        assert all(mine == ended[0] for mine in ended), f"{delay} turns in, members ended differently: {ended}"
        for mine in works:
            for result in await outcomes(mine):
                if not isinstance(result, ScopeEnded):
                    check_array(result, np.full(len(result), float(world.size)), "numpy")
        await works_again(world)


@check(sizes=(2, 3, 4))
async def a_disagreement_in_a_call_ends_that_alone(world: World) -> None:
    """Members of a call that differ get CollectiveMismatch, every one; so they do where one's call was refused."""
    last = world.groups[-1]
    for refuse in (False, True):
        parts = parts_of_call(world, "the call")
        works = []
        for group, part in zip(world.groups, parts, strict=True):
            with part:
                if group is not last:
                    works.append(group.allreduce(np.ones(2)))
                elif refuse:
                    refused(ValueError, group.reduce, np.ones(2), 17)
                else:
                    works.append(group.barrier())
        for error in await outcomes(works):
            assert isinstance(error, CollectiveMismatch), f"got {error!r}"
        with parts[0]:
            assert isinstance(await outcome(attempt(world.groups[0].barrier)), ScopeEnded)
        await works_again(world)


@check(sizes=(2, 3), timeout=0.6)
async def a_timeout_in_a_call_ends_that_alone(world: World) -> None:
    """CollectiveTimeout says whom a call waits for, and what these wait for in which scope; the group goes on."""
    *present, absent = world.groups
    parts = parts_of_call(world, "the call")
    works = []
    for group in present:
        with parts[group.rank]:
            works.append(group.allreduce(np.ones(2)))
    await asyncio.sleep(0.3)  # so that the other call is not overdue when this one is
    others = parts_of_call(world, "the other call")
    with others[-1]:
        elsewhere = absent.barrier()
    for error in await outcomes(works):
        assert isinstance(error, CollectiveTimeout), f"got {error!r}"
        assert error.missing == (f"rank {absent.rank} ({world.member(absent.rank)})",)
        assert "barrier()" in str(error)
        assert "the other call" in str(error)
    with parts[-1]:
        assert isinstance(await outcome(attempt(absent.allreduce, np.ones(2))), ScopeEnded)
    assert isinstance(await outcome(elsewhere), CollectiveTimeout)
    await works_again(world)
    assert {group.epoch for group in world.groups} == {0}


@check(sizes=(2, 3))
async def two_calls_in_the_default_scope_are_told_apart(world: World) -> None:
    """A second call with a collective in the default scope, where the first has one, is a GroupError at the call."""
    group = world.groups[0]
    first, second = CallScope(name="worker[0].one"), CallScope(name="worker[0].other")
    with first:
        waiting = group.allreduce(np.ones(1))
    with second:
        error = await outcome(attempt(group.barrier))
        assert isinstance(error, GroupError)
        for part in ("worker[0].one", "worker[0].other", "allreduce", "barrier", "scope"):
            assert part in str(error), f"{part} is missing in {error}"
        keyed = group.scope("mine").allreduce(np.ones(2))
    others = [each for other in world.groups[1:] for each in (other, other.scope("mine"))]
    works = [other.allreduce(np.ones(1 + number % 2)) for number, other in enumerate(others)]
    for work in (waiting, keyed, *works):
        assert ((await work) == world.size).all()
    with second:
        again = group.barrier()
    await asyncio.gather(again, *(other.barrier() for other in world.groups[1:]))
    await works_again(world)


@check(sizes=(2, 3))
async def sends_are_paired_by_scope(world: World) -> None:
    """Messages of one source and tag go to the recvs of their own scope, small and large ones, in batches too."""
    sender, receiver = world.groups[0], world.groups[-1]
    for length in (3, 100_000, 1_000_000):
        values = {None: 1.0, "a": 2.0, "b": 3.0, ("a", "b"): 4.0}
        sent = [sender.scope(key).send(np.full(length, value), receiver.rank) for key, value in values.items()]
        for key, value in reversed(values.items()):
            with receiver.scope(key), receiver.batch() as batch:
                batch.recv(0)
            (got,) = await batch
            check_array(got, np.full(length, value), "numpy")
        await asyncio.gather(*sent)
    await works_again(world)


@check(sizes=(2, 3))
async def scopes_of_blocks_and_views(world: World) -> None:
    """A block covers the tasks that it starts, not those beside it; a view is for generators; None is the default."""
    groups = world.groups

    async def later(group: Group) -> Any:
        await turns()
        return await group.allreduce(np.array([1]))

    tasks = []
    for group in groups:
        with group.scope("tasks") as view:
            tasks.append(asyncio.create_task(later(group)))
            tasks.append(asyncio.create_task(later(group.scope(None))))
            assert "tasks" in repr(view)
        if group.rank == 0:
            tasks.append(asyncio.create_task(later(group)))
    tasks += [asyncio.create_task(later(group)) for group in groups[1:]]
    for result in await asyncio.gather(*tasks):
        check_array(result, np.array([world.size]), "numpy")

    async def items(group: Group) -> Any:
        view = group.scope("items")
        for _ in range(3):
            yield await view.allreduce(np.array([2]))

    async def read(group: Group) -> None:
        async for item in items(group):
            check_array(item, np.array([2 * world.size]), "numpy")
            await group.barrier()

    await asyncio.gather(*map(read, groups))
    for key in (1.5, None, True, ["a"], ("a", 1.5), object()):
        if key is not None:
            refused(TypeError, groups[0].scope, key)
    await works_again(world)


@check(sizes=(2, 3))
async def subgroups_and_layouts_in_scopes(world: World) -> None:
    """`split` in a scope makes a group that works in other scopes too; `repartition` is paired by its scope."""
    orders = [("x", "y") if group.rank else ("y", "x") for group in world.groups]
    halves = [[group.scope(key).split(0) for key in keys] for group, keys in zip(world.groups, orders, strict=True)]
    made = [[await work for work in works] for works in halves]
    for group, (first, second) in zip(world.groups, made, strict=True):
        assert first is not None
        assert second is not None
        await turns(group.rank)
    for which in (0, 1):
        pairs = [pair[which] if rank else pair[1 - which] for rank, pair in enumerate(made)]
        results = await asyncio.gather(*(sub.allreduce(np.array([which])) for sub in pairs if sub is not None))
        for result in results:
            check_array(result, np.array([which * world.size]), "numpy")
        await asyncio.gather(*(sub.aclose() for sub in pairs if sub is not None))
    size = world.size
    rows, whole = Layout((2 * size, 3), size, [Shard(0)]), Layout((2 * size, 3), size, [Replicate()])
    works = []
    for group in world.groups:
        for key in ("p", "q") if group.rank else ("q", "p"):
            mine = np.full((2, 3), group.rank + (10.0 if key == "q" else 0.0))
            works.append((key, group.scope(key).repartition(mine, rows, whole)))
    for key, work in works:
        expected = np.repeat(np.arange(size) + (10.0 if key == "q" else 0.0), 2)[:, None] * np.ones((1, 3))
        check_array(await work, expected, "numpy")
    await works_again(world)


@check(sizes=(2, 3))
async def scopes_leave_nothing_behind(world: World) -> None:
    """Many scopes, finished and ended ones, leave nothing that grows in a group."""

    async def use(number: int) -> int:
        with _calls(parts_of_call(world, f"call {number}")) as parts:
            works: list[Any] = []
            for group, part in zip(world.groups, parts, strict=True):
                with part:
                    works += [group.allreduce(np.ones(1)), group.scope(number).barrier()]
                    works.append(group.recv(group.rank) if number % 3 == 0 else group.barrier())
            if number % 3 == 0:
                parts[-1].abandon("it failed")
            await outcomes(works)
            for part in parts:
                await part.settle()
        del works, parts, part
        gc.collect()
        return sum(type(each) is CallScope for each in gc.get_objects())

    held = [await use(number) for number in range(30)]
    assert max(held[20:]) < 10, f"parts of calls stay: {held}"  # of 90; some are in what is under way
    for group in world.groups:
        assert group.statistics().pending_collectives == 0
        assert group.statistics().pending_messages == 0
    await works_again(world)
