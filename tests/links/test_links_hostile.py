"""Hostile bytes on every way into an endpoint: nothing is believed before the proof, and nothing kept after the end.

Kind: whatever an end reads is cut by fixed structs, and whatever comes along unasked is let go of.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import pickle
import socket
from typing import TYPE_CHECKING

import pytest
from link_harness import KEY, channel_between, endpoint, run, until

from collective._links import endpoint as endpoint_module
from collective._links import handshake, memfd, region, ring, switching
from collective._links import wire as w
from collective._links.handshake import NO_LINK, Verdict
from collective._links.stream import StreamCarrier
from collective.errors import HandshakeError, LinkBroken
from collective.links import open_endpoint
from collective.types import Address, Credential

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

    from collective._links.handshake import Hello
    from collective.abc import Channel, Endpoint


class Bomb:
    """Its pickle makes a directory where it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (self.path,)


@pytest.fixture
def bomb(tmp_path: Path) -> Iterator[bytes]:
    """A pickle that nobody is to unpickle."""
    path = tmp_path / "went off"
    yield pickle.dumps(Bomb(str(path)))
    assert not path.exists()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextlib.contextmanager
def luggage(count: int) -> Iterator[list[int]]:
    """Give descriptors to send along; they are closed here afterwards."""
    made = [os.open("/dev/null", os.O_RDONLY) for _ in range(count)]
    yield made
    for each in made:
        os.close(each)


def dial(address: Address) -> socket.socket:
    """Connect without any protocol."""
    path = address.shm or address.unix
    if path is None:
        assert address.tcp is not None
        return socket.create_connection(address.tcp)
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    return sock


def send(sock: socket.socket, data: bytes, along: list[int]) -> None:
    if sock.family == socket.AF_UNIX:
        socket.send_fds(sock, [data], along)
    else:
        sock.sendall(data)


def hello(address: Address, name: str = KEY.name) -> bytes:
    return handshake._HELLO.pack(
        handshake._MAGIC, handshake.VERSION, bytes(32), b"attacker", address.endpoint.encode(), name.encode(), NO_LINK
    )


def frames(bomb: bytes) -> bytes:
    """Return what would open a channel and say something there, were it believed."""
    return w.encode_open(2, "port", bomb, 1000) + w.encode_message(w.MESSAGE, 2, 0, bomb, [bomb], 2 * len(bomb) + 8)


STRANGE = {
    "frames at once": lambda address, bomb: [frames(bomb)],
    "frames instead of a proof": lambda address, bomb: [hello(address), frames(bomb)],
    "frames after a wrong proof": lambda address, bomb: [hello(address), bytes(32) + frames(bomb)],
    "frames after an unknown name": lambda address, bomb: [hello(address, "nobody"), bytes(32) + frames(bomb)],
    "frames with a hello": lambda address, bomb: [hello(address) + frames(bomb)],
    "a pickle": lambda address, bomb: [bomb],
    "half a hello": lambda address, bomb: [hello(address)[:100]],
    "a hello and half a proof": lambda address, bomb: [hello(address), bytes(16)],
    "a name that is no text": lambda address, bomb: [hello(address).replace(b"gang\0", b"\xff\xfe\xff\0\0"), bytes(32)],
    "an offer of memory": lambda address, bomb: [switching._OFFER.pack(switching._MAGIC, region.SIZE)],
}


@pytest.mark.parametrize("strange", STRANGE.values(), ids=STRANGE.keys())
def test_who_proves_nothing_is_not_believed(
    socket_kind: str, strange: Callable[[Address, bytes], list[bytes]], bomb: bytes
) -> None:
    async def main() -> None:
        async with await endpoint(socket_kind) as there, await open_endpoint(kinds=()) as here:
            opened: list[Channel] = []
            there.serve("port", opened.append)
            link = await here.connect(there.address, KEY)
            one, other = await channel_between(link, there, "honest")
            before = descriptors()
            with dial(there.address) as stranger, luggage(20) as along:
                for said in strange(there.address, bomb):
                    with contextlib.suppress(ConnectionError):  # It may have been enough already.
                        send(stranger, said, along)
                    await asyncio.sleep(0.02)
                with contextlib.suppress(OSError):
                    stranger.shutdown(socket.SHUT_WR)
                await until(lambda: not there._handshakes)  # type: ignore[attr-defined]
            assert len(there._all) == 1  # type: ignore[attr-defined]
            assert not opened
            assert descriptors() == before
            one.send_nowait(b"still here")
            assert (await other.receive()).header == b"still here"

    run(main)


