"""Checks that a recv which nobody awaits any more leaves its message to the next one."""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING, Any

import numpy as np

from collective.errors import CollectiveTimeout
from collective.testing._arrays import check_array
from collective.testing._calls import works_again
from collective.testing._cases import check
from collective.testing._world import outcome, turns

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from collective.group import Group
    from collective.testing._world import World


def _numbered(number: int, length: int = 16) -> np.ndarray:
    return np.full(length, number)


@check(sizes=(1, 2))
async def a_recv_that_nobody_awaits_is_withdrawn(world: World) -> None:
    """A recv whose await never began, or ended early, leaves the message to the next one: in a batch as well, and where
    the message had come already. Nobody is told of what ended so."""
    sender, receiver = world.groups[0], world.groups[-1]
    for early in (False, True):
        for tag, give_up in enumerate(_WAYS):
            if early:
                await sender.send(_numbered(tag), receiver.rank, tag=tag)
                await turns()
            await give_up(receiver, tag)
            gc.collect()
            await turns()
            if not early:
                await sender.send(_numbered(tag), receiver.rank, tag=tag)
            async with asyncio.timeout(5):
                check_array(await receiver.recv(0, tag=tag), _numbered(tag), "numpy")
            held = receiver.statistics().pending_messages
            assert not held, f"{give_up.__name__}, the message {'there' if early else 'to come'}: {held} recvs stay"


async def _wait_for_no_time(group: Group, tag: int) -> None:
    work = group.recv(0, tag=tag)
    try:
        await asyncio.wait_for(work, 0)
    except TimeoutError:
        assert work.done(), "the recv is still in its place"
        return
    raise AssertionError("it did not time out")


async def _cancel_a_gather(group: Group, tag: int) -> None:
    both = asyncio.gather(group.recv(0, tag=tag), group.recv(0, tag=tag))
    both.cancel()
    await _see_cancelled(both)


async def _cancel_before_the_first_step(group: Group, tag: int) -> None:
    task = asyncio.create_task(_wait(group.recv(0, tag=tag)))
    task.cancel()
    await _see_cancelled(task)


async def _drop(group: Group, tag: int) -> None:
    group.recv(0, tag=tag)


async def _drop_in_a_thread(group: Group, tag: int) -> None:
    held = [group.recv(0, tag=tag)]
    await asyncio.to_thread(held.clear)


async def _cancel_a_batch(group: Group, tag: int) -> None:
    with group.batch() as batch:
        batch.recv(0, tag=99)
        batch.recv(0, tag=tag)
        batch.recv(0, tag=tag)
    task = asyncio.create_task(_wait(batch))
    await turns(3)
    task.cancel()
    await _see_cancelled(task)
    assert "pending" not in repr(batch._works), f"{batch._works}"


async def _drop_a_batch(group: Group, tag: int) -> None:
    with group.batch() as batch:
        batch.recv(0, tag=tag)


async def _cancel_all_of_several_awaits(group: Group, tag: int) -> None:
    work = group.recv(0, tag=tag + 50)
    tasks = [asyncio.create_task(_wait(work)) for _ in range(2)]
    await turns()
    tasks.append(asyncio.create_task(_wait(work)))  # which never begins
    for task in tasks:
        assert not work.done()
        task.cancel()
        await _see_cancelled(task)
    assert work.done(), "the recv is still in its place"


_WAYS = (
    _wait_for_no_time,
    _cancel_a_gather,
    _cancel_before_the_first_step,
    _drop,
    _drop_in_a_thread,
    _cancel_a_batch,
    _drop_a_batch,
    _cancel_all_of_several_awaits,
)


