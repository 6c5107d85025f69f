"""Endpoints: who finds whom, and one link between two."""

from __future__ import annotations

import asyncio
import os
import stat
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from link_harness import KEY, channel_between, endpoint, run, talk, turns, until

from collective.errors import HandshakeError, LinkBroken, LinkClosed, LinkError, PortRefused
from collective.links import default_host, open_endpoint
from collective.types import Address, Credential

if TYPE_CHECKING:
    from collective.abc import Endpoint, Link

OTHER = Credential("other", b"o" * 32)


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
