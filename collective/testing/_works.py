"""Checks of Work, of cancelling, and of what a group holds."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

from collective.errors import CollectiveMismatch
from collective.group import Group
from collective.testing._arrays import bits, check_array
from collective.testing._calls import collectives
from collective.testing._cases import check
from collective.testing._world import outcome, refused, turns, until

if TYPE_CHECKING:
    from collective.testing._world import World
    from collective.work import Work


async def _wait(work: Any) -> Any:
    return await work


@check(sizes=(1, 2, 3))
async def works_can_be_awaited_often(world: World) -> None:
    """A Work gives the same result to every await, of several tasks, before and after it is done."""
    works = [group.allreduce(np.ones(2)) for group in world.groups[:-1]]
    waiting = [asyncio.create_task(_wait(work)) for work in works for _ in range(3)]
    await turns()
    assert not any(task.done() for task in waiting)
    works.append(world.groups[-1].allreduce(np.ones(2)))
    waiting.append(asyncio.create_task(_wait(works[-1])))
    for task in waiting:
        check_array(await task, np.full(2, float(world.size)), "numpy")
    for work in works:
        assert await work is await work
        assert await work is work.result()


@check(sizes=(2, 3))
async def works_tell_their_state(world: World) -> None:
    """`done`, `result`, `exception` and `add_done_callback`, before and after."""
    called: list[Work[Any]] = []
    work = world.groups[0].allreduce(np.ones(1))
    work.add_done_callback(called.append)
    assert not work.done()
    refused(asyncio.InvalidStateError, work.result)
    refused(asyncio.InvalidStateError, work.exception)
    await turns()
    assert not called
    others = [group.allreduce(np.ones(1)) for group in world.groups[1:]]
    await work
    await until(lambda: bool(called))
    assert called == [work]
    assert work.done()
    assert work.exception() is None
    work.add_done_callback(called.append)
    assert called == [work], "a callback of a Work that is done is called soon, not at once"
    await until(lambda: len(called) == 2)
    for other in others:
        await other


@check(sizes=(1, 2))
async def wait_stream_waits(world: World) -> None:
    """In host memory there is no stream: after `wait_stream` the result is there."""
    works = [group.allreduce(np.ones(1)) for group in world.groups]
    for work in works:
        await work.wait_stream()
        assert work.done()


@check(sizes=(2, 3))
async def failed_works_raise_every_time(world: World) -> None:
    """A Work that failed raises the same error at every await, and gives it by `exception`."""
    works = [group.allreduce(np.ones(1 + group.rank)) for group in world.groups]
    for work in works:
        first, second = await outcome(work), await outcome(work)
        assert isinstance(first, CollectiveMismatch)
        assert second is first
        assert work.exception() is first
        assert refused(CollectiveMismatch, work.result) is first


@check(sizes=(2, 3))
async def unseen_failures_are_told(world: World) -> None:
    """The loop's exception handler gets a failure that nobody looked at, and none that somebody did."""
    works = [group.allreduce(np.ones(1 + group.rank)) for group in world.groups]
    seen = works.pop()
    await outcome(seen)
    for work in works:
        await until(work.done)
    expected = len(works)
    del works, work, seen
    gc.collect()
    await turns()
    errors = [context.get("exception") for context in world.unseen]
    assert len(errors) == expected, f"the exception handler got {world.unseen}"
    assert all(isinstance(error, CollectiveMismatch) for error in errors)
    world.unseen.clear()


@check(sizes=(1, 2, 3, 4))
async def successes_need_no_looking(world: World) -> None:
    """A Work may be dropped unawaited: its operation takes place all the same."""
    outs = [np.zeros(1) for _ in world.ranks]
    for group, out in zip(world.groups, outs, strict=True):
        group.allreduce(np.ones(1), out=out)
        group.send(np.array([group.rank]), (group.rank + 1) % group.size)
    gc.collect()
    await until(lambda: all(out[0] == world.size for out in outs))
    for result in await world.call(lambda group: group.recv((group.rank - 1) % group.size)):
        assert result.shape == (1,)
    await turns()


