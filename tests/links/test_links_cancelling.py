"""Sends and receives that are cancelled, before they begin and under way."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np
import pytest
from link_harness import KEY, KINDS, pair, run, talk, turns, until

from collective._links.wire import OVERHEAD
from collective.abc import WINDOW
from collective.errors import LinkError

if TYPE_CHECKING:
    from collections.abc import Callable

    from collective.abc import Message

MIB = 1 << 20


def test_a_cancelled_send_that_has_not_begun_is_withdrawn(kind: str) -> None:
    async def main() -> None:
        async with pair(kind) as both:
            one, other = await both.channel(window=1000)
            one.send_nowait(b"first", [bytes(800)])
            for size in (500, 5000):
                cancelled = asyncio.create_task(one.send(b"cancelled", [bytes(size)]))
                later = asyncio.create_task(one.send(b"later", [bytes(size)]))
                await turns()
                cancelled.cancel()
                assert await asyncio.wait([cancelled])
                assert cancelled.cancelled()
                assert (await other.receive()).header == b"first"
                assert (await other.receive()).header == b"later"
                await later
                one.post(b"first")

    run(main)


def test_a_withdrawn_announcement_and_the_receiver_who_asks_for_it_may_cross(kind: str) -> None:
    async def main() -> None:
        async with pair(kind) as both:
            one, other = await both.channel(window=1000)
            for i in range(50):
                cancelled = asyncio.create_task(one.send(b"cancelled", [bytes(5000)]))
                receiving = asyncio.create_task(other.receive())
                await turns(i % 10)
                cancelled.cancel()
                await asyncio.wait([cancelled])
                last = asyncio.create_task(one.send(b"last", [bytes(6000)]))
                message = await receiving
                if message.header == b"cancelled":  # It had been asked for before the cancellation.
                    assert len(message.buffers[0]) == 5000
                    message = await other.receive()
                assert (message.header, len(message.buffers[0])) == (b"last", 6000)
                await last

    run(main)


def test_a_cancelled_send_that_is_under_way_arrives_whole_and_unchanged(
    kind: str, loop: str, small_arena: Callable[[int], object]
) -> None:
    small_arena(0)  # What is read in place is never half there.

    async def main() -> None:
        async with pair(kind) as both:
            one, other = await both.channel()
            whole = 0
            for i in range(20):
                data = np.full(16 * MIB, i, np.uint8)
                sending = asyncio.create_task(one.send(b"%d" % i, [data.data[: MIB + i], data.data[MIB + i :]]))
                receiving = asyncio.create_task(other.receive())
                await turns(i)
                sending.cancel()
                await asyncio.wait([sending])
                data[:] = 255
                await one.send(b"end")
                message = await receiving
                if message.header != b"end":
                    whole += 1
                    assert message.header == b"%d" % i
                    for buffer in message.buffers:
                        array = np.frombuffer(buffer, np.uint8)
                        assert (array == i).all()
                    message = await other.receive()
                assert message.header == b"end"
            assert whole

    run(main, loop=loop)


def test_a_cancelled_receive_loses_nothing(kind: str) -> None:
    async def main() -> None:
        async with pair(kind) as both:
            one, other = await both.channel()
            got: list[bytes] = []

            async def receive() -> None:
                got.append((await other.receive()).header)

            for i in range(300):
                receiving = asyncio.create_task(receive())
                await turns(1)
                if i % 3 == 0:
                    sending = asyncio.create_task(one.send(b"%d" % i, [bytes(2 * WINDOW if i % 30 == 0 else 10)]))
                else:
                    sending = asyncio.create_task(one.send(b"%d" % i))
                await turns(i % 7)
                receiving.cancel()
                await asyncio.wait([receiving])
                if len(got) <= i:
                    await receive()
                await sending
            assert got == [b"%d" % i for i in range(300)]

    run(main)


def test_a_cancelled_receive_passes_its_turn_on(kind: str) -> None:
    async def main() -> None:
        async with pair(kind) as both:
            one, other = await both.channel()
            first, second = asyncio.create_task(other.receive()), asyncio.create_task(other.receive())
            await turns(1)
            one.send_nowait(b"only")
            there = await both.there.connect(both.here.address, KEY)
            while not there.statistics().messages_received:
                await turns(1)
            first.cancel()  # It has been woken, and has not run.
            assert (await second).header == b"only"

    run(main)


def test_a_withdrawn_message_gives_back_the_credit_of_its_announcement(kind: str) -> None:
    """All credit but what the announcement takes is used up, so that none of the message's contents can follow it."""

    async def main() -> None:
        window, size = 200_000, 100_000
        announcement = 8 + len(b"c") + 2 * OVERHEAD
        async with pair(kind) as both:
            one, other = await both.channel(window=window)
            await one.send(bytes(window - announcement - OVERHEAD))
            for _ in range(3):
                cancelled = asyncio.create_task(one.send(b"c", [bytes(size)]))
                await turns()
                cancelled.cancel()
                await asyncio.wait([cancelled])
                # This needs the same credit, and announces itself in turn once it is back.
                await until(lambda: one.outbox._credit == announcement)  # type: ignore[attr-defined]
            last = asyncio.create_task(one.send(b"l", [bytes(size)]))
            assert len((await other.receive()).header) == window - announcement - OVERHEAD
            message = await other.receive()
            assert (message.header, len(message.buffers[0])) == (b"l", size)
            await last

    run(main)


@pytest.mark.parametrize("kind", KINDS)
def test_an_aborted_channel_reads_and_writes_nothing_more_and_tells_the_other_end(kind: str) -> None:
    """Of a message that is under way the rest never comes; other channels of the link go on."""

    async def main() -> None:
        async with pair(kind) as both:
            for aborts in ("sender", "receiver"):
                one, other = await both.channel()
                data, memory = np.full(32 << 20, 1, np.uint8), np.zeros(32 << 20, np.uint8)
                came: list[Message] = []
                ended: list[Exception] = []
                other.subscribe(came.append, ended.append, lambda header, sizes, memory=memory: [memory.data])
                sending = asyncio.create_task(one.send(b"", [data]))
                await until(lambda memory=memory: memory[::4096].any())  # type: ignore[misc]
                if came:
                    continue  # it was too quick for this
                (one if aborts == "sender" else other).abort()
                data[...] = 2
                seen = memory.copy()
                assert set(np.unique(seen)) == {0, 1}
                await asyncio.wait([sending])
                assert isinstance(sending.exception(), LinkError)
                await talk(both.link, both.there, f"after the {aborts}")
                assert not came
                assert bool(ended) == (aborts == "sender")
                if aborts == "receiver":
                    np.testing.assert_array_equal(memory, seen)

    run(main)
