"""Credit and urgency, and a mixture of everything."""

from __future__ import annotations

import asyncio
import random

import numpy as np
import psutil
import pytest
from link_harness import KINDS, Pair, channel_between, pair, run, turns, until

from collective.abc import LARGE, WINDOW, Channel, Message
from collective.errors import LinkClosed, WouldBlock

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
            data = np.ones(64 * MIB, np.uint8)
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


def test_what_is_lent_takes_its_place_and_credit_and_is_sent_though_nobody_waits_for_it(kind: str) -> None:
    async def main() -> None:
        async with pair(kind) as both:
            one, other = await both.channel(window=4 * MIB)
            data = random.Random(1).randbytes(3 * MIB)
            one.send_nowait(b"first")
            one.lend_nowait(b"second", [data])
            with pytest.raises(WouldBlock, match="port-1"):
                one.lend_nowait(b"too much", [data])
            sending = asyncio.create_task(one.send(b"third", [data]))
            await turns(1)
            with pytest.raises(WouldBlock, match="port-1"):
                one.lend_nowait(b"out of turn", [])
            came = [await other.receive() for _ in range(3)]
            assert [message.header for message in came] == [b"first", b"second", b"third"]
            assert [bytes(buffer) for message in came for buffer in message.buffers] == [data, data]
            await sending
            one.close()
            with pytest.raises(LinkClosed):
                one.lend_nowait(b"late", [data])

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
