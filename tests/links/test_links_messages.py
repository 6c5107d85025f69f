"""What arrives is what was sent: sizes, shapes of messages, order, and who owns the memory."""

from __future__ import annotations

import asyncio
import random

import numpy as np
import pytest
from link_harness import KINDS, pair, run, until

from collective.abc import LARGE, WINDOW, Channel, Message
from collective.errors import WouldBlock

MIB = 1 << 20
SIZES = (0, 1, 27, 28, 1000, LARGE - 1, LARGE, LARGE + 1, (128 << 10) + 7, WINDOW - 200, WINDOW, WINDOW + 1, 5 * MIB)


def noise(size: int) -> np.ndarray:
    """Return random bytes, quickly."""
    return np.random.default_rng(size).integers(0, 256, size, np.uint8)


async def exchange(one: Channel, other: Channel, header: bytes, buffers: list[memoryview]) -> Message:
    _, message = await asyncio.gather(one.send(header, buffers), other.receive())
    return message


@pytest.mark.parametrize("size", SIZES)
def test_sizes_of_buffers(kind: str, loop: str, size: int) -> None:
    async def main() -> None:
        async with pair(kind) as both:
            one, other = await both.channel()
            data = noise(size)
            for here, there in ((one, other), (other, one)):
                message = await exchange(here, there, b"header", [data.data, memoryview(b""), memoryview(b"end")])
                assert message.header == b"header"
                assert [len(buffer) for buffer in message.buffers] == [size, 0, 3]
                assert message.buffers[0] == data.data
                assert message.buffers[2] == b"end"

    run(main, loop=loop)


@pytest.mark.parametrize("size", SIZES)
def test_sizes_of_headers(kind: str, size: int) -> None:
    async def main() -> None:
        async with pair(kind) as both:
            one, other = await both.channel()
            header = noise(size).tobytes()
            message = await exchange(one, other, header, [memoryview(b"x")])
            assert message.header == header
            assert [bytes(buffer) for buffer in message.buffers] == [b"x"]
            assert (await exchange(one, other, header, [])) == Message(header, [])

    run(main)


def test_a_gibibyte(kind: str) -> None:
    async def main() -> None:
        async with pair(kind) as both:
            one, other = await both.channel()
            data = np.zeros(1 << 30, np.uint8)
            data[:: 1 << 12] = noise(1 << 18)
            message = await exchange(one, other, b"", [data.data])
            for start in range(0, len(data), MIB):  # Not at once: that would take another gibibyte.
                part = slice(start, start + MIB)
                assert np.array_equal(np.frombuffer(message.buffers[0][part], np.uint8), data[part])

    run(main, loop="uvloop")


@pytest.mark.parametrize("count", [1, 255, 256, 257, 3000, 40_000])
@pytest.mark.parametrize("size", [0, 3, 300])
def test_many_buffers(kind: str, count: int, size: int) -> None:
    async def main() -> None:
        async with pair(kind) as both:
            one, other = await both.channel()
            data = memoryview(noise(size * count).tobytes())
            parts = [data[size * i : size * (i + 1)] for i in range(count)]
            message = await exchange(one, other, b"many", parts)
            assert message.header == b"many"
            assert message.buffers == parts

    run(main)


@pytest.mark.parametrize("kind", KINDS)
def test_a_buffer_of_another_type_goes_as_its_bytes(kind: str) -> None:
    async def main() -> None:
        async with pair(kind) as both:
            one, other = await both.channel()
            matrix = np.arange(12, dtype=np.float64).reshape(3, 4)
            half, swapped = np.ones(3, np.float16), np.ones(3, ">c16")
            one.send_nowait(b"", [matrix.data, np.empty((0, 3)).data, bytearray(b"ab"), half.data, swapped.data])
            message = await other.receive()
            assert bytes(message.buffers[0]) == matrix.tobytes()
            assert [len(buffer) for buffer in message.buffers] == [96, 0, 2, 6, 48]
            with pytest.raises(ValueError, match="contiguous"):
                one.send_nowait(b"", [matrix.T.data])
            with pytest.raises(ValueError, match="contiguous"):
                await one.send(b"", [matrix.T.data])

    run(main)


def test_thousands_of_small_messages_both_ways(kind: str, loop: str) -> None:
    count = 5000

    async def send(channel: Channel) -> None:
        sizes = random.Random(1)
        for i in range(count):
            header = i.to_bytes(4, "little")
            data = bytes(sizes.randrange(64))
            try:
                channel.send_nowait(header, [data])
            except WouldBlock:
                await channel.send(header, [data])

    async def receive(channel: Channel) -> None:
        sizes = random.Random(1)
        for i in range(count):
            message = await channel.receive()
            assert int.from_bytes(message.header, "little") == i
            assert len(message.buffers[0]) == sizes.randrange(64)

    async def main() -> None:
        async with pair(kind) as both:
            one, other = await both.channel(window=20_000)
            await asyncio.gather(send(one), send(other), receive(one), receive(other))
            assert both.link.statistics().messages_sent == count
            assert both.link.statistics().messages_received == count

    run(main, loop=loop)


def test_both_ends_send_large_messages_on_many_channels_at_once(kind: str, loop: str) -> None:
    async def main() -> None:
        async with pair(kind) as both:
            channels = [await both.channel() for _ in range(3)]
            data = noise(20 * MIB)

            async def check(one: Channel, other: Channel) -> None:
                for offset in range(3):
                    message = await exchange(one, other, bytes([offset]), [data[offset:].data, data[:offset].data])
                    assert message.header == bytes([offset])
                    assert np.array_equal(np.frombuffer(message.buffers[0], np.uint8), data[offset:])

            await asyncio.gather(*(check(*ends) for ends in channels), *(check(*ends[::-1]) for ends in channels))

    run(main, loop=loop)


