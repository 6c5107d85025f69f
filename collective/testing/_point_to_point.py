"""Checks of send, recv and batch."""

from __future__ import annotations

import asyncio
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from collective.group import Group
from collective.testing._arrays import DTYPES, FORMS, check_array, sample
from collective.testing._cases import MIXES, check
from collective.testing._world import outcome, outcomes, refused, turns

if TYPE_CHECKING:
    from collective.testing._world import World

SMALL, LARGE = 16, 1 << 17
"""Elements of 8 bytes: what a send buffers, and what it does not."""
_SHAPES = ((4, 3), (5,), (0, 3), (), (1 << 14, 3))


def _numbered(number: int, length: int = SMALL) -> np.ndarray:
    return np.full(length, number, np.int64)


@check(mixes=MIXES)
async def every_pair(world: World) -> None:
    """Between every two ranks and to oneself: every dtype and shape, forms taking turns, in the sender's kind."""
    turn = count()
    for src in world.ranks:
        for dst in world.ranks:
            values = [sample(shape, dtype, src) for shape in _SHAPES for dtype in DTYPES]
            sending = [
                world.groups[src].send(world.make(src, array, FORMS[next(turn) % len(FORMS)]), dst) for array in values
            ]
            for array in values:
                check_array(await world.groups[dst].recv(src), array, world.kinds[src])
            assert await outcomes(sending) == [None] * len(sending)


@check(mixes=MIXES)
async def recv_comes_first(world: World) -> None:
    """A recv may be called long before its send, and gives the same."""
    for length in (SMALL, LARGE):
        receiving = [world.groups[dst].recv(src, tag=dst) for src in world.ranks for dst in world.ranks]
        await turns()
        assert not any(work.done() for work in receiving)
        sending = [
            world.groups[src].send(world.make(src, _numbered(10 * src + dst, length)), dst, tag=dst)
            for src in world.ranks
            for dst in world.ranks
        ]
        for index, work in enumerate(receiving):
            src, dst = divmod(index, world.size)
            check_array(await work, _numbered(10 * src + dst, length), world.kinds[src])
        for sent in sending:
            await sent


@check()
async def order_within_a_tag(world: World) -> None:
    """Messages of one source, destination and tag arrive in order, large ones among small ones."""
    sender, receiver = world.groups[0], world.groups[-1]
    lengths = [LARGE if number % 5 == 2 else SMALL for number in range(30)]
    sending = [sender.send(_numbered(number, length), receiver.rank) for number, length in enumerate(lengths)]
    for number, length in enumerate(lengths):
        check_array(await receiver.recv(0), _numbered(number, length), "numpy")
    assert await outcomes(sending) == [None] * len(sending)
    receiving = [receiver.recv(0) for _ in lengths]
    sending = [sender.send(_numbered(number, length), receiver.rank) for number, length in enumerate(lengths)]
    for number, (work, length) in enumerate(zip(receiving, lengths, strict=True)):
        check_array(await work, _numbered(number, length), "numpy")
    assert await outcomes(sending) == [None] * len(sending)


@check()
async def tags_are_independent(world: World) -> None:
    """Tags can be received in any order, past large sends and recvs of other tags that wait."""
    sender, receiver = world.groups[0], world.groups[-1]
    tags = (0, 1, 7, 1 << 40, -3)
    sending = [
        sender.send(_numbered(number, LARGE if tag == 1 else SMALL), receiver.rank, tag=tag)
        for number in range(4)
        for tag in tags
    ]
    idle = receiver.recv(0, tag=99)
    for tag in reversed(tags):
        for number in range(4):
            expected = _numbered(number, LARGE if tag == 1 else SMALL)
            check_array(await receiver.recv(0, tag=tag), expected, "numpy")
    for work in sending:
        await work
    assert not idle.done()
    await sender.send(_numbered(5), receiver.rank, tag=99)
    check_array(await idle, _numbered(5), "numpy")


@check()
async def messages_and_collectives_are_independent(world: World) -> None:
    """Neither a waiting recv nor a large send that nobody receives holds up a collective, nor a collective them."""
    sender, receiver = world.groups[0], world.groups[-1]
    idle = receiver.recv(0, tag=1)
    sending = sender.send(_numbered(1, LARGE), receiver.rank, tag=2)
    await world.call(Group.barrier)
    early = sender.barrier()
    check_array(await receiver.recv(0, tag=2), _numbered(1, LARGE), "numpy")
    await sending
    assert world.size == 1 or not early.done()
    for work in [group.barrier() for group in world.groups[1:]]:
        await work
    await early
    assert not idle.done()
    await sender.send(_numbered(3), receiver.rank, tag=1)
    check_array(await idle, _numbered(3), "numpy")


