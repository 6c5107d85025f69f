"""The endpoint that every event loop has, and that ends with it."""

from __future__ import annotations

import asyncio
import gc
import os
from typing import TYPE_CHECKING

import pytest
import uvloop
from link_harness import KEY, endpoint, run, talk, until

from collective._links import poller
from collective.links import loop_endpoint, open_endpoint

if TYPE_CHECKING:
    from collective.abc import Channel, Endpoint
    from collective.types import Address

MIB = 1 << 20


def echo(channel: Channel) -> None:
    """Answer each message when it has come."""
    channel.subscribe(lambda _: channel.send_nowait(b""), lambda _: None)


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


@pytest.mark.parametrize("ends", ["run_until_complete", "run_forever", "in the middle"])
def test_a_loop_that_is_just_closed_leaves_nothing_open(socket_kind: str, loop: str, ends: str) -> None:
    """A loop's endpoint goes with it, however it ends: without shutdown_asyncgens, and without any call after it."""

    def in_a_loop_of_its_own(address: Address) -> None:
        own = (uvloop if loop == "uvloop" else asyncio).new_event_loop()

        async def dial() -> None:
            link = await loop_endpoint().connect(address, KEY)
            channel = link.open("echo")
            await channel.send(b"", [bytes(3 * MIB)])
            await channel.receive()
            if ends == "run_forever":
                own.stop()
            elif ends == "in the middle":
                own.call_soon(own.stop)
                await channel.send(b"", [bytes(3 * MIB)])
                await channel.receive()

        if ends == "run_until_complete":
            own.run_until_complete(dial())
        else:
            task = own.create_task(dial())
            own.run_forever()
            task._log_destroy_pending = False  # type: ignore[attr-defined]  # It is abandoned: that is the point.
        own.close()

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    async def main() -> None:
        async with await endpoint(socket_kind) as there:
            there.serve("echo", echo)
            await asyncio.to_thread(in_a_loop_of_its_own, there.address)
            await until(lambda: not there._all)  # type: ignore[attr-defined]
            before = descriptors()
            for _ in range(5):
                await asyncio.to_thread(in_a_loop_of_its_own, there.address)
                await until(lambda: not there._all)  # type: ignore[attr-defined]
            await until(lambda: descriptors() <= before)
        assert not poller._pollers

    run(main)
    gc.collect()  # A socket that was left open would warn here, and warnings are errors.
