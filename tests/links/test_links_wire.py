"""Bytes on the wire: cut anywhere, split anyhow, or wrong. One link ends, at most, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from link_harness import KEY, channel_between, endpoint, run, until

from collective._links import endpoint as endpoint_module
from collective._links import handshake
from collective._links import wire as w
from collective._links.carrier import Carrier
from collective._links.handshake import NO_LINK
from collective._links.mux import Mux
from collective._links.stream import StreamCarrier
from collective.abc import LARGE
from collective.errors import LinkBroken, LinkError
from collective.links import open_endpoint
from collective.types import Address

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from collective._links.carrier import FrameSource
    from collective.abc import Channel, Endpoint, Message

# A peer that dies in the middle.


class Cutter:
    """A proxy that ends both of its connections once `limit` bytes have passed in one direction."""

    def __init__(self, target: Address, limit: int, *, from_dialer: bool) -> None:
        self.target = target
        self.limit = limit
        self.from_dialer = from_dialer
        self.passed = 0

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, counted: bool) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                if counted:
                    data = data[: self.limit - self.passed]
                    self.passed += len(data)
                writer.write(data)
                await writer.drain()
                if counted and self.passed >= self.limit:
                    return

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert self.target.tcp is not None
        far_reader, far_writer = await asyncio.open_connection(*self.target.tcp)
        pumps = [
            asyncio.create_task(self.pump(reader, far_writer, counted=self.from_dialer)),
            asyncio.create_task(self.pump(far_reader, writer, counted=not self.from_dialer)),
        ]
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for task in pumps:
            task.cancel()
        await asyncio.wait(pumps)
        for end in (writer, far_writer):
            end.close()
            with contextlib.suppress(ConnectionError):
                await end.wait_closed()

    @contextlib.asynccontextmanager
    async def address(self) -> AsyncIterator[Address]:
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        async with server:
            yield Address(self.target.endpoint, tcp=server.sockets[0].getsockname())


async def converse(here: Endpoint, address: Address, port: str) -> list[Message]:
    """Exchange one of everything; raise LinkError where the peer goes."""
    link = await here.connect(address, KEY)
    try:
        channel = link.open(port, b"payload", window=300_000)
        channel.post(b"post", [b"p" * 10])
        channel.send_nowait(b"small", [b"s" * 10])
        await channel.send(b"middle", [b"m" * 100_000])
        got = [await channel.receive() for _ in range(3)]
        await channel.send(b"large", [b"l" * 400_000])
        got.append(await channel.receive())
        return got
    finally:
        await link.aclose()


async def echo(channel: Channel, seen: list[bytes]) -> None:
    with contextlib.suppress(LinkError):
        while True:
            message = await channel.receive()
            for buffer in message.buffers:
                assert len(set(bytes(buffer))) == 1
            seen.append(message.header)
            await channel.send(message.header, message.buffers)


def cuts() -> list[tuple[int, bool]]:
    """Return every offset of the handshake and of the first frames, and some of what follows."""
    dice = random.Random(3)
    early = [(limit, side) for limit in range(1, 700, 3) for side in (True, False)]
    late = [(dice.randrange(700, 500_000), dice.random() < 0.5) for _ in range(120)]
    return early + late


def test_a_peer_that_dies_anywhere_is_broken_and_nothing_else_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "_PAUSE", 0.0)  # What listens there lives, so that it is dialed again.

    async def main() -> None:
        async with await endpoint("tcp") as there, await open_endpoint(kinds=()) as here:
            seen: list[bytes] = []
            async with asyncio.TaskGroup() as tasks:
                there.serve("echo", lambda channel: tasks.create_task(echo(channel, seen)))
                whole = await converse(here, there.address, "echo")
                assert [message.header for message in whole] == [b"post", b"small", b"middle", b"large"]
                sent = 0
                for limit, from_dialer in cuts():
                    seen.clear()
                    async with Cutter(there.address, limit, from_dialer=from_dialer).address() as address:
                        # Well under the second that closing may take: a link is told of the end of its socket.
                        async with asyncio.timeout(5):
                            with pytest.raises(LinkError):
                                await converse(here, address, "echo")
                    await until(lambda: not there._all)  # type: ignore[attr-defined]
                    assert seen == [b"post", b"small", b"middle", b"large"][: len(seen)]
                    sent += len(seen)
                assert sent
                again = await converse(here, there.address, "echo")
                assert [message.header for message in again] == [b"post", b"small", b"middle", b"large"]

    run(main, seconds=60)


# A peer that has proved itself, and then talks nonsense.


def head(kind: int, channel: int = 2, *, count: int = 0, head: int = 0, credit: int = 0, body: int = 0) -> bytes:
    return w.frame_head(kind, channel, count=count, head=head, credit=credit, body=body)


OPENED = w.encode_open(2, "port", b"", 1000)
START = w.encode_start(2, 500, b"", struct.pack("<Q", 492))[0]
NONSENSE = {
    "another magic": b"\0" * w.HEAD.size,
    "text": b"GET / HTTP/1.1\r\nHost: example\r\n\r\n",
    "an unknown kind": head(99),
    "kind zero": head(0),
    "an absurd length": head(w.MESSAGE, body=1 << 63),
    "a length beyond the limit": head(w.MESSAGE, body=w.INLINE + 1),
    "a channel nobody opened": head(w.MESSAGE, 4),
    "our own channel, which we did not open": head(w.MESSAGE, 3),
    "a channel opened twice": w.encode_open(2, "port", b"", 1000),
    "a channel of our parity": w.encode_open(5, "port", b"", 1000),
    "a window of nothing": w.encode_open(4, "port", b"", 0),
    "a window of everything": w.encode_open(4, "port", b"", (1 << 32) - 1),
    "a port that is no text": head(w.OPEN, 4, head=2, credit=10, body=2) + b"\xff\xff",
    "a port longer than its frame": head(w.OPEN, 4, head=9, credit=10, body=2) + b"ab",
    "more buffers than bytes": head(w.MESSAGE, count=1 << 30, body=8) + bytes(8),
    "sizes that do not add up": head(w.MESSAGE, count=1, body=9) + struct.pack("<Q", 5) + b"x",
    "sizes that overflow": head(w.MESSAGE, count=2, body=17) + struct.pack("<QQ", 1 << 63, 1 << 63) + b"x",
    "a header longer than its frame": head(w.MESSAGE, head=10, body=3) + b"abc",
    "more than the window": w.encode_message(w.MESSAGE, 2, 0, b"x" * 950, [], 950),
    "data of no message": head(w.DATA, body=10) + bytes(10),
    "data of no bytes": START + head(w.DATA, body=0),
    "more data than announced": START + head(w.DATA, body=493) + bytes(493),
    "data longer than a chunk": START + head(w.DATA, body=w.CHUNK + 1) + bytes(w.CHUNK + 1),
    "a message within a message": START + START,
    "a start without its length": head(w.START, body=3) + b"abc",
    "a start of an absurd message": w.encode_start(2, 1 << 62, b"", struct.pack("<Q", (1 << 62) - 8))[0],
    "a start whose sizes do not add up": w.encode_start(2, 500, b"", struct.pack("<Q", 499))[0],
    "a start longer than it says": head(w.START, count=1, body=8) + struct.pack("<Q", 500),
    "data nobody asked for": w.encode_start(2, 5000, b"", struct.pack("<Q", 4992))[0] + head(w.DATA, body=9) + bytes(9),
    "a withdrawal of nothing": head(w.WITHDRAW),
    "memory lent where none is shared": START + head(w.LEND, body=w.REFERENCE.size) + w.REFERENCE.pack(0, 0, 1, 0, 492),
    "references that are cut off": START + head(w.LEND, body=9) + bytes(9),
    "memory given back that nobody lent": w.encode_release([1]),
    "a segment gone that was never there": head(w.FORGET, 0, count=1),
    "a segment forgotten that nobody showed": head(w.FORGOT, 0, count=1),
    "an end of a channel nobody opened": head(w.CLOSE, 4),
    "deafness on a channel nobody opened": head(w.DEAF, 4),
    "an answer to what was not shown": head(w.ADOPTED, 0, count=1),
    "credit from nowhere": head(w.CREDIT, credit=1),
    "credit by a message": w.encode_message(w.MESSAGE, 2, 9, b"", [], 0),
}


@pytest.mark.parametrize("nonsense", NONSENSE.values(), ids=NONSENSE.keys())
def test_nonsense_ends_its_link_and_nothing_else(nonsense: bytes) -> None:
    async def main() -> None:
        async with await endpoint("tcp") as there, await open_endpoint(kinds=()) as here:
            link = await here.connect(there.address, KEY)
            one, other = await channel_between(link, there, "honest")
            assert there.address.tcp is not None
            carrier = StreamCarrier(socket.create_connection(there.address.tcp), "there")
            await handshake.dial(
                carrier, own="attacker", wanted=there.address.endpoint, credential=KEY, replaces=NO_LINK
            )
            arrived: asyncio.Future[Channel] = asyncio.get_running_loop().create_future()
            there.serve("port", arrived.set_result)
            carrier.put(OPENED)
            channel = await arrived
            carrier.put(nonsense)
            await until(lambda: channel.link.closed)
            with pytest.raises(LinkBroken, match="does not speak this protocol"):
                await channel.receive()
            with pytest.raises(LinkBroken, match="connection ended"):
                await carrier.take(1 << 20)
            carrier.close()
            one.send_nowait(b"still here")
            assert (await other.receive()).header == b"still here"

    run(main)


def test_a_message_that_no_memory_can_hold_ends_its_channel_only() -> None:
    async def main() -> None:
        async with await endpoint("memory") as there, await open_endpoint(kinds=()) as here:
            link = await here.connect(there.address, KEY)
            one, other = await channel_between(link, there, "huge")
            total = w.MOST_BYTES
            frame, _ = w.encode_start(one.id, total, b"", struct.pack("<Q", total - 8))  # type: ignore[attr-defined]
            link.urge(frame)  # type: ignore[attr-defined]
            receiving = asyncio.create_task(other.receive())
            await asyncio.sleep(0)
            link.urge(w.frame_head(w.DATA, one.id, body=10) + bytes(10))  # type: ignore[attr-defined]
            with pytest.raises(LinkError):
                await receiving
            with pytest.raises(LinkBroken, match="memory"):
                await one.receive()
            two, far = await channel_between(link, there, "next")
            two.send_nowait(b"x")
            assert (await far.receive()).header == b"x"

    run(main)


# Any bytes, in any pieces.


class Still(Carrier):
    """A carrier that goes nowhere."""

    kind = "memory"
    where = "nowhere"
    idle = True  # type: ignore[assignment]

    def put(self, data: bytes) -> None:
        raise NotImplementedError

    async def take(self, count: int) -> bytes:
        raise NotImplementedError

    def start(self, source: FrameSource) -> None:
        self.source = source

    def flush(self) -> None:
        while (frame := self.source.next_frame()) is not None:
            if frame.owner is not None:
                frame.owner.written()

    def detach(self) -> None: ...
    def finish(self) -> None: ...
    def close(self) -> None: ...


def feed(mux: Mux, data: bytes, cuts: list[int]) -> None:
    """Hand bytes to a multiplexer in pieces that end at `cuts`."""
    at = 0
    for end in sorted({cut % (len(data) + 1) for cut in cuts} | {len(data)}):
        while at < end and not mux.stopped:
            count = 0
            for target in mux.targets():
                part = data[at + count : min(at + count + len(target), end)]
                target[: len(part)] = part
                count += len(part)
            at += count
            mux.received(count)


def listening_mux(opened: list[Channel]) -> Mux:
    mux = Mux(
        Still(),
        remote="peer",
        credential=KEY,
        dialed=False,
        number=NO_LINK,
        on_open=lambda mux, channel: opened.append(channel),
        on_change=lambda mux: None,
    )
    mux.start()
    return mux


def conversation() -> bytes:
    """Return what a dialer sends: of every frame one."""
    big_header = b"h" * (w.INLINE + 10)
    sizes = struct.pack("<3Q", 0, 7, 3)
    start, prefix = w.encode_start(2, len(sizes) + len(big_header) + 10, big_header, sizes)
    parts = [
        w.encode_open(2, "first", b"payload", 1 << 20),
        w.encode_message(w.MESSAGE, 2, 0, b"small", [], 5),
        w.encode_message(w.POST, 2, 0, b"post", [b"ab", b"", b"cde"], 4 + 5 + 24),
        w.encode_open(4, "second", b"", 1 << 20),
        w.encode_start(4, 24 + 5 + LARGE * 3, b"start", struct.pack("<3Q", LARGE, 0, 2 * LARGE))[0],
        head(w.DATA, 4, body=LARGE + 5) + b"a" * LARGE + b"b" * 5,
        start,
        head(w.DATA, 2, body=100) + prefix[:100],
        w.encode_message(w.POST, 4, 0, b"between", [], 7),
        head(w.DATA, 4, body=2 * LARGE - 5) + b"b" * (2 * LARGE - 5),
    ]
    rest = prefix[100:] + b"1234567" + b"890"
    parts += [
        head(w.DATA, 2, body=len(rest[i : i + w.CHUNK])) + rest[i : i + w.CHUNK] for i in range(0, len(rest), w.CHUNK)
    ]
    parts += [head(w.DEAF, 4, body=3) + b"why", head(w.CLOSE, 4, body=3) + b"why", head(w.BYE, 0)]
    return b"".join(parts)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cuts=st.lists(st.integers(0, 1 << 20), max_size=60))
def test_frames_may_arrive_in_any_pieces(cuts: list[int]) -> None:
    async def main() -> None:
        opened: list[Channel] = []
        mux = listening_mux(opened)
        feed(mux, conversation(), cuts)
        first, second = opened
        assert (first.port, first.payload, second.port) == ("first", b"payload", "second")
        assert await first.receive() == (b"small", [])
        assert await first.receive() == (b"post", [b"ab", b"", b"cde"])
        header, buffers = await first.receive()
        assert (len(header), buffers) == (w.INLINE + 10, [b"", b"1234567", b"890"])
        assert await second.receive() == (b"between", [])
        header, buffers = await second.receive()
        assert header == b"start"
        assert buffers == [b"a" * LARGE, b"", b"b" * 2 * LARGE]
        for channel, why in ((first, "closed by the other end"), (second, "closed by the other end: why")):
            with pytest.raises(LinkBroken, match=why):
                await channel.receive()

    asyncio.run(main())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    flips=st.lists(st.tuples(st.integers(0, 2000), st.integers(1, 255)), max_size=4),
    junk=st.binary(max_size=100),
    at=st.integers(0, 300_000),
    cuts=st.lists(st.integers(0, 1 << 20), max_size=5),
)
def test_no_bytes_do_more_than_end_the_link(
    flips: list[tuple[int, int]], junk: bytes, at: int, cuts: list[int]
) -> None:
    async def main() -> None:
        data = bytearray(conversation())
        for position, bits in flips:
            data[position] ^= bits
        data[at:at] = junk
        opened: list[Channel] = []
        ended: list[Exception] = []
        mux = listening_mux(opened)
        mux.on_close(ended.append)
        feed(mux, bytes(data), cuts)
        mux.end(LinkBroken("enough"))
        await asyncio.sleep(0)
        assert len(ended) == 1
        for channel in opened:
            with contextlib.suppress(LinkError):
                while True:
                    await channel.receive()

    asyncio.run(main())