@check(sizes=(2, 3, 4))
async def sources_are_independent(world: World) -> None:
    """A recv takes from its own source only."""
    receiver = world.groups[0]
    receiving = [receiver.recv(src) for src in world.ranks]
    for src in reversed(world.ranks):
        await turns()
        assert not receiving[src].done()
        await world.groups[src].send(_numbered(src), 0)
        check_array(await receiving[src], _numbered(src), "numpy")


@check(mixes=MIXES)
async def everybody_to_everybody(world: World) -> None:
    """All ranks send to all at once, large messages too, each in a task of its own."""

    async def program(group: Group) -> None:
        sending = [
            group.send(world.make(group.rank, _numbered(number, length)), dst)
            for number, length in enumerate((SMALL, LARGE, SMALL))
            for dst in world.ranks
        ]
        for src in world.ranks:
            for number, length in enumerate((SMALL, LARGE, SMALL)):
                check_array(await group.recv(src), _numbered(number, length), world.kinds[src])
        for work in sending:
            await work

    await world.each(program)


@check(mixes=MIXES)
async def recv_into_out(world: World) -> None:
    """A recv fills a contiguous or strided `out` of any library and returns it."""
    sender, receiver = world.groups[0], world.groups[-1]
    for length in (0, SMALL, LARGE):
        for form in ("contiguous", "strided"):
            values = sample((length,), "float64", length)
            out = world.make(receiver.rank, np.zeros_like(values), form)
            receiving = receiver.recv(0, out=out)
            sending = sender.send(world.make(0, values), receiver.rank)
            assert await receiving is out
            check_array(out, values, world.kinds[receiver.rank])
            await sending


@check(mixes=MIXES)
async def batch_exchanges(world: World) -> None:
    """What a batch collected is issued together; awaiting it gives each call's result, in order, more than once."""

    async def program(group: Group) -> None:
        right, left = (group.rank + 1) % group.size, (group.rank - 1) % group.size
        out = np.zeros(SMALL, np.int64)
        with group.batch() as batch:
            batch.send(world.make(group.rank, _numbered(group.rank, LARGE)), right, tag=5)
            batch.recv(left, tag=5)
            batch.send(_numbered(-group.rank), left, tag=6)
            batch.recv(right, tag=6, out=out)
        for _ in range(2):
            sent, received, also_sent, filled = await batch
            assert (sent, also_sent) == (None, None)
            check_array(received, _numbered(left, LARGE), world.kinds[left])
            assert filled is out
            check_array(out, _numbered(-right), "numpy")
        with group.batch() as empty:
            pass
        assert await empty == []

    await world.each(program)


@check(sizes=(1, 2))
async def batch_checks_its_calls(world: World) -> None:
    """Bad arguments raise at the call inside the batch; a batch that is left by an error issues nothing."""
    group = world.groups[0]
    dst = world.size - 1
    with group.batch() as batch:
        refused(ValueError, batch.send, np.ones(1), world.size)
        refused(ValueError, batch.recv, -1)
        refused(TypeError, batch.send, [1.0], dst)
    assert await batch == []
    try:
        with group.batch() as broken:
            broken.send(_numbered(1), dst)
            raise LookupError
    except LookupError:
        pass
    await group.send(_numbered(2), dst)
    check_array(await world.groups[dst].recv(0), _numbered(2), "numpy")


@check(sizes=(1, 2, 3))
async def cancelled_recv_is_withdrawn(world: World) -> None:
    """Cancelling the only await of a recv that nothing matched withdraws it: the message goes to the next one."""
    sender, receiver = world.groups[0], world.groups[-1]
    for length in (SMALL, LARGE):
        withdrawn = receiver.recv(0)
        waiting = asyncio.create_task(_receive(withdrawn))
        await turns()
        waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled()
        assert withdrawn.done(), "the recv is still in its place"
        sending = sender.send(_numbered(4, length), receiver.rank)
        check_array(await receiver.recv(0), _numbered(4, length), "numpy")
        await sending


@check(sizes=(1, 2))
async def recv_with_another_await_stays(world: World) -> None:
    """Cancelling one of several awaits of a recv withdraws nothing."""
    sender, receiver = world.groups[0], world.groups[-1]
    work = receiver.recv(0)
    one, other = asyncio.create_task(_receive(work)), asyncio.create_task(_receive(work))
    await turns()
    one.cancel()
    await turns()
    assert not work.done()
    await sender.send(_numbered(6), receiver.rank)
    check_array(await other, _numbered(6), "numpy")
    check_array(await work, _numbered(6), "numpy")


