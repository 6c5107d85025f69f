"""Rights and ports: who may open what, and the channels that wait for their port."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from link_harness import KEY, pair, run, turns, until

from collective._links.ports import MOST_WAITING
from collective.errors import HandshakeError, LinkBroken, PortRefused
from collective.links import open_endpoint
from collective.types import Credential

if TYPE_CHECKING:
    from collective.abc import Channel


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


def test_what_was_granted_can_be_taken_back(kind: str) -> None:
    async def main() -> None:
        async with pair(kind) as both:
            both.there.serve("port", lambda channel: channel.close())
            both.there.revoke(Credential(KEY.name, b"another"))
            with pytest.raises(LinkBroken):
                await both.link.open("port").receive()
            both.there.revoke(KEY)
            both.there.revoke(KEY)
            with pytest.raises(PortRefused, match="not granted to credential 'gang'"):
                await both.link.open("port").receive()
            async with await open_endpoint(kinds=(kind,)) as third:
                with pytest.raises(HandshakeError, match="does not accept credential 'gang'"):
                    await third.connect(both.there.address, KEY)

    run(main)


def test_a_credential_is_its_key_and_not_its_name(kind: str) -> None:
    """Who is dialed with a key that it knows must not get what the dialer grants another key of that name."""

    async def main() -> None:
        async with await open_endpoint(kinds=(kind,)) as here, await open_endpoint(kinds=(kind,)) as there:
            known = Credential(KEY.name, b"another" * 5)
            there.grant(known)
            here.grant(KEY)
            arrived: asyncio.Future[Channel] = asyncio.get_running_loop().create_future()
            there.serve("port", arrived.set_result)
            here.serve("secret", lambda channel: channel.close())
            link = await here.connect(there.address, known)
            link.open("port")
            with pytest.raises(PortRefused, match="port 'secret' is not granted to credential 'gang'"):
                await (await arrived).link.open("secret").receive()

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
