"""Endpoints: who finds whom, one link between two, and who may open what."""

from __future__ import annotations

import asyncio
import gc
import os
import stat
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from link_harness import KEY, channel_between, endpoint, pair, run, turns, until

from collective._links.ports import MOST_WAITING
from collective.errors import HandshakeError, LinkBroken, LinkClosed, LinkError, PortRefused
from collective.links import default_host, loop_endpoint, open_endpoint
from collective.types import Address, Credential

if TYPE_CHECKING:
    from collective.abc import Channel, Endpoint, Link

OTHER = Credential("other", b"o" * 32)


async def talk(link: Link, there: Endpoint, port: str = "port") -> None:
    one, other = await channel_between(link, there, port)
    one.send_nowait(b"ping")
    assert (await other.receive()).header == b"ping"
    other.send_nowait(b"pong")
    assert (await one.receive()).header == b"pong"
    one.close()


# Reaching each other.


def test_an_endpoint_that_only_dials_reaches_every_kind(kind: str) -> None:
    async def main() -> None:
        async with await open_endpoint(kinds=()) as here, await endpoint(kind) as there:
            assert here.address == Address(here.address.endpoint)
            link = await here.connect(there.address, KEY)
            assert (link.kind, link.remote, link.credential) == (kind, there.address.endpoint, "gang")
            await talk(link, there)

    run(main)


def test_a_link_serves_the_other_direction_too(kind: str) -> None:
    """Who only dials can be reached over the link that it opened, by who has the same credential."""

    async def main() -> None:
        async with await open_endpoint(kinds=()) as here, await endpoint(kind) as there:
            await here.connect(there.address, KEY)
            back = await there.connect(here.address, KEY)
            assert back.remote == here.address.endpoint
            with pytest.raises(PortRefused, match="not granted"):
                await back.open("port").receive()
            here.grant(KEY, ["port"])
            await talk(back, here)
            with pytest.raises(LinkBroken, match="nothing that can be reached"):
                await there.connect(here.address, OTHER)

    run(main)


@pytest.mark.parametrize(
    ("kinds", "dialer", "host", "expected"),
    [
        (("unix", "tcp"), ("unix", "tcp"), "a", "unix"),
        (("unix", "tcp"), (), "a", "unix"),
        (("unix", "tcp"), (), "b", "tcp"),
        (("shm", "unix", "tcp"), (), "a", "shm"),
        (("shm", "tcp"), ("unix",), "a", "shm"),
        (("memory", "shm", "tcp"), ("memory",), "b", "memory"),
        (("shm", "tcp"), ("shm",), "b", "tcp"),
        (("memory", "unix", "tcp"), ("memory",), "b", "memory"),
        (("memory", "unix", "tcp"), ("tcp",), "a", "unix"),
        (("memory",), (), "b", "memory"),
    ],
)
def test_the_best_kind_is_taken(kinds: tuple[str, ...], dialer: tuple[str, ...], host: str, expected: str) -> None:
    async def main() -> None:
        async with await open_endpoint(kinds=kinds, host="a") as there:
            there.grant(KEY)
            assert (there.address.unix is None, there.address.tcp is None) == ("unix" not in kinds, "tcp" not in kinds)
            async with await open_endpoint(kinds=dialer, host=host) as here:
                assert (await here.connect(there.address, KEY)).kind == expected

    run(main)


def test_a_unix_socket_that_is_gone_gives_way_to_tcp() -> None:
    async def main() -> None:
        async with await open_endpoint(host="a") as there, await open_endpoint(kinds=(), host="a") as here:
            there.grant(KEY)
            assert there.address.unix is not None
            os.unlink(there.address.unix)
            assert (await here.connect(there.address, KEY)).kind == "tcp"

    run(main)