@check(sizes=(1, 2))
async def a_batch_that_fails_withdraws_the_rest(world: World) -> None:
    """`await batch` raises the first error at once; the batch's other recvs are withdrawn, and nothing is unseen."""
    sender, receiver = world.groups[0], world.groups[-1]
    with receiver.batch() as batch:
        batch.recv(0, tag=1)
        batch.recv(0, tag=2, out=np.zeros(3))
        batch.recv(0, tag=3)
    await sender.send(np.zeros(2), receiver.rank, tag=2)
    for _ in range(2):
        async with asyncio.timeout(5):
            assert isinstance(await outcome(batch), ValueError)
    check_array(await receiver.recv(0, tag=2), np.zeros(2), "numpy")
    for tag in (1, 3):
        await sender.send(_numbered(tag), receiver.rank, tag=tag)
        async with asyncio.timeout(5):
            check_array(await receiver.recv(0, tag=tag), _numbered(tag), "numpy")


@check(sizes=(1, 2))
async def a_recv_with_a_callback_is_wanted(world: World) -> None:
    """A recv that is dropped, but has a callback, gets its message; so does one that was seen to be done."""
    sender, receiver = world.groups[0], world.groups[-1]
    came: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    receiver.recv(0).add_done_callback(lambda work: came.set_result(work.result()))
    gc.collect()
    await turns()
    await sender.send(_numbered(1), receiver.rank)
    check_array(await came, _numbered(1), "numpy")
    out = np.zeros_like(_numbered(2))
    work = receiver.recv(0, out=out)
    await sender.send(_numbered(2), receiver.rank)
    while not work.done():  # noqa: ASYNC110 (this is what it is about)
        await asyncio.sleep(0)
    del work
    gc.collect()
    await sender.send(_numbered(3), receiver.rank)
    check_array(await receiver.recv(0), _numbered(3), "numpy")
    check_array(out, _numbered(2), "numpy")


@check(sizes=(1,))
async def recvs_that_are_given_up_together_keep_the_order(world: World) -> None:
    """Messages of several recvs that are cancelled in one turn go to the later recvs in the order of their sends."""
    (group,) = world.groups
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        tasks = [asyncio.create_task(_wait(group.recv(0))) for _ in range(3)]
        await turns()
        following = group.recv(0)
        for number in range(3):
            await group.send(_numbered(number), 0)
        for index in order:
            tasks[index].cancel()
        for task in tasks:
            await _see_cancelled(task)
        for number, work in enumerate([following, group.recv(0), group.recv(0)]):
            check_array(await work, _numbered(number), "numpy")


@check(sizes=(1, 2, 3))
async def a_lone_recv_can_have_a_deadline(world: World) -> None:
    """With `GroupSpec(recv_timeout=...)` a recv raises CollectiveTimeout that names its source, tag and group. It is
    withdrawn, and nothing else is: a message that comes later is the next recv's, and the group goes on."""
    groups = await world.form("deadlines", recv_timeout=0.05)
    sender, receiver = groups[0], groups[-1]
    for length in (16, 1 << 20):
        out = np.zeros(length, int)
        late, other = receiver.recv(0, tag=7, out=out), receiver.recv(0, tag=7)
        for work in (late, other):
            error = await outcome(work)
            assert isinstance(error, CollectiveTimeout), f"got {error!r}"
            assert error.missing == (f"rank 0 ({world.member(0)})",)
            for part in ("src=0", "tag=7", "'deadlines'", "0.05 s", "recv_timeout"):
                assert part in str(error), f"{part} is missing in {error}"
        sending = sender.send(_numbered(5, length), receiver.rank, tag=7)
        check_array(await receiver.recv(0, tag=7), _numbered(5, length), "numpy")
        await sending
        assert not out.any(), "a recv that has timed out was written to"
        with receiver.batch() as batch:
            batch.recv(0, tag=1)
            batch.recv(0, tag=2)
        assert isinstance(await outcome(batch), CollectiveTimeout)
    quick = receiver.recv(0)
    await sender.send(_numbered(1), receiver.rank)
    check_array(await quick, _numbered(1), "numpy")
    await asyncio.sleep(0.1)  # for longer than the deadline, which has gone with the recv
    await works_again(world)


async def _see_cancelled(awaitable: Awaitable[Any]) -> None:
    try:
        await awaitable
    except asyncio.CancelledError:
        return
    raise AssertionError("the await was not cancelled")


async def _wait(awaitable: Awaitable[Any]) -> Any:
    return await awaitable