@pytest.mark.parametrize("size", [10, LARGE, LARGE + 1, WINDOW + 1])
def test_memory_is_not_shared(kind: str, size: int) -> None:
    """A buffer may be changed as soon as its send is done; what arrived is its receiver's alone, or read-only."""

    async def main() -> None:
        async with pair(kind) as both:
            one, other = await both.channel(window=1 << 22)
            data = bytearray(b"a" * size)
            sending = asyncio.create_task(one.send(b"", [data]))
            if size > WINDOW:
                messages = [await other.receive()]
                await sending
            else:
                await sending
                data[:] = b"b" * size
                await one.send(b"", [data])
                data[:] = b"c" * size
                messages = [await other.receive(), await other.receive()]
                assert messages[1].buffers[0] == b"b" * size
            assert messages[0].buffers[0] == b"a" * size
            arrived = messages[0].buffers[0]
            assert arrived.readonly == (kind == "shm" and size > LARGE)
            if not arrived.readonly:
                arrived[:] = b"d" * size
            assert data[0] in b"ac"

    run(main)


def test_what_cannot_be_written_at_once_is_copied(kind: str) -> None:
    """`send_nowait` and `post` return at once, also where the pipe is full; their buffers may be changed then."""

    async def main() -> None:
        async with pair(kind) as both:
            one, other = await both.channel(window=1 << 28)
            data = bytearray(LARGE)
            for i in range(100):
                data[:] = bytes([i]) * LARGE
                (one.post if i % 3 == 0 else one.send_nowait)(b"", [data])
            data[:] = b"\xff" * LARGE
            seen = []
            for _ in range(100):
                message = await other.receive()
                assert len(set(bytes(message.buffers[0]))) == 1
                seen.append(message.buffers[0][0])
            assert [i for i in seen if i % 3 == 0] == list(range(0, 100, 3))
            assert [i for i in seen if i % 3] == [i for i in range(100) if i % 3]

    run(main)


def test_limits_of_what_does_not_wait(kind: str) -> None:
    async def main() -> None:
        async with pair(kind) as both:
            one, other = await both.channel()
            for send in (one.send_nowait, one.post):
                send(b"", [bytes(LARGE)])
                with pytest.raises(ValueError, match="at most"):
                    send(b"x", [bytes(LARGE)])
                with pytest.raises(ValueError, match="buffers"):
                    send(b"x", [b""] * 20_000)
            assert len((await other.receive()).buffers[0]) == LARGE
            with pytest.raises(ValueError, match="window"):
                both.link.open("port", window=0)
            with pytest.raises(ValueError, match="payload"):
                both.link.open("port", bytes(1 << 20))

    run(main)


def test_a_subscriber_gives_the_memory_for_large_messages(kind: str, loop: str) -> None:
    async def main() -> None:
        async with pair(kind) as both:
            one, other = await both.channel()
            asked: list[tuple[bytes, list[int]]] = []
            got: list[Message] = []
            memory = np.zeros(2 * WINDOW, np.uint8)

            def allocate(header: bytes, sizes: object) -> list[memoryview] | None:
                sizes = list(sizes)  # type: ignore[call-overload]
                asked.append((header, sizes))
                return [memory[:WINDOW].data, memory[WINDOW:].data] if header == b"into" else None

            other.subscribe(got.append, got.append, allocate)  # type: ignore[arg-type]
            data = noise(WINDOW)
            await one.send(b"into", [data.data, data[::-1].copy().data])
            await one.send(b"fresh", [data.data])
            await one.send(b"small", [b"x"])
            big = noise(3 * MIB).tobytes()
            await one.send(big, [data.data])
            await until(lambda: len(got) == 4)
            assert asked == [(b"into", [WINDOW, WINDOW]), (b"fresh", [WINDOW]), (big, [WINDOW])]
            assert np.array_equal(memory[:WINDOW], data)
            assert np.array_equal(memory[WINDOW:], data[::-1])
            assert np.shares_memory(np.frombuffer(got[0].buffers[0], np.uint8), memory)
            assert got[1].buffers[0] == data.data
            assert not np.shares_memory(np.frombuffer(got[1].buffers[0], np.uint8), memory)
            assert got[3].header == big

    run(main, loop=loop)


def test_memory_that_does_not_fit_is_reported_and_not_used(kind: str) -> None:
    async def main() -> None:
        complaints: list[dict[str, object]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        async with pair(kind) as both:
            one, other = await both.channel()
            got: list[Message] = []
            other.subscribe(got.append, lambda _: None, lambda header, sizes: [memoryview(bytes(sizes[0]))])
            data = noise(2 * WINDOW)
            await one.send(b"", [data.data])
            await until(lambda: bool(got))
            assert got[0].buffers[0] == data.data
            assert len(complaints) == 1
            assert "read-only" in str(complaints[0]["exception"])

    run(main)


def test_a_callback_that_fails_is_reported_and_the_next_message_comes(kind: str) -> None:
    async def main() -> None:
        complaints: list[dict[str, object]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        async with pair(kind) as both:
            one, other = await both.channel()
            got: list[bytes] = []

            def on_message(message: Message) -> None:
                got.append(message.header)
                if message.header == b"bad":
                    raise KeyError("mine")

            other.subscribe(on_message, lambda _: None)
            one.send_nowait(b"bad")
            one.send_nowait(b"good")
            await until(lambda: len(got) == 2)
            assert [str(context["exception"]) for context in complaints] == ["'mine'"]

    run(main)