@pytest.mark.parametrize("kind", ["shm", "unix"])
def test_the_directory_of_the_unix_socket_is_private_and_goes(kind: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with await open_endpoint(kinds=(kind,), directory=str(tmp_path)) as there:
            path = there.address.shm or there.address.unix
            assert path is not None
            directory = Path(path).parent
            assert directory.parent == tmp_path
            assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert os.listdir(tmp_path) == []
        long = tmp_path / ("x" * 100)
        long.mkdir()
        with pytest.raises(ValueError, match="too long"):
            await open_endpoint(kinds=(kind,), directory=str(long))
        assert os.listdir(long) == []
        with pytest.raises(ValueError, match="pigeon"):
            await open_endpoint(kinds=("unix", "pigeon"), directory=str(tmp_path))

    run(main)


def test_memory_links_stay_within_a_loop() -> None:
    address: list[Address] = []
    ready, done = threading.Event(), threading.Event()

    async def other() -> None:
        async with await endpoint("memory") as there:
            address.append(there.address)
            ready.set()
            await asyncio.to_thread(done.wait)

    async def main() -> None:
        async with await endpoint("memory") as here:
            with pytest.raises(LinkBroken, match=r"belongs to event loop .* this one to .*"):
                await here.connect(address[0], KEY)

    thread = threading.Thread(target=lambda: run(other))
    thread.start()
    ready.wait()
    try:
        run(main)
    finally:
        done.set()
        thread.join()


def test_nobody_there(kind: str) -> None:
    async def main() -> None:
        async with await endpoint(kind) as here:
            there = await endpoint(kind)
            address = there.address
            await there.aclose()
            await there.aclose()
            with pytest.raises(LinkBroken, match=address.endpoint):
                await here.connect(address, KEY)
            with pytest.raises(LinkBroken, match="nothing that can be reached"):
                await here.connect(Address("nobody"), KEY)
            with pytest.raises(LinkClosed, match=address.endpoint):
                await there.connect(here.address, KEY)

    run(main)


@pytest.mark.parametrize("kind", ["shm", "unix", "tcp"])
def test_somebody_else_there(kind: str) -> None:
    async def main() -> None:
        async with await endpoint(kind) as here, await endpoint(kind) as there:
            wanted = replace(there.address, endpoint="another")
            with pytest.raises(HandshakeError, match=f"is endpoint '{there.address.endpoint}', not 'another'"):
                await here.connect(wanted, KEY)
            await here.connect(there.address, KEY)

    run(main)


def test_an_endpoint_may_connect_to_itself(kind: str) -> None:
    async def main() -> None:
        async with await endpoint(kind) as here:
            link = await here.connect(here.address, KEY)
            assert await here.connect(here.address, KEY) is link
            await talk(link, here)
            await link.aclose()
            again = await here.connect(here.address, KEY)
            assert again is not link
            await talk(again, here, "again")

    run(main)


# One link.


def test_concurrent_connects_share_a_dial(kind: str) -> None:
    async def main() -> None:
        async with await endpoint(kind) as here, await endpoint(kind) as there:
            links = await asyncio.gather(*(here.connect(there.address, KEY) for _ in range(20)))
            assert len(set(links)) == 1
            assert await there.connect(here.address, KEY)
            there.grant(OTHER)
            other = await here.connect(there.address, OTHER)
            assert other is not links[0]
            assert other.credential == "other"

    run(main)


def test_a_dial_that_all_callers_gave_up_is_made_again(kind: str) -> None:
    async def main() -> None:
        async with await endpoint(kind) as here, await endpoint(kind) as there:
            for steps in range(12):
                callers = [asyncio.create_task(here.connect(there.address, KEY)) for _ in range(2)]
                await turns(steps)
                callers[0].cancel()
                await turns(steps % 3)
                callers[1].cancel()
                await asyncio.wait(callers)
                link = await here.connect(there.address, KEY)
                await talk(link, there)
                await link.aclose()

    run(main)


@pytest.mark.parametrize("delay", range(14))
def test_simultaneous_dials_end_with_one_link(kind: str, loop: str, delay: int) -> None:
    async def main() -> None:
        async with await endpoint(kind) as one, await endpoint(kind) as other:

            async def dial(here: Endpoint, there: Endpoint, wait: int) -> Link:
                await turns(wait)
                return await here.connect(there.address, KEY)

            for first, second in ((one, other), (other, one)):
                here, there = await asyncio.gather(dial(first, second, 0), dial(second, first, delay))
                probe, far = await channel_between(here, second, f"from-{delay}")
                assert far.link is there  # The same link, seen from its two ends.
                probe.send_nowait(b"ping")
                assert (await far.receive()).header == b"ping"
                assert len(one._all) == len(other._all) == 1  # type: ignore[attr-defined]
                await here.aclose()
                second.unserve(f"from-{delay}")

    run(main, loop=loop)


def test_many_endpoints_dial_each_other_at_once(kind: str) -> None:
    async def main() -> None:
        endpoints = [await endpoint(kind) for _ in range(6)]
        pairs = [(one, other) for one in endpoints for other in endpoints]
        links = await asyncio.gather(*(one.connect(other.address, KEY) for one, other in pairs))
        assert not any(link.closed for link in links)
        for one in endpoints:
            one.serve("who", lambda channel, one=one: channel.send_nowait(one.address.endpoint.encode()))
        for (_, other), link in zip(pairs, links, strict=True):
            assert (await link.open("who").receive()).header.decode() == other.address.endpoint
        for one in endpoints:
            assert len(one._all) == len(endpoints) + 1  # type: ignore[attr-defined]  # A link to oneself has two ends.
        await asyncio.gather(*(one.aclose() for one in endpoints))

    run(main)


def test_a_link_that_one_end_lost_is_replaced(kind: str) -> None:
    """The other end may not have heard of the loss when the next dial comes."""

    async def main() -> None:
        async with await endpoint(kind) as here, await endpoint(kind) as there:
            for i in range(5):
                link = await here.connect(there.address, KEY)
                ended: list[Exception] = []
                (await there.connect(here.address, KEY)).on_close(ended.append)
                link.end(LinkBroken("lost"))  # type: ignore[attr-defined]
                again = await here.connect(there.address, KEY)
                assert again is not link
                await talk(again, there, f"port-{i}")
                assert isinstance(ended[0], LinkBroken)
                assert len(there._all) == 1  # type: ignore[attr-defined]

    run(main)


@pytest.mark.parametrize("closer", ["here", "there"])
def test_closing_an_endpoint_ends_its_dials(kind: str, closer: str) -> None:
    async def main() -> None:
        for steps in range(10):
            async with await endpoint(kind) as here, await endpoint(kind) as there:
                connecting = asyncio.create_task(here.connect(there.address, KEY))
                await turns(steps)
                if steps % 2:
                    (here if closer == "here" else there).abort()
                await (here if closer == "here" else there).aclose()
                try:
                    link = await connecting
                except LinkError:
                    continue
                await until(lambda link=link: link.closed)

    run(main)


# Rights and ports.


def test_a_credential_opens_the_ports_that_it_was_granted(kind: str) -> None:
    async def main() -> None:
        async with await open_endpoint(kinds=(kind,)) as there, await open_endpoint(kinds=()) as here:
            with pytest.raises(TypeError, match="one string"):
                there.grant(KEY, "calls")
            there.grant(KEY, ["calls", "group:"])
            link = await here.connect(there.address, KEY)
            served: list[str] = []
            for port in ("calls", "group:dp", "group", "secret", ""):
                there.serve(port, lambda channel: served.append(channel.port))
            for port in ("calls", "group:dp"):
                link.open(port)
            for port in ("group", "secret", ""):
                with pytest.raises(PortRefused, match=f"port '{port}' is not granted to credential 'gang'"):
                    await link.open(port).receive()
            assert served == ["calls", "group:dp"]
            there.grant(KEY, ["secret"])  # Replaces the grant, also for links that are open.
            with pytest.raises(PortRefused):
                await link.open("calls").receive()
            link.open("secret")
            await until(lambda: served[-1] == "secret")

    run(main)


def test_a_refused_channel_ends_for_all_that_use_it(kind: str) -> None:
    async def main() -> None:
        async with pair(kind) as both:
            both.there.grant(KEY, ["nothing"])
            channel = both.link.open("port", b"payload")
            channel.send_nowait(b"")
            sending = asyncio.create_task(channel.send(b"", [bytes(1 << 22)]))
            ends: list[Exception] = []
            channel.subscribe(lambda _: None, ends.append)
            with pytest.raises(PortRefused):
                await sending
            await until(lambda: len(ends) == 1)
            assert isinstance(ends[0], PortRefused)
            with pytest.raises(PortRefused):
                channel.send_nowait(b"")
            channel.post(b"")
            assert both.link.statistics().channels == 0

    run(main)


def test_channels_wait_for_their_port(kind: str) -> None:
    async def main() -> None:
        async with pair(kind) as both:
            early = [both.link.open("late", b"%d" % i) for i in range(3)]
            for i, channel in enumerate(early):
                channel.send_nowait(b"first %d" % i)
            early[1].close()
            await turns()
            served: list[Channel] = []
            both.there.serve("late", served.append)
            await until(lambda: len(served) == 3)
            assert [channel.payload for channel in served] == [b"0", b"1", b"2"]
            for i, channel in enumerate(served):
                assert (await channel.receive()).header == b"first %d" % i

    run(main)


def test_the_number_of_channels_that_wait_is_bounded(kind: str) -> None:
    async def main() -> None:
        async with pair(kind) as both:
            waiting = [both.link.open(f"late-{i % 7}") for i in range(MOST_WAITING)]
            with pytest.raises(PortRefused, match="not served yet"):
                await both.link.open("one-more").receive()
            both.there.serve("late-0", lambda channel: channel.send_nowait(b"here"))
            assert (await waiting[0].receive()).header == b"here"
            more = both.link.open("one-more")
            more.send_nowait(b"x")
            arrived: asyncio.Future[Channel] = asyncio.get_running_loop().create_future()
            both.there.serve("one-more", arrived.set_result)
            assert (await (await arrived).receive()).header == b"x"
            await both.link.aclose()
            again = await both.here.connect(both.there.address, KEY)
            for i in range(MOST_WAITING):
                again.open(f"late-{i % 7 + 1}")
            with pytest.raises(PortRefused):
                await again.open("yet-another").receive()

    run(main)


def test_a_port_that_is_no_longer_served_refuses(kind: str) -> None:
    async def main() -> None:
        async with pair(kind) as both:
            one, other = await both.channel()
            waiting = both.link.open("never")
            waiting.send_nowait(b"")
            await turns()
            both.there.unserve("port-1")
            both.there.unserve("never")
            for channel in (waiting, both.link.open("never"), both.link.open("port-1")):
                with pytest.raises(PortRefused, match="no longer served"):
                    await channel.receive()
            one.send_nowait(b"open channels stay open")
            assert (await other.receive()).header == b"open channels stay open"

    run(main)


def test_a_port_whose_callback_fails_is_reported_and_its_channel_closed(kind: str) -> None:
    async def main() -> None:
        complaints: list[dict[str, object]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        async with pair(kind) as both:

            def fail(channel: Channel) -> None:
                raise KeyError("mine")

            both.there.serve("port", fail)
            with pytest.raises(LinkBroken):
                await both.link.open("port").receive()
            assert str(complaints[0]["exception"]) == "'mine'"

    run(main)


# The loop's own endpoint.


def test_a_loop_has_one_endpoint_that_closes_with_it(loop: str) -> None:
    seen: list[Endpoint] = []

    async def main() -> None:
        async with await endpoint("unix") as there:
            assert loop_endpoint() is loop_endpoint()
            assert await asyncio.create_task(asyncio.sleep(0, loop_endpoint())) is loop_endpoint()
            link = await loop_endpoint().connect(there.address, KEY)
            await talk(link, there)
            seen.append(loop_endpoint())

    for _ in range(5):
        run(main, loop=loop)
        assert not seen[-1]._all  # type: ignore[attr-defined]
        gc.collect()  # A socket that was left open would warn here, and warnings are errors.
    assert len(set(map(id, seen))) == 5
    with pytest.raises(RuntimeError, match="no running event loop"):
        loop_endpoint()


def test_threads_have_loops_and_endpoints_of_their_own() -> None:
    async def main() -> None:
        async with await open_endpoint(kinds=("unix", "tcp")) as there:
            there.grant(KEY)

            async def dial() -> str:
                link = await loop_endpoint().connect(there.address, KEY)
                assert (await link.open("hello").receive()).header == b"hello"
                return loop_endpoint().address.endpoint

            there.serve("hello", lambda channel: channel.send_nowait(b"hello"))
            names = await asyncio.gather(*(asyncio.to_thread(lambda: asyncio.run(dial())) for _ in range(8)))
            assert len(set(names)) == 8
            await until(lambda: not there._all)  # type: ignore[attr-defined]

    run(main)


def test_a_loop_that_was_just_closed_leaves_nothing_open() -> None:
    def without_shutdown() -> Endpoint:
        loop = asyncio.new_event_loop()

        async def main() -> Endpoint:
            there = await endpoint("tcp")
            await loop_endpoint().connect(there.address, KEY)
            there.abort()
            return loop_endpoint()

        ended = loop.run_until_complete(main())
        loop.close()
        return ended

    async def main() -> None:
        loop_endpoint()
        assert not ended._all  # type: ignore[attr-defined]

    ended = without_shutdown()
    run(main)
    gc.collect()


def test_the_host_can_be_pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    real = default_host()
    assert real
    assert real == default_host()
    monkeypatch.setenv("GANGLINE_HOST", "pretended")
    assert default_host() == "pretended"

    async def main() -> None:
        async with await open_endpoint() as there, await open_endpoint(kinds=(), host=real) as here:
            there.grant(KEY)
            assert there.address.host == "pretended"
            assert (await here.connect(there.address, KEY)).kind == "tcp"

    run(main)