@contextlib.asynccontextmanager
async def false_endpoint(answer: Callable[[StreamCarrier], Awaitable[None]], path: str) -> AsyncIterator[Address]:
    """Listen as an endpoint does, and say something else to who dials."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    listener.setblocking(False)
    carriers: list[StreamCarrier] = []

    async def accept() -> None:
        while True:  # It may dial again.
            connection, _ = await asyncio.get_running_loop().sock_accept(listener)
            carriers.append(StreamCarrier(connection, "dialer"))
            await answer(carriers[-1])

    accepting = asyncio.create_task(accept())
    async with await open_endpoint(kinds=()) as whoever:
        host = whoever._kinds["shm"]._host  # type: ignore[attr-defined]
    yield Address("false", host=host, shm=path)
    accepting.cancel()
    await asyncio.wait([accepting])
    for carrier in carriers:
        carrier.close()
    listener.close()


def challenge(status: int = 0) -> bytes:
    return handshake._CHALLENGE.pack(handshake._MAGIC, handshake.VERSION, status, bytes(32), b"false")


LIES = {
    "frames instead of a challenge": lambda bomb: frames(bomb),
    "a pickle instead of a challenge": lambda bomb: bomb + bytes(500),
    "frames instead of a verdict": lambda bomb: challenge() + frames(bomb),
    "acceptance without a proof": lambda bomb: challenge() + handshake._VERDICT.pack(0, NO_LINK, bytes(32)),
    "half a challenge": lambda bomb: challenge()[:20],
    "an unknown status": lambda bomb: challenge(77) + bytes(100),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_an_acceptor_that_proves_nothing_is_not_believed(
    lie: Callable[[bytes], bytes], bomb: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint_module, "_PAUSE", 0.001)

    async def main() -> None:
        async with await open_endpoint(kinds=()) as here:
            with luggage(20) as along:

                async def answer(carrier: StreamCarrier) -> None:
                    send(carrier._sock, lie(bomb), along)
                    carrier._sock.shutdown(socket.SHUT_WR)

                before = descriptors()
                async with false_endpoint(answer, str(tmp_path / "s")) as address:
                    with pytest.raises((HandshakeError, LinkBroken)):
                        await here.connect(address, KEY)
                assert descriptors() == before
                assert not here._all  # type: ignore[attr-defined]

    run(main)


def memory(nbytes: int = region.SIZE, *, sealed: bool = True) -> int:
    made = os.memfd_create("gangline-test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(made, nbytes)
    if sealed:
        fcntl.fcntl(made, fcntl.F_ADD_SEALS, memfd.SEALS)
    return made


def null() -> int:
    return os.open("/dev/null", os.O_RDWR)


OFFER = switching._OFFER.pack(switching._MAGIC, region.SIZE)
OFFERS: dict[str, tuple[bytes, list[Callable[[], int]]]] = {
    "no descriptor": (OFFER, []),
    "another file": (OFFER, [null]),
    "too many descriptors": (OFFER, [memory, memory, null, null]),
    "memory that can shrink": (OFFER, [lambda: memory(sealed=False)]),
    "memory of another size": (OFFER, [lambda: memory(4096)]),
    "a size that it has not": (switching._OFFER.pack(switching._MAGIC, 1 << 63), [memory]),
    "nothing, and a descriptor": (switching._OFFER.pack(switching._MAGIC, 0), [memory]),
}
shared_memory = pytest.mark.skipif(not ring.usable(), reason="rings need the store order of x86")


async def proven(there: Endpoint) -> StreamCarrier:
    """Return a connection whose other end believes that it is a member."""
    carrier = StreamCarrier(dial(there.address), "there")
    await handshake.dial(carrier, own="attacker", wanted=there.address.endpoint, credential=KEY, replaces=NO_LINK)
    return carrier


@shared_memory
@pytest.mark.parametrize(("offer", "along"), OFFERS.values(), ids=OFFERS.keys())
def test_memory_that_is_not_what_was_offered_is_let_go_of(offer: bytes, along: list[Callable[[], int]]) -> None:
    """The link goes on over the socket, and has none of the descriptors."""

    async def main() -> None:
        async with await endpoint("shm") as there:
            before = descriptors()
            carrier = await proven(there)
            opened: asyncio.Future[Channel] = asyncio.get_running_loop().create_future()
            there.serve("port", opened.set_result)
            made = [make() for make in along]
            send(carrier._sock, offer, made)
            for each in made:
                os.close(each)
            assert (await carrier.take(switching._ANSWER.size))[-region.NONCE :] == bytes(region.NONCE)
            carrier.put(frames(b"hello"))
            channel = await opened
            assert (await channel.receive()).header == b"hello"
            assert channel.link.kind == "unix"
            # A socket and at most a pidfd at each end.
            assert descriptors() - before <= 3
            carrier.close()
            await until(lambda: not there._all)  # type: ignore[attr-defined]
            assert descriptors() == before

    run(main)


def test_descriptors_beside_frames_are_let_go_of() -> None:
    async def main() -> None:
        async with await endpoint("unix") as there:
            opened: asyncio.Future[Channel] = asyncio.get_running_loop().create_future()
            there.serve("port", opened.set_result)
            carrier = await proven(there)
            before = descriptors()
            with luggage(20) as along:
                send(carrier._sock, frames(b"hello"), along)
                assert (await (await opened).receive()).header == b"hello"
            assert descriptors() == before
            carrier.close()

    run(main)


@shared_memory
@pytest.mark.parametrize("beside", [w.WAKE, w.WAKE * 3, w.SHOW, w.SHOWN.pack(w.SHOW, 0, 1 << 20) + w.WAKE])
def test_descriptors_that_belong_to_no_segment_end_a_link_of_shared_memory(beside: bytes) -> None:
    async def main() -> None:
        async with await endpoint("shm") as there, await open_endpoint(kinds=()) as here:
            before = descriptors()
            link = await here.connect(there.address, KEY)
            one, other = await channel_between(link, there, "honest")
            one.send_nowait(b"x")
            await other.receive()
            with luggage(3) as along:
                send(link.carrier._sock, beside, along)  # type: ignore[attr-defined]
                with pytest.raises(LinkBroken, match="does not speak this protocol"):
                    await other.receive()
            await until(lambda: link.closed)
            assert descriptors() == before

    run(main)


@shared_memory
@pytest.mark.parametrize("said", [OFFER[:5], b"GET / HTTP/1.1\r\n\r\n", frames(b"x"), bytes(16)])
def test_what_is_no_offer_ends_the_link_with_all_that_came_along(said: bytes) -> None:
    async def main() -> None:
        async with await endpoint("shm") as there:
            before = descriptors()
            carrier = await proven(there)
            with luggage(1) as along:
                for at in range(len(said)):  # one with each byte
                    with contextlib.suppress(ConnectionError):
                        send(carrier._sock, said[at : at + 1], along)
                    await asyncio.sleep(0)
                with contextlib.suppress(OSError):
                    carrier._sock.shutdown(socket.SHUT_WR)
                await until(lambda: not there._all)  # type: ignore[attr-defined]
            carrier.close()
            assert descriptors() == before

    run(main)


ANSWERS = {
    "no answer": lambda: b"GET / HTTP/1.1\r\n\r\n" + bytes(64),
    "frames": lambda: frames(b"x" * 100),
    "other memory": lambda: switching._ANSWER.pack(switching._MAGIC, region.SIZE, b"x" * region.NONCE),
    "descriptors beside it": lambda: switching._ANSWER.pack(switching._MAGIC, 0, bytes(region.NONCE)),
}


@shared_memory
@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS.keys())
def test_what_is_no_answer_to_an_offer_ends_the_link(answer: Callable[[], bytes], tmp_path: Path) -> None:
    """Also from who has the key; a descriptor that comes along is let go of."""

    async def main() -> None:
        async with await open_endpoint(kinds=()) as here:

            async def lie(carrier: StreamCarrier) -> None:
                async def decide(hello: Hello) -> Verdict:
                    return Verdict(handshake.ACCEPTED, hello.number)

                def find(name: str) -> Credential:
                    return KEY

                await handshake.accept(carrier, own="false", find=find, decide=decide)
                with luggage(1) as along:
                    send(carrier._sock, answer(), along)

            before = descriptors()
            async with false_endpoint(lie, str(tmp_path / "s")) as address:
                link = await here.connect(address, KEY)
                ended: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
                link.on_close(ended.set_result)
                assert "does not speak this protocol" in str(await ended)
            assert descriptors() == before

    run(main)
