"""The endpoint that every event loop has, and that ends with it."""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING

import pytest
from link_harness import KEY, endpoint, run, talk, until

from collective.links import loop_endpoint, open_endpoint

if TYPE_CHECKING:
    from collective.abc import Endpoint


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
