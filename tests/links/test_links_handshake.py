"""Who cannot prove its credential gets nowhere, learns nothing, and costs no more than its socket."""

from __future__ import annotations

import asyncio
import errno
import os
import pickle
import resource
import socket
from typing import TYPE_CHECKING
from unittest.mock import Mock

import pytest
from link_harness import KEY, channel_between, endpoint, pair, run, turns, until

from collective._links import endpoint as endpoint_module
from collective._links import handshake
from collective._links.handshake import NO_LINK, Hello, Verdict
from collective._links.memory import MemoryCarrier
from collective.errors import HandshakeError, LinkBroken, LinkError, OutOfResources
from collective.links import open_endpoint
from collective.types import Address, Credential

if TYPE_CHECKING:
    from collections.abc import Callable

    from collective._links.carrier import Carrier
    from collective.abc import Endpoint

SECRET = b"very secret key of 32 bytes.... "


async def raw(address: Address) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect without any protocol."""
    path = address.shm or address.unix
    if path is not None:
        return await asyncio.open_unix_connection(path)
    assert address.tcp is not None
    return await asyncio.open_connection(*address.tcp)


async def still_works(here: Endpoint, there: Endpoint, port: str = "still") -> None:
    link = await here.connect(there.address, KEY)
    one, other = await channel_between(link, there, port)
    one.send_nowait(b"x")
    assert (await other.receive()).header == b"x"


WRONG = (Credential("gang", b"wrong"), Credential("unknown", KEY.key), Credential("gang", b""))


@pytest.mark.parametrize("credential", WRONG)
def test_a_wrong_credential_is_refused_at_once(kind: str, credential: Credential) -> None:
    async def main() -> None:
        async with await endpoint(kind) as there, await open_endpoint(kinds=()) as here:
            async with asyncio.timeout(2):
                with pytest.raises(HandshakeError, match=f"credential '{credential.name}'") as caught:
                    await here.connect(there.address, credential)
            assert "wrong" not in str(caught.value)
            await still_works(here, there)
            assert len(there._all) == 1  # type: ignore[attr-defined]

    run(main)


def test_the_key_is_in_no_text(kind: str) -> None:
    async def main() -> None:
        credential = Credential("gang", SECRET)
        async with await open_endpoint(kinds=(kind,)) as there, await open_endpoint(kinds=()) as here:
            there.grant(Credential("gang", SECRET + b"!"))
            with pytest.raises(HandshakeError) as caught:
                await here.connect(there.address, credential)
            there.grant(credential)
            link = await here.connect(there.address, credential)
            channel = link.open("port")
            told = (caught.value, credential, link, channel, here, there, there.address, link.statistics())
            assert not any("secret" in repr(thing) or "secret" in str(thing) for thing in told)

    run(main)


def test_a_name_that_is_too_long_is_an_error_at_the_call(kind: str) -> None:
    async def main() -> None:
        async with await endpoint(kind) as there, await open_endpoint(kinds=()) as here:
            for name in ("", "x" * 129, "a\0b"):
                with pytest.raises(ValueError, match="credential's name"):
                    await here.connect(there.address, Credential(name, b"k"))

    run(main)


async def prove(
    mangle: Callable[[int, bytes], bytes], *, accepting: Credential = KEY, dialing: Credential = KEY
) -> tuple[BaseException | Verdict | None, BaseException | Verdict | None]:
    """Run a handshake over a wire that changes what is said; return what each end made of it."""
    one, near = MemoryCarrier.pair("dialer", "wire")
    far, other = MemoryCarrier.pair("wire", "acceptor")

    async def decide(hello: Hello) -> Verdict:
        assert hello.endpoint == "dialer"
        return Verdict(handshake.ACCEPTED, hello.number)

    async def forward(said: int, source: MemoryCarrier, target: MemoryCarrier, size: int) -> None:
        target.put(mangle(said, await source.take(size)))

    async def wire() -> None:
        try:
            await forward(0, near, far, handshake._HELLO.size)
            await forward(1, far, near, handshake._CHALLENGE.size)
            await forward(2, near, far, 32)
            await forward(3, far, near, handshake._VERDICT.size)
        except LinkBroken:
            near.close()
            far.close()

    async def both(which: str) -> BaseException | Verdict | None:
        try:
            if which == "dialer":
                return await handshake.dial(one, own="dialer", wanted="acceptor", credential=dialing, replaces=NO_LINK)
            return await handshake.accept(other, own="acceptor", find={accepting.name: accepting}.get, decide=decide)
        except LinkError as error:
            return error
        finally:
            (one if which == "dialer" else other).close()

    relay = asyncio.create_task(wire())
    results = await asyncio.gather(both("dialer"), both("acceptor"))
    await relay
    return results[0], results[1]


def test_both_ends_agree_on_the_number_of_the_link() -> None:
    async def main() -> None:
        dialer, acceptor = await prove(lambda said, data: data)
        assert isinstance(dialer, Verdict)
        assert (dialer.status, len(dialer.number)) == (handshake.ACCEPTED, handshake.NUMBER)
        assert acceptor is None

    run(main)


def test_any_byte_that_is_changed_on_the_way_fails_the_dialer() -> None:
    async def main() -> None:
        sizes = (handshake._HELLO.size, handshake._CHALLENGE.size, 32, handshake._VERDICT.size)
        for which, size in enumerate(sizes):
            for at in range(size):

                def flip(said: int, data: bytes, which: int = which, at: int = at) -> bytes:
                    return data if said != which else data[:at] + bytes([data[at] ^ 0x80]) + data[at + 1 :]

                dialer, acceptor = await prove(flip)
                assert isinstance(dialer, HandshakeError | LinkBroken), (which, at)
                assert isinstance(acceptor, HandshakeError | LinkBroken) or which == 3, (which, at)

    run(main)


def test_an_acceptor_without_the_key_is_found_out() -> None:
    async def main() -> None:
        def forged(said: int, data: bytes) -> bytes:
            return bytes([handshake.ACCEPTED]) + data[1:] if said == 3 else data

        dialer, acceptor = await prove(forged, accepting=Credential("gang", b"guess"))
        assert isinstance(dialer, HandshakeError)
        assert "does not have the key" in str(dialer)
        assert isinstance(acceptor, HandshakeError)

    run(main)


def test_proofs_cannot_be_sent_back_or_used_again(socket_kind: str) -> None:
    """Who has only heard others prove themselves can prove nothing."""

    async def main() -> None:
        async with await endpoint(socket_kind) as there, await endpoint(socket_kind) as here:
            # A false endpoint: it passes the dialer's words on to the real one, and records them.
            heard: list[bytes] = []

            async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                far_reader, far_writer = await raw(there.address)
                for source, target, size in (
                    (reader, far_writer, handshake._HELLO.size),
                    (far_reader, writer, handshake._CHALLENGE.size),
                    (reader, far_writer, 32),
                ):
                    heard.append(await source.readexactly(size))
                    target.write(heard[-1])
                # It answers with the dialer's own proof instead of one by the acceptor.
                writer.write(bytes([handshake.ACCEPTED]) + bytes(handshake.NUMBER) + heard[-1])
                await writer.drain()
                far_writer.close()
                writer.close()

            server = await asyncio.start_server(relay, "127.0.0.1", 0)
            async with server:
                address = Address(there.address.endpoint, tcp=server.sockets[0].getsockname())
                with pytest.raises(HandshakeError, match="does not have the key"):
                    await here.connect(address, KEY)
            await until(lambda: not there._all)  # type: ignore[attr-defined]
            # The recorded dial again: another nonce comes back, so that the old proof is none.
            reader, writer = await raw(there.address)
            writer.write(heard[0])
            assert await reader.readexactly(handshake._CHALLENGE.size) != heard[1]
            writer.write(heard[2])
            assert (await reader.read())[0] == handshake._DENIED
            writer.close()
            # The dialer's words back to itself: it is not whom it wanted.
            reader, writer = await raw(here.address)
            writer.write(heard[0])
            assert handshake._CHALLENGE.unpack(await reader.read())[2] == handshake._OTHER_ENDPOINT
            writer.close()
            await still_works(here, there)

    run(main)


def test_another_version_is_named() -> None:
    async def main() -> None:
        def older(said: int, data: bytes) -> bytes:
            return data[:8] + (7).to_bytes(2, "little") + data[10:] if said in (0, 1) else data

        dialer, _ = await prove(older)
        assert isinstance(dialer, HandshakeError)
        assert "version 7" in str(dialer)

    run(main)


@pytest.mark.parametrize("junk", [b"", b"GET / HTTP/1.1\r\n\r\n", bytes(4096), b"gangline" + b"\xff" * 4096])
def test_strangers_cost_their_socket(socket_kind: str, junk: bytes) -> None:
    async def main() -> None:
        async with await endpoint(socket_kind) as there, await endpoint(socket_kind) as here:
            strangers = [await raw(there.address) for _ in range(20)]
            for _, writer in strangers:
                writer.write(junk)
            await still_works(here, there)
            for reader, writer in strangers:
                if junk:
                    try:
                        await reader.read()
                    except ConnectionResetError:
                        assert junk
                writer.close()
            await until(lambda: not there._handshakes)  # type: ignore[attr-defined]
            await still_works(here, there, "again")

    run(main)


def test_who_says_nothing_is_dropped_after_a_while(socket_kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "SECONDS", 0.05)

    async def main() -> None:
        async with await endpoint(socket_kind) as there:
            reader, writer = await raw(there.address)
            assert await reader.read() == b""
            writer.close()

            silent = socket.create_server(("127.0.0.1", 0))
            address = Address("silent", tcp=silent.getsockname())
            with pytest.raises(LinkBroken, match=r"did not answer within 0\.05 s"):
                await there.connect(address, KEY)
            silent.close()

    run(main)


def test_a_flood_of_strangers_does_not_keep_others_out(socket_kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "_MOST_HANDSHAKES", 8)

    async def main() -> None:
        async with await endpoint(socket_kind) as there, await endpoint(socket_kind) as here:
            strangers = [await raw(there.address) for _ in range(100)]
            await still_works(here, there)
            assert len(there._handshakes) <= 8  # type: ignore[attr-defined]
            for _, writer in strangers:
                writer.close()

    run(main)


def test_an_endpoint_out_of_descriptors_goes_on_when_it_has_some(socket_kind: str) -> None:
    async def main() -> None:
        async with await endpoint(socket_kind) as there, await endpoint(socket_kind) as here:
            await here.connect(there.address, KEY)
            path = there.address.shm or there.address.unix
            pending = [socket.socket(socket.AF_UNIX if path else socket.AF_INET) for _ in range(3)]
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            lowest = os.dup(0)
            os.close(lowest)
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
            try:
                for sock in pending:
                    sock.connect(path or there.address.tcp)
                await turns(50)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            await until(lambda: len(there._handshakes) == 3)  # type: ignore[attr-defined]
            for sock in pending:
                sock.close()

    run(main)


def test_an_acceptor_that_goes_in_the_middle_is_told_as_such(kind: str) -> None:
    async def main() -> None:
        told: list[str] = []
        for steps in range(8):
            async with pair(kind) as both, await open_endpoint(kinds=()) as here:
                connecting = asyncio.create_task(here.connect(both.there.address, KEY))
                await turns(steps)
                both.there.abort()
                try:
                    link = await connecting
                except LinkBroken as error:
                    told.append(str(error).replace(both.there.address.endpoint, "THERE"))
                else:
                    await until(lambda link=link: link.closed)
        assert all(text.startswith("cannot connect to endpoint THERE") for text in told)

    run(main)


# The kind: a shortage is an error that names it, at the call. Nobody waits for ever, and it passes.


def test_a_dialer_is_told_that_the_acceptor_has_no_descriptors_left(socket_kind: str) -> None:
    async def main() -> None:
        async with await endpoint(socket_kind) as there, await endpoint(socket_kind) as here:
            (kind,) = (kind for kind in there._kinds.values() if kind._socket is not None)  # type: ignore[attr-defined]
            genuine = kind._socket
            kind._socket = Mock(wraps=genuine)
            errors = [OSError(errno.EMFILE, "Too many open files")]
            kind._socket.accept.side_effect = lambda: genuine.accept() if not errors else raise_(errors.pop())
            with pytest.raises(OutOfResources, match=r"at the other end of .* has no file descriptors left"):
                await here.connect(there.address, KEY)
            await still_works(here, there)
            kind._socket = genuine

    run(main)


def raise_(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(("number", "what"), [(errno.EMFILE, "file descriptors"), (errno.ENOBUFS, "memory")])
def test_a_dialer_without_resources_says_which(socket_kind: str, number: int, what: str) -> None:
    async def main() -> None:
        async with await endpoint(socket_kind) as there, await endpoint(socket_kind) as here:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(socket, "socket", lambda *_: raise_(OSError(number, "none left")))
                with pytest.raises(OutOfResources, match=rf"this process \(\d+\) has no {what} left") as raised:
                    await here.connect(there.address, KEY)
            assert (raised.value.resource, isinstance(raised.value, OSError)) == (what, True)
            copied = pickle.loads(pickle.dumps(raised.value))
            assert (str(copied), copied.errno) == (str(raised.value), raised.value.errno)
            await still_works(here, there)

    run(main)


# The kind: no short deadline decides. A busy process answers late, and is not lost.


def test_an_acceptor_that_is_busy_is_waited_for(
    socket_kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It answers none of the first attempts in time."""
    monkeypatch.setattr(handshake, "SECONDS", 0.1)
    monkeypatch.setattr(endpoint_module, "_NOTICE", 0.01)

    async def main() -> None:
        async with await endpoint(socket_kind) as there, await endpoint(socket_kind) as here:
            (kind,) = (kind for kind in there._kinds.values() if kind._socket is not None)  # type: ignore[attr-defined]
            loop = asyncio.get_running_loop()
            loop.remove_reader(kind._socket.fileno())
            loop.call_later(0.25, kind._resume)
            await still_works(here, there)

    run(main)
    assert "still waiting for endpoint" in caplog.text


def test_a_dialer_that_was_turned_away_unheard_comes_again(socket_kind: str) -> None:
    """As where an acceptor had more dialers than it keeps, and let the oldest go."""

    async def main() -> None:
        async with await endpoint(socket_kind) as there, await endpoint(socket_kind) as here:
            genuine, turned = there._accept, []  # type: ignore[attr-defined]

            def accept(carrier: Carrier) -> None:
                if len(turned) < 2:
                    turned.append(carrier)
                    carrier.close()
                else:
                    genuine(carrier)

            (kind,) = (kind for kind in there._kinds.values() if kind._socket is not None)  # type: ignore[attr-defined]
            kind._accept = accept
            await still_works(here, there)
            assert len(turned) == 2

    run(main)


def test_strangers_take_no_more_than_a_fourth_of_the_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 1000))
    assert endpoint_module._most_handshakes() == 25
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert endpoint_module._most_handshakes() == endpoint_module._MOST_HANDSHAKES