@check(sizes=(1, 2))
async def cancelled_recv_loses_nothing(world: World) -> None:
    """Whenever the only await of a recv is cancelled, its message is its own or the next recv's, once and in order."""
    sender, receiver = world.groups[0], world.groups[-1]
    for length in (SMALL, LARGE):
        for delay in range(40):
            sending = [sender.send(_numbered(number, length), receiver.rank) for number in range(3)]
            waiting = asyncio.create_task(_receive_from(receiver))
            await turns(delay)
            waiting.cancel()
            await asyncio.wait([waiting])
            received = [] if waiting.cancelled() else [waiting.result()]
            received += [await receiver.recv(0) for _ in range(3 - len(received))]
            for number, array in enumerate(received):
                check_array(array, _numbered(number, length), "numpy")
            for work in sending:
                await work


@check(sizes=(1, 2))
async def cancelled_recv_leaves_its_out(world: World) -> None:
    """Once the only await of a recv was cancelled, its `out` is the caller's again: nothing is written to it."""
    sender, receiver = world.groups[0], world.groups[-1]
    values = _numbered(1, 8 * LARGE)
    for delay in range(1, 30, 3):
        out = np.zeros_like(values)
        sending = sender.send(values, receiver.rank)
        waiting = asyncio.create_task(_receive(receiver.recv(0, out=out)))
        await turns(delay)
        waiting.cancel()
        await asyncio.wait([waiting])
        if waiting.cancelled():
            out[...] = -1
            check_array(await receiver.recv(0), values, "numpy")
            assert (out == -1).all(), f"the out of a recv that was cancelled after {delay} turns was written"
        await sending


@check(sizes=(1, 2))
async def floods_are_bounded(world: World) -> None:
    """Sends that nobody receives stop being buffered at some tens of MiB; all of them arrive, in order."""
    sender, receiver = world.groups[0], world.groups[-1]
    array = np.zeros(64 << 10, np.uint8)
    sending = [sender.send(array, receiver.rank) for _ in range(600)]
    sending.append(sender.send(array[:5], receiver.rank))
    await turns(100)
    held = receiver.statistics().buffered_bytes
    assert held <= 32 << 20, f"{held} bytes are buffered for a receiver that asked for none"
    assert not all(work.done() for work in sending)
    for _ in range(600):
        assert len(await receiver.recv(0)) == len(array)
    assert len(await receiver.recv(0)) == 5
    assert await outcomes(sending) == [None] * len(sending)
    assert receiver.statistics().buffered_bytes == 0


@check(sizes=(1, 2))
async def cancelled_send_stays(world: World) -> None:
    """Cancelling the await of a large send leaves it in its place: it can be received, and awaited again."""
    sender, receiver = world.groups[0], world.groups[-1]
    work = sender.send(_numbered(8, LARGE), receiver.rank)
    waiting = asyncio.create_task(_receive(work))
    await turns()
    waiting.cancel()
    await asyncio.wait([waiting])
    check_array(await receiver.recv(0), _numbered(8, LARGE), "numpy")
    await work


@check(sizes=(1, 2, 3))
async def bad_messages_are_refused(world: World) -> None:
    """Ranks out of range, tags that are no ints and things that are no arrays raise at the call, and break nothing."""
    group = world.groups[-1]
    good = np.ones(2)
    for rank in (-1, world.size):
        refused(ValueError, group.send, good, rank)
        refused(ValueError, group.recv, rank)
    for nonsense in ("0", None, 0.5):
        refused(TypeError, group.send, good, nonsense)
        refused(TypeError, group.send, good, 0, tag=nonsense)
        refused(TypeError, group.recv, nonsense)
        refused(TypeError, group.recv, 0, tag=nonsense)
    refused(TypeError, group.send, [1.0], 0)
    refused(TypeError, group.send, np.array([None]), 0)
    refused(TypeError, group.recv, 0, out=[0.0])
    await world.call(Group.barrier)
    await world.groups[0].send(good, group.rank)
    check_array(await group.recv(0), good, "numpy")


@check(sizes=(1, 2))
async def misfit_keeps_the_message(world: World) -> None:
    """A recv whose `out` does not fit fails alone: the message stays for the next recv."""
    sender, receiver = world.groups[0], world.groups[-1]
    for length in (SMALL, LARGE):
        sending = sender.send(_numbered(9, length), receiver.rank)
        error = await outcome(receiver.recv(0, out=np.zeros(length + 1, np.int64)))
        assert isinstance(error, ValueError), f"got {error!r}"
        error = await outcome(receiver.recv(0, out=np.zeros(length)))
        assert isinstance(error, TypeError), f"got {error!r}"
        check_array(await receiver.recv(0), _numbered(9, length), "numpy")
        assert await outcomes([sending]) == [None]


async def _receive_from(group: Group) -> Any:
    return await group.recv(0)


async def _receive(work: Any) -> Any:
    return await work