@check(sizes=(2, 3))
async def cancelled_await_leaves_the_collective(world: World) -> None:
    """Cancelling the await of any collective, at any time, leaves it in its place; its Work can be awaited again."""
    for length in (2, 300_000):
        for name, issue in collectives(np.ones(length)).items():
            for before_the_others in (True, False):
                work = issue(world.groups[0])
                others = [] if before_the_others else [issue(group) for group in world.groups[1:]]
                waiting = asyncio.create_task(_wait(work))
                await turns(3)
                waiting.cancel()
                await asyncio.wait([waiting])
                others = others or [issue(group) for group in world.groups[1:]]
                result = await work
                for other in others:
                    await other
                if name == "allreduce":
                    check_array(result, np.full(length, float(world.size)), "numpy")
    for result in await world.call(Group.allreduce, np.ones(1)):
        check_array(result, np.full(1, float(world.size)), "numpy")


@check(sizes=(1, 2))
async def timeouts_are_the_callers(world: World) -> None:
    """`asyncio.timeout` around an await raises TimeoutError and leaves the collective in its place."""
    work = world.groups[0].allreduce(np.ones(1)) if world.size > 1 else None
    receiving = world.groups[0].recv(0, tag=4)
    for pending in (work, receiving):
        if pending is not None:
            try:
                async with asyncio.timeout(0.01):
                    await pending
            except TimeoutError:
                continue
            raise AssertionError("the await outlived its deadline")
    if work is not None:
        await world.groups[1].allreduce(np.ones(1))
        check_array(await work, np.full(1, 2.0), "numpy")


@check(sizes=(1, 2, 3))
async def results_and_inputs_are_freed(world: World) -> None:
    """When its Works are done and dropped, an operation holds neither its inputs nor its results."""
    for length in (4, 100_000):
        kept: dict[str, list[weakref.ref[Any]]] = {}
        for name in collectives(np.ones(1)):
            kept[name] = await _references(world, name, length)
        kept["send"] = await _sent(world, length)
        await turns()
        gc.collect()
        held = {name: sum(reference() is not None for reference in references) for name, references in kept.items()}
        assert not any(held.values()), f"of {length} elements, arrays still held: {held}"


async def _references(world: World, name: str, length: int) -> list[weakref.ref[Any]]:
    arrays = [np.ones(length) for _ in world.ranks]
    works = [collectives(array)[name](group) for group, array in zip(world.groups, arrays, strict=True)]
    results = [await work for work in works]
    return [weakref.ref(array) for array in (*arrays, *results) if isinstance(array, np.ndarray)]


async def _sent(world: World, length: int) -> list[weakref.ref[Any]]:
    array = np.ones(length)
    sending = world.groups[0].send(array, world.size - 1)
    result = await world.groups[-1].recv(0)
    await sending
    return [weakref.ref(array), weakref.ref(result)]


@check(sizes=(1, 2, 3))
async def nothing_grows(world: World) -> None:
    """Two thousand operations leave no more objects behind than two hundred."""

    async def some(count: int) -> int:
        for _ in range(count):
            works = [work for group in world.groups for work in _one_of_each(group)]
            for work in works:
                await work
        del works
        await turns()
        gc.collect()
        return len(gc.get_objects())

    await some(20)
    before = await some(20)
    growth = await some(400) - before
    assert growth < 200, f"two thousand operations left {growth} objects more"
    for group in world.groups:
        held = group.statistics()
        assert (held.pending_collectives, held.pending_messages, held.buffered_bytes) == (0, 0, 0), f"it holds {held}"


def _one_of_each(group: Group) -> list[Work[Any]]:
    array = np.ones(3)
    right, left = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    return [
        group.allreduce(array),
        group.allgather(array),
        group.barrier(),
        group.send(array, right),
        group.recv(left),
    ]


@check(sizes=(1, 2, 3))
async def closing_ends_what_is_pending(world: World) -> None:
    """After closing, a group holds nothing: pending Works fail, inputs and buffered messages are freed."""
    group = world.groups[0]
    array = np.ones(100_000)
    inputs = weakref.ref(array)
    last = world.size - 1
    pending: list[Work[Any]] = [group.recv(last, tag=1), group.send(array, last, tag=2)]
    if world.size > 1:
        pending.append(group.allreduce(array))
    message = bits(array[:10])
    await world.groups[-1].send(np.frombuffer(message), 0, tag=3)
    await group.aclose()
    await group.aclose()
    del array
    for work in pending:
        assert isinstance(await outcome(work), Exception)
    del pending, work
    gc.collect()
    assert inputs() is None, "a closed group holds an input"
