"""Credit, urgency, cancellation, and how channels and links end."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import numpy as np
import psutil
import pytest
from link_harness import KEY, KINDS, Pair, channel_between, pair, run, turns, until

from collective._links.wire import OVERHEAD
from collective.abc import LARGE, WINDOW, Channel, Message
from collective.errors import LinkBroken, LinkClosed, WouldBlock

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1 << 20


def fill(channel: Channel, data: bytes) -> int:
    """Send until there is no credit left; return how many bytes that took."""
    sent = 0
    while True:
        try:
            channel.send_nowait(b"", [data])
        except WouldBlock:
            return sent
        sent += len(data)


# Credit.


@pytest.mark.parametrize("window", [1000, 5000, WINDOW])
def test_an_unread_channel_takes_its_window_and_delays_no_other(kind: str, loop: str, window: int) -> None:
    async def main() -> None:
        async with pair(kind) as both:
            stalled, unread = await both.channel(window=window)
            one, other = await both.channel()
            sent = fill(stalled, b"x" * 100)
            assert window // 4 <= sent <= window
            blocked = asyncio.create_task(stalled.send(b"", [bytes(2 * MIB)]))
            for i in range(1000):
                one.send_nowait(b"%d" % i)
                assert (await other.receive()).header == b"%d" % i
            assert not blocked.done()
            for _ in range(sent // 100):
                assert (await unread.receive()).buffers == [b"x" * 100]
            assert len((await unread.receive()).buffers[0]) == 2 * MIB
            await blocked

    run(main, loop=loop)


def test_credit_comes_back_as_messages_are_received(kind: str) -> None:
    async def main() -> None:
        async with pair(kind) as both:
            one, other = await both.channel(window=10_000)
            for _ in range(20):
                fill(one, b"x" * 1000)
                with pytest.raises(WouldBlock, match="port-1"):
                    one.send_nowait(b"y" * 1000)
                sending = asyncio.create_task(one.send(b"last"))
                while (await other.receive()).header != b"last":
                    pass
                await sending
                # Nothing is kept back for long: all of the window is there again, and no message had to carry it.
                await asyncio.wait_for(one.send(b"whole", [bytes(9_000)]), 10)
                await other.receive()

    run(main)


def test_a_message_as_large_as_the_window_passes_without_a_receiver(kind: str) -> None:
    async def main() -> None:
        async with pair(kind) as both:
            one, other = await both.channel(window=200_000)
            for size in (190_000, 100_000, 199_000):
                await one.send(b"", [bytes(size)])
                assert len((await other.receive()).buffers[0]) == size

    run(main)


def test_a_message_beyond_the_window_waits_for_a_receiver_in_bounded_memory(kind: str) -> None:
    async def main() -> None:
        async with pair(kind) as both:
            one, other = await both.channel()
            data = np.ones(256 * MIB, np.uint8)
            process = psutil.Process()
            before = process.memory_info().rss
            sending = [asyncio.create_task(one.send(b"%d" % i, [data.data])) for i in range(3)]
            ping, pong = await both.channel()
            for _ in range(100):
                await ping.send(b"")
                await pong.receive()
            assert not any(task.done() for task in sending)
            assert process.memory_info().rss - before < 16 * MIB
            message = await other.receive()
            assert message.header == b"0"
            assert np.array_equal(np.frombuffer(message.buffers[0], np.uint8), data)
            await sending[0]
            assert not sending[1].done()
            for task in sending[1:]:
                task.cancel()
            await asyncio.wait(sending)

    run(main)


def test_send_nowait_does_not_overtake_a_send_that_waits(kind: str) -> None:
    async def main() -> None:
        async with pair(kind) as both:
            one, other = await both.channel()
            large = asyncio.create_task(one.send(b"large", [bytes(2 * WINDOW)]))
            small = asyncio.create_task(one.send(b"small"))
            await turns(1)
            with pytest.raises(WouldBlock):
                one.send_nowait(b"now")
            assert [(await other.receive()).header for _ in range(2)] == [b"large", b"small"]
            await asyncio.gather(large, small)
            one.send_nowait(b"now")
            assert (await other.receive()).header == b"now"

    run(main)


def test_sends_take_their_places_at_their_first_step(kind: str) -> None:
    async def main() -> None:
        async with pair(kind) as both:
            one, other = await both.channel(window=70_000)
            sizes = [random.Random(2).choice([0, 10, LARGE, LARGE + 1, 200_000]) for _ in range(50)]
            async with asyncio.TaskGroup() as tasks:
                for i, size in enumerate(sizes):
                    tasks.create_task(one.send(b"%d" % i, [bytes(size)]))
                for i, size in enumerate(sizes):
                    message = await other.receive()
                    assert (message.header, len(message.buffers[0])) == (b"%d" % i, size)

    run(main)


def test_a_subscriber_gets_what_waits_and_then_the_rest(kind: str, loop: str) -> None:
    async def main() -> None:
        async with pair(kind) as both:
            one, other = await both.channel()
            for i in range(10):
                one.send_nowait(b"%d" % i)
            large = asyncio.create_task(one.send(b"10", [bytes(3 * MIB)]))
            await until(lambda: both.link.statistics().messages_sent >= 10)
            await turns()
            got: list[bytes] = []
            other.subscribe(lambda message: got.append(message.header), lambda _: None)
            assert got == []  # Not before subscribe has returned.
            await large
            one.send_nowait(b"11")
            await until(lambda: len(got) == 12)
            assert got == [b"%d" % i for i in range(12)]
            with pytest.raises(RuntimeError, match="callback"):
                await other.receive()
            with pytest.raises(RuntimeError, match="receiver already"):
                other.subscribe(lambda _: None, lambda _: None)

    run(main, loop=loop)


def test_a_subscriber_returns_credit_for_any_number_of_messages(kind: str) -> None:
    async def main() -> None:
        async with pair(kind) as both:
            one, other = await both.channel(window=3000)
            total = 0

            def on_message(message: Message) -> None:
                nonlocal total
                total += len(message.buffers[0])

            other.subscribe(on_message, lambda _: None)
            for size in range(2500):
                await one.send(b"", [bytes(size)])
            await until(lambda: total == 2500 * 2499 // 2)

    run(main)


# Posts.


def test_posts_overtake_what_waits_and_keep_their_order(kind: str, loop: str) -> None:
    async def main() -> None:
        async with pair(kind) as both:
            one, other = await both.channel(window=2000)
            fill(one, b"x" * 500)
            sends = [asyncio.create_task(one.send(b"sent %d" % i, [bytes(1000)])) for i in range(3)]
            await turns(3)
            for i in range(500):
                one.post(b"post %d" % i)
            got: list[bytes] = []
            while not got or got[-1] != b"sent 2":
                got.append((await other.receive()).header)
            await asyncio.gather(*sends)
            assert [header for header in got if header.startswith(b"post")] == [b"post %d" % i for i in range(500)]
            assert [header for header in got if header.startswith(b"sent")] == [b"sent %d" % i for i in range(3)]
            assert got.index(b"post 499") < got.index(b"sent 0")

    run(main, loop=loop)


def test_posts_need_no_credit_and_pass_a_message_that_nobody_receives(kind: str) -> None:
    async def main() -> None:
        async with pair(kind) as both:
            one, other = await both.channel(window=1)
            sending = asyncio.create_task(one.send(b"large", [bytes(1000)]))
            await turns()
            for i in range(3):
                one.post(b"post", [b"%d" % i])
            assert [(await other.receive()).buffers for _ in range(3)] == [[b"0"], [b"1"], [b"2"]]
            assert not sending.done()
            assert (await other.receive()).header == b"large"
            await sending

    run(main)


def test_a_post_arrives_while_large_messages_flow(kind: str, loop: str) -> None:
    async def main() -> None:
        async with pair(kind) as both:
            bulk, sink = await both.channel()
            one, other = await both.channel()
            sink.subscribe(lambda _: None, lambda _: None)
            data = np.zeros(64 * MIB, np.uint8)
            sending = asyncio.create_task(bulk.send(b"", [data.data]))
            await turns(3)
            bulk.post(b"along")
            one.post(b"beside")
            assert (await other.receive()).header == b"beside"
            assert not sending.done()
            await sending

    run(main, loop=loop)


# Cancelling.


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


# Ends.


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


@pytest.mark.parametrize("kind", KINDS)
def test_a_random_mixture_of_everything(kind: str) -> None:
    """Many channels, each with its own mixture of sends, cancellations, posts and slow reads; all arrives in order."""

    async def talk(both: Pair, seed: int) -> None:
        dice = random.Random(seed)
        one, other = await channel_between(both.link, both.there, f"mix-{seed}", window=dice.choice([1, 500, 1 << 17]))
        expected: list[int] = []
        posted: list[int] = []

        async def produce() -> None:
            for i in range(60):
                size = dice.choice([0, 1, 100, 5000, LARGE, LARGE + 1, 300_000])
                if dice.random() < 0.2:
                    one.post(b"p%d" % i)
                    posted.append(i)
                    continue
                sending = asyncio.create_task(one.send(b"s%d" % i, [bytes([i]) * size]))
                await turns(dice.randrange(5))
                if dice.random() < 0.2:
                    sending.cancel()
                    await asyncio.wait([sending])
                    if sending.cancelled():
                        continue
                await sending
                expected.append(i)
            await one.send(b"end")

        async def consume() -> tuple[list[int], list[int]]:
            sent, posts = [], []
            while True:
                await turns(dice.randrange(5))
                message = await other.receive()
                if message.header == b"end":
                    return sent, posts
                number = int(message.header[1:])
                if message.header[:1] == b"p":
                    posts.append(number)
                else:
                    sent.append(number)
                    assert not message.buffers[0] or set(bytes(message.buffers[0])) == {number}

        _, (sent, posts) = await asyncio.gather(produce(), consume())
        assert posts == posted
        assert sent == sorted(sent)
        assert set(expected) <= set(sent)

    async def main() -> None:
        async with pair(kind) as both:
            await asyncio.gather(*(talk(both, seed) for seed in range(12)))

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
