"""What only links over shared memory have: the switch from the socket, the rings, the poller, and forks."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import pytest
from link_harness import KEY, Pair, channel_between, endpoint, pair, run, until

from collective._links import pages, poller, region, rights, ring
from collective.errors import LinkBroken
from collective.links import open_endpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from collective._links.shm import ShmCarrier
    from collective.abc import Message

pytestmark = pytest.mark.skipif(not ring.usable(), reason="rings need the store order of x86")


def carrier(both: Pair) -> ShmCarrier:
    shm: ShmCarrier = both.link.carrier  # type: ignore[attr-defined]
    return shm


async def talk(both: Pair) -> None:
    one, other = await both.channel()
    for size in (0, 1, 1 << 20, 1 << 24):
        sending = asyncio.create_task(one.send(b"%d" % size, [bytes(size)]))
        message = await other.receive()
        assert (message.header, len(message.buffers[0])) == (b"%d" % size, size)
        await sending
        other.send_nowait(b"back")
        assert (await one.receive()).header == b"back"


def refuse(*_: object) -> None:
    raise OSError("not here")


@pytest.mark.parametrize("failing", [(region, "create"), (region, "adopt"), (os, "memfd_create"), (pages, "map_file")])
def test_where_memory_cannot_be_shared_the_socket_carries_the_link(
    failing: tuple[object, str], monkeypatch: pytest.MonkeyPatch, loop: str
) -> None:
    def fail(descriptors: list[int] | object = None, *_: object) -> None:
        if isinstance(descriptors, list):
            rights.close_all(descriptors)
        refuse()

    monkeypatch.setattr(*failing, fail)

    run(talk_without_memory, loop=loop)


async def talk_without_memory() -> None:
    async with await endpoint("shm") as here, await endpoint("shm") as there:
        both = Pair(here, there, await here.connect(there.address, KEY))
        await talk(both)
        assert both.link.kind == both.link.statistics().kind == "unix"


def test_on_other_processors_the_socket_carries_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")

    run(talk_without_memory)


def test_an_acceptor_that_sees_other_memory_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def adopt_another(descriptors: list[int], wake: Callable[[], None]) -> region.Region:
        rights.close_all(descriptors)
        another, memory = region.create(wake)
        os.close(memory)
        return another

    monkeypatch.setattr(region, "adopt", adopt_another)

    async def main() -> None:
        async with pair("shm") as both:
            with pytest.raises(LinkBroken, match="sees other memory"):
                await both.link.open("port").receive()

    run(main)


@pytest.mark.parametrize("word", [ring._TAIL, ring._HEAD])
def test_an_absurd_position_ends_its_link_and_nothing_else(
    word: int, loop: str, small_arena: Callable[[int], object]
) -> None:
    small_arena(0)  # The rings shall have something to carry.

    async def main() -> None:
        async with pair("shm") as both, await endpoint("shm") as third:
            await talk(both)
            beside = await third.connect(both.there.address, KEY)
            far = await both.there.connect(both.here.address, KEY)
            there = carrier(both)._region
            assert there is not None
            await until(lambda: not carrier(both).awake)
            asyncio.get_running_loop().remove_reader(carrier(both)._descriptor)  # Set wrong now, and not right again.
            # Either is what the other end believes of this one: how far it has written, and how far it has read.
            half = there.writer if word == ring._TAIL else there.reader
            half._words[word] = 1 << 40
            half._wake()
            sending = asyncio.create_task(far.open("port").send(b"", [bytes(900_000)]))
            with pytest.raises(LinkBroken, match="does not speak this protocol"):
                await sending
            assert far.closed
            one, other = await channel_between(beside, both.there, "beside")
            one.send_nowait(b"x")
            assert (await other.receive()).header == b"x"

    run(main, loop=loop)


def test_a_quiet_link_lets_the_loop_sleep(loop: str) -> None:
    async def main() -> None:
        async with pair("shm") as both:
            await talk(both)
            (serving,) = poller._pollers.values()
            assert serving.links == 2
            await until(lambda: not serving._awake)
            await until(lambda: not serving._scheduled)
        assert not poller._pollers

    run(main, loop=loop)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # Of threads that other tests have left.
def test_a_forked_child_has_no_memory_of_links(small_arena: Callable[[int], object]) -> None:
    def shared() -> set[str]:
        with open("/proc/self/maps") as maps:
            found = {line for line in maps if "memfd:gangline" in line}
        for descriptor in os.listdir("/proc/self/fd"):
            try:
                target = os.readlink(f"/proc/self/fd/{descriptor}")
            except FileNotFoundError:
                continue  # The descriptor of this very listing.
            if "memfd:gangline" in target:
                found.add(f"{descriptor} {target}")
        return found

    async def main() -> None:
        small_arena(64 << 20)  # What other tests have left shall not count, nor be used here.
        before = shared()
        async with pair("shm") as both:
            await talk(both)
            # Each end: a map of the rings; a map of the arena, and its descriptor.
            assert len(shared() - before) == 2 * (1 + 1 + 1)
            reader, writer = os.pipe()
            child = os.fork()
            if child == 0:
                os.write(writer, b"%d" % len(shared() - before))
                os._exit(0)
            os.waitpid(child, 0)  # noqa: ASYNC222  # It has nothing left to do.
            assert int(os.read(reader, 100)) == 0
            os.close(reader)
            os.close(writer)
            await talk(both)
        assert not shared() - before

    run(main)


def test_links_that_come_and_go_leave_no_memory(tmp_path: Path) -> None:
    async def main() -> None:
        async with await endpoint("shm", directory=str(tmp_path)) as there:
            descriptors = len(os.listdir("/proc/self/fd"))
            for _ in range(20):
                async with await open_endpoint(kinds=()) as here:
                    await here.connect(there.address, KEY)
            await until(lambda: not there._all)  # type: ignore[attr-defined]
            assert len(os.listdir("/proc/self/fd")) <= descriptors  # Fewer where another test's have gone by now.

    run(main)


def test_who_lingers_within_a_callback_gets_what_comes_once_and_in_order() -> None:
    """A task that an eager task factory begins within a callback may do that."""

    async def main() -> None:
        async with pair("shm") as both:
            one, other = await both.channel()
            end: ShmCarrier = other.link.carrier  # type: ignore[attr-defined]
            came: list[bytes] = []

            def on_message(message: Message) -> None:
                came.append(message.header)
                if message.header == b"first":
                    one.send_nowait(b"second")
                    other.link.linger(lambda: len(came) > 1)

            other.subscribe(on_message, lambda error: None)
            for _ in range(3):
                came.clear()
                end._poller.wake(end)
                one.send_nowait(b"first")
                await until(lambda: len(came) > 1)
                assert came == [b"first", b"second"]

    run(main)
