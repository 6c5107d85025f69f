"""How channels and links end, by either end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np
import pytest
from link_harness import KEY, channel_between, pair, pass_on, run, turns, until

from collective.abc import LARGE, WINDOW, Channel, Message
from collective.errors import LinkBroken, LinkClosed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

MIB = 1 << 20


def test_closing_a_channel_delivers_what_was_sent(kind: str, loop: str) -> None:
    async def main() -> None:
        async with pair(kind) as both:
            one, other = await both.channel()
            one.send_nowait(b"first")
            large = asyncio.create_task(one.send(b"large", [bytes(5 * MIB)]))
            last = asyncio.create_task(one.send(b"last"))
            await turns(1)
            one.close()
            one.close()
            one.post(b"dropped")
            with pytest.raises(LinkClosed, match="port-1"):
                await one.send(b"too late")
            with pytest.raises(LinkClosed, match="port-1"):
                one.send_nowait(b"too late")
            with pytest.raises(LinkClosed, match="port-1"):
                await one.receive()
            assert [(await other.receive()).header for _ in range(3)] == [b"first", b"large", b"last"]
            await asyncio.gather(large, last)
            for _ in range(2):
                with pytest.raises(LinkBroken, match="closed by the other end"):
                    await other.receive()
            with pytest.raises(LinkBroken, match="closed by the other end"):
                await other.send(b"")
            other.post(b"dropped")
            other.close()
            assert both.link.statistics().channels == 0

    run(main, loop=loop)


def test_closing_ends_what_waits(kind: str) -> None:
    async def main() -> None:
        async with pair(kind) as both:
            one, other = await both.channel()
            stalled, far = await both.channel()
            receiving = [asyncio.create_task(one.receive()) for _ in range(2)]
            far_receiving = asyncio.create_task(other.receive())
            far_sending = asyncio.create_task(far.send(b"", [bytes(2 * WINDOW)]))
            await turns()
            one.close()
            stalled.close()
            for task in receiving:
                with pytest.raises(LinkClosed):
                    await task
            for waiting in (far_sending, far_receiving):
                with pytest.raises(LinkBroken, match="closed by the other end"):
                    await waiting
            await until(lambda: both.link.statistics().channels == 0)

    run(main)


async def all_of(channel: Channel) -> AsyncIterator[Message]:
    """Receive all that comes, until the other end has closed the channel."""
    while True:
        try:
            message = await channel.receive()
        except LinkBroken as error:
            assert "closed by the other end" in str(error)  # noqa: PT017
            return
        yield message


WAITING = {
    "messages in credit's order": (1 << 16, 100, 20_000),
    "a message in the middle": (WINDOW, 3, 700_000),
    "a message that is not asked for": (1 << 16, 2, 5 * MIB),
}
"""What an end has to say when it closes and must wait: the window, how many messages, and their size."""


@pytest.mark.parametrize("both_close", [False, True], ids=["one closes", "both close"])
@pytest.mark.parametrize(("window", "count", "size"), WAITING.values(), ids=WAITING.keys())
def test_who_closes_while_it_waits_keeps_nobody_waiting(
    kind: str, window: int, count: int, size: int, both_close: bool
) -> None:
    """An end that has closed a channel reads nothing there: the other is told though what goes first cannot go yet."""

    async def main() -> None:
        async with pair(kind) as both:
            one, other = await both.channel(window=window)

            async def fill(channel: Channel) -> int:
                sent = 0
                try:
                    for _ in range(count):
                        await channel.send(b"", [bytes([sent]) * size])
                        sent += 1
                except (LinkBroken, LinkClosed) as error:
                    assert "closed by" in str(error)  # noqa: PT017
                return sent

            filling, other_filling = asyncio.create_task(fill(one)), asyncio.create_task(fill(other))
            await turns(200)
            assert not filling.done()
            assert not other_filling.done()
            one.close()
            if both_close:
                other.close()
            async with asyncio.timeout(1):
                await other_filling
            with pytest.raises(LinkClosed if both_close else LinkBroken):
                await other.send(b"")
            with pytest.raises(LinkClosed if both_close else LinkBroken):
                other.send_nowait(b"")
            other.post(b"dropped")
            if not both_close:
                came = [set(bytes(message.buffers[0])) async for message in all_of(other)]
                assert came == [{number} for number in range(len(came))]
                assert len(came) == await filling
            async with asyncio.timeout(1):
                await filling
                await until(lambda: both.link.statistics().channels == 0)
            await pass_on(*await both.channel(), b"x")

    run(main)


def test_memory_of_a_send_that_was_ended_is_not_read_any_more(socket_kind: str) -> None:
    """What is half written when the other end closes is finished from a copy: the sender's memory is the sender's."""

    async def main() -> None:
        async with pair(socket_kind) as both:
            one, other = await both.channel(window=256 * MIB)
            carrier = both.link.carrier  # type: ignore[attr-defined]
            memory = bytearray(b"x" * 60_000)
            parts = [memory] * 2000
            sending = asyncio.create_task(one.send(b"", parts))
            await until(lambda: bool(carrier._parked))
            one.close_received(0, "")  # type: ignore[attr-defined]
            memory[:] = bytes(60_000)  # as the sender may, as soon as it has heard
            assert all(set(bytes(piece)) != {0} for piece in carrier._parked)
            with pytest.raises(LinkBroken):
                await sending
            other.close()

    run(main)


def test_on_end_comes_once_after_the_last_message_and_not_to_who_closes(kind: str) -> None:
    async def main() -> None:
        async with pair(kind) as both:
            one, other = await both.channel()
            events: list[object] = []
            one.subscribe(events.append, events.append)
            other.subscribe(lambda message: events.append(message.header), lambda error: events.append(str(error)))
            one.send_nowait(b"1")
            one.send_nowait(b"2")
            one.close()
            await until(lambda: len(events) == 3)
            await turns()
            assert events[:2] == [b"1", b"2"]
            assert "closed by the other end" in str(events[2])
            await both.link.aclose()
            assert len(events) == 3

    run(main)


def test_a_subscription_to_a_channel_that_has_ended_gets_all_of_it(kind: str) -> None:
    async def main() -> None:
        async with pair(kind) as both:
            one, other = await both.channel()
            one.send_nowait(b"1")
            one.close()
            await until(lambda: both.link.statistics().channels == 0)
            events: list[object] = []
            other.subscribe(lambda message: events.append(message.header), lambda error: events.append(type(error)))
            await until(lambda: len(events) == 2)
            assert events == [b"1", LinkBroken]

    run(main)


def test_a_channel_may_be_closed_by_its_own_callback(kind: str) -> None:
    async def main() -> None:
        async with pair(kind) as both:
            one, other = await both.channel()
            got: list[bytes] = []

            def on_message(message: Message) -> None:
                got.append(message.header)
                other.close()

            for i in range(5):
                one.send_nowait(b"%d" % i)
            other.subscribe(on_message, lambda _: pytest.fail("this end closed it"))
            with pytest.raises(LinkBroken, match="closed by the other end"):
                await one.receive()
            assert got == [b"0"]

    run(main)


def test_memory_that_a_closed_channel_gave_is_left_alone(kind: str) -> None:
    async def main() -> None:
        async with pair(kind) as both:
            one, other = await both.channel()
            memory = np.zeros(64 * MIB, np.uint8)
            asked = asyncio.Event()

            def allocate(header: bytes, sizes: object) -> list[memoryview]:
                asked.set()
                return [memory.data]

            other.subscribe(lambda _: pytest.fail("it was closed"), lambda _: None, allocate)
            sending = asyncio.create_task(one.send(b"", [np.ones(64 * MIB, np.uint8).data]))
            await asked.wait()
            other.close()
            memory[:] = 0
            with pytest.raises(LinkBroken):
                await sending
            probe, far = await both.channel()
            probe.send_nowait(b"")
            await far.receive()
            assert not memory.any()

    run(main)


def test_closing_a_link_hands_over_what_was_sent_and_ends_everything(kind: str, loop: str) -> None:
    async def main() -> None:
        async with pair(kind) as both:
            one, other = await both.channel()
            silent, far = await both.channel()
            ends: list[object] = []
            silent.subscribe(ends.append, ends.append)
            both.link.on_close(ends.append)
            there = await both.there.connect(both.here.address, KEY)
            there.on_close(ends.append)
            # All of it fits into the window, so that a receiver who comes later finds it.
            for i in range(10):
                one.send_nowait(b"%d" % i, [bytes(LARGE - 1)])
            assert not both.link.closed
            await both.link.aclose()
            await both.link.aclose()
            assert both.link.closed
            for i in range(10):
                assert (await other.receive()).header == b"%d" % i
            with pytest.raises(LinkBroken, match="closed by the other end"):
                await other.receive()
            with pytest.raises(LinkBroken, match="closed by the other end"):
                await far.receive()
            with pytest.raises(LinkClosed):
                await one.receive()
            with pytest.raises(LinkClosed):
                both.link.open("port")
            await until(lambda: len(ends) == 3)
            assert sorted(type(end).__name__ for end in ends) == ["LinkBroken", "LinkClosed", "LinkClosed"]
            both.link.on_close(ends.append)
            await until(lambda: len(ends) == 4)
            again = await both.here.connect(both.there.address, KEY)
            assert again is not both.link
            await channel_between(again, both.there, "again")

    run(main, loop=loop)


def test_closing_a_link_waits_a_second_at_most_for_who_does_not_receive(kind: str) -> None:
    async def main() -> None:
        async with pair(kind) as both:
            one, _ = await both.channel()
            sending = asyncio.create_task(one.send(b"", [bytes(2 * WINDOW)]))
            await turns()
            started = asyncio.get_running_loop().time()
            await both.link.aclose()
            assert asyncio.get_running_loop().time() - started < 5
            with pytest.raises(LinkClosed):
                await sending

    run(main)


def test_both_ends_may_close_at_once(kind: str) -> None:
    async def main() -> None:
        for _ in range(10):
            async with pair(kind) as both:
                one, other = await both.channel()
                one.send_nowait(b"")
                other.send_nowait(b"")
                await asyncio.gather(both.here.aclose(), both.there.aclose())
                with pytest.raises(LinkClosed):
                    await both.here.connect(both.there.address, KEY)

    run(main)


def test_an_aborted_endpoint_is_seen_by_the_other_end(kind: str) -> None:
    async def main() -> None:
        async with pair(kind) as both:
            one, other = await both.channel()
            one.send_nowait(b"sent")
            await turns()
            both.here.abort()
            both.here.abort()
            assert (await other.receive()).header == b"sent"
            with pytest.raises(LinkBroken, match="connection ended"):
                await other.receive()
            with pytest.raises(LinkClosed):
                await one.receive()

    run(main)


def test_channels_do_not_pile_up(kind: str) -> None:
    async def main() -> None:
        async with pair(kind) as both:
            both.there.serve("once", lambda channel: channel.subscribe(lambda _: channel.close(), lambda _: None))
            for _ in range(300):
                channel = both.link.open("once", b"payload")
                channel.send_nowait(b"")
                with pytest.raises(LinkBroken):
                    await channel.receive()
            assert both.link.statistics().channels == 0

    run(main)
