"""Large buffers over shared memory: read in place, held, given back, and what happens when either end goes."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import gc
import os
import random
import select
import signal
import threading
import time
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest
from link_harness import KEY, Pair, channel_between, endpoint, pair, pass_on, run, turns, until
from test_links_processes import peer

from collective._links import arena as arenas
from collective._links import borrowing, lending, pages, rights, ring
from collective._links.arena import Arena
from collective._links.segments import Segment
from collective.abc import LARGE
from collective.errors import LinkBroken
from collective.links import allocate, arena_statistics, open_endpoint, private
from collective.types import Credential

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from pathlib import Path

    from collective._links.mux import Mux
    from collective._links.segments import Extent
    from collective._links.sharing import Sharing
    from collective._links.shm import ShmCarrier
    from collective.abc import Message

pytestmark = pytest.mark.skipif(not ring.usable(), reason="rings need the store order of x86")

MIB = 1 << 20


@pytest.fixture(autouse=True)
def own_arena(small_arena: Callable[[int], Arena]) -> None:
    """Give each test an arena of its own: what it counts there is then its own."""
    small_arena(1 << 30)


async def all_given_back() -> None:
    """Wait until nobody uses any of this process's arena."""

    deadline = time.monotonic() + 20
    while arena_statistics().used:
        assert time.monotonic() < deadline, f"some of it is used for ever: {arena_statistics()}"
        gc.collect()
        await asyncio.sleep(0.001)


def test_large_buffers_are_read_in_place_and_their_memory_is_used_again(loop: str) -> None:
    async def main() -> None:
        async with pair("shm") as both:
            one, other = await both.channel(window=4 * MIB)
            far = await both.there.connect(both.here.address, KEY)
            dice = np.random.default_rng(1)

            def lent(nbytes: int) -> bool:
                return both.link.statistics().bytes_lent == far.statistics().bytes_borrowed == nbytes

            for size in (LARGE + 1, MIB, 16 * MIB):  # Within the window; copied at once; copied off the loop.
                data = [dice.integers(0, 256, n, np.uint8) for n in (size, LARGE, size + 1, 0)]
                message = await pass_on(one, other, *(each.data for each in data))
                assert [buffer.readonly for buffer in message.buffers] == [True, False, True, False]
                assert [bytes(buffer) for buffer in message.buffers] == [each.tobytes() for each in data]
                assert lent(2 * size + 1)
                array = np.frombuffer(message.buffers[2], np.uint8)[5:]
                del message
                await until(partial(lent, size + 1))
                assert np.array_equal(array, data[2][5:])
                del array
                await all_given_back()
                await until(partial(lent, 0))
            assert arena_statistics().segments == 1
        assert arena_statistics().segments == 0

    run(main, loop=loop)


def test_held_memory_holds_nothing_up(small_arena: Callable[[int], Arena], monkeypatch: pytest.MonkeyPatch) -> None:
    """A full arena takes fresh segments, then messages go through the rings; when some is given back, it is used."""
    monkeypatch.setattr(arenas, "_SEGMENT", 2 * MIB)
    small_arena(4 * MIB)

    async def main() -> None:
        async with pair("shm") as both:
            one, other = await both.channel()
            held = [await pass_on(one, other, bytes([i]) * MIB) for i in range(8)]
            assert [message.buffers[0].readonly for message in held] == [True] * 4 + [False] * 4
            assert arena_statistics().used == 4 * MIB
            assert arena_statistics().segments == 2
            assert [set(bytes(message.buffers[0])) for message in held] == [{i} for i in range(8)]
            both_ways = await pass_on(one, other, b"x" * MIB, b"y" * LARGE)
            assert [bytes(buffer[:1]) for buffer in both_ways.buffers] == [b"x", b"y"]
            del held[2]
            await until(lambda: arena_statistics().used == 3 * MIB)
            assert (await pass_on(one, other, b"x" * MIB)).buffers[0].readonly
            del held
            await all_given_back()

    run(main)


def test_a_private_mapping_is_the_writers_alone_and_keeps_the_memory() -> None:
    async def main() -> None:
        async with pair("shm") as both:
            one, other = await both.channel()
            block = allocate(MIB)
            block.memory[:] = b"a" * MIB
            first, second = [(await pass_on(one, other, block.memory[5:])).buffers[0] for _ in range(2)]
            mine = private(first)
            assert not mine.readonly
            mine[:3] = b"bbb"
            assert (bytes(mine[:4]), bytes(second[:4]), bytes(block.memory[5:9])) == (b"bbba", b"aaaa", b"aaaa")
            assert bytes(mine[-4:]) == b"aaaa"
            del first, second, block
            await until(lambda: both.link.statistics().bytes_lent == MIB)
            own = (await pass_on(one, other, b"c" * MIB)).buffers[0]
            assert bytes(mine[-4:]) == b"aaaa"
            assert both.link.statistics().bytes_lent == 2 * MIB
            del mine
            await until(lambda: both.link.statistics().bytes_lent == MIB)
            assert bytes(own) == b"c" * MIB
            assert private(memoryview(b"read-only")) == b"read-only"

    run(main)


def test_a_block_is_sent_to_any_number_of_peers_without_a_copy() -> None:
    async def main() -> None:
        async with pair("shm") as both, await endpoint("shm") as third:
            ends = [await both.channel(), await channel_between(await both.here.connect(third.address, KEY), third)]
            block = allocate(3 * MIB)
            array = np.frombuffer(block.memory, np.uint32)
            array[:] = 7
            views = [
                (await pass_on(one, other, part)).buffers[0]
                for one, other in ends
                for part in (array.data, array[1000:-1000].data)
            ]
            array[5000] = 8
            seen = [np.frombuffer(view, np.uint32) for view in views]
            assert [list(np.flatnonzero(each == 8)) for each in seen] == [[5000], [4000], [5000], [4000]]
            assert arena_statistics().used == arena_statistics().owned == 3 * MIB
            del block, array
            gc.collect()
            assert (arena_statistics().used, arena_statistics().owned) == (3 * MIB, 0)
            del views[1:], seen
            await until(lambda: both.link.statistics().bytes_lent == 3 * MIB)
            assert arena_statistics().used == 3 * MIB
            del views
            await all_given_back()

    run(main)


def test_an_arena_has_a_limit(small_arena: Callable[[int], Arena]) -> None:
    small_arena(2 * MIB)
    block = allocate(MIB + 1)
    with pytest.raises(MemoryError, match="GANGLINE_ARENA_BYTES"):
        allocate(MIB)
    del block
    assert allocate(2 * MIB).nbytes == 2 * MIB


def test_a_subscriber_that_gives_memory_holds_none_of_the_senders() -> None:
    async def main() -> None:
        async with pair("shm") as both:
            one, other = await both.channel(window=4 * MIB)
            got: list[Message] = []
            memory = [np.zeros(2 * MIB, np.uint8).data, np.zeros(LARGE, np.uint8).data]
            other.subscribe(got.append, got.append, lambda header, sizes: memory)  # type: ignore[arg-type]
            await one.send(b"", [b"x" * (2 * MIB), b"y" * LARGE])
            await until(lambda: bool(got))
            assert got[0].buffers == memory == [b"x" * (2 * MIB), b"y" * LARGE]
            await all_given_back()

    run(main)


def test_a_cancelled_send_is_lent_whole_or_not_at_all(loop: str) -> None:
    async def main() -> None:
        async with pair("shm") as both:
            one, other = await both.channel()
            whole = 0
            data = bytearray(6 * MIB)
            for i in range(24):
                data[:] = bytes([i]) * len(data)
                sending = asyncio.create_task(one.send(b"%d" % i, [data]))
                receiving = asyncio.create_task(other.receive())
                if i % 4 == 3:
                    await sending
                else:
                    await turns(i)
                sending.cancel()
                await asyncio.wait([sending])
                data[:] = b"\xff" * len(data)
                await one.send(b"end")
                message = await receiving
                if message.header != b"end":
                    whole += 1
                    assert message.header == b"%d" % i
                    assert (np.frombuffer(message.buffers[0], np.uint8) == i).all()
                    message = await other.receive()
                assert message.header == b"end"
            assert 6 <= whole < 24
            del message, receiving
            await all_given_back()

    run(main, loop=loop)


@pytest.mark.parametrize("how", ["cancelled", "left behind"])
def test_a_loop_that_closes_during_a_copy_leaves_nothing_used(
    how: str, small_arena: Callable[[int], Arena], monkeypatch: pytest.MonkeyPatch
) -> None:
    arena, go_on, copy = small_arena(64 * MIB), threading.Event(), lending.Gate.copy
    copying: list[int] = []

    def slowly(gate: lending.Gate, target: np.ndarray, source: np.ndarray) -> None:
        copying.append(threading.get_ident())
        assert go_on.wait(30)
        copy(gate, target, source)

    async def begin() -> tuple[Pair, asyncio.Task[None]]:
        here, there = await endpoint("shm"), await endpoint("shm")
        both = Pair(here, there, await here.connect(there.address, KEY))
        one, _ = await both.channel(window=16 * MIB)
        sending = asyncio.create_task(one.send(b"", [bytes(8 * MIB)]))
        await until(lambda: len(copying) == 2)  # Each half.
        if how == "cancelled":
            sending.cancel()
            await asyncio.wait([sending])
        return both, sending

    monkeypatch.setattr(lending.Gate, "copy", slowly)
    loop = asyncio.new_event_loop()
    both, sending = loop.run_until_complete(asyncio.wait_for(begin(), 30))
    loop.close()
    for end in (both.here, both.there):
        end.abort()  # type: ignore[attr-defined]
    assert sending.done() == (how == "cancelled")
    assert arena.statistics().used == 8 * MIB, "threads write there"
    go_on.set()
    run(lambda: until(lambda: arena.statistics().used == 0))


def test_what_is_held_outlives_the_link() -> None:
    """The sender does not use again what the other end of an ended link may still read."""

    async def main() -> None:
        async with await endpoint("shm") as here, await endpoint("shm") as there:
            link = await here.connect(there.address, KEY)
            held = (await pass_on(*await channel_between(link, there, "one"), b"h" * MIB)).buffers[0]
            await link.aclose()
            link = await here.connect(there.address, KEY)
            ends = await channel_between(link, there, "other")
            for i in range(4):
                await pass_on(*ends, bytes([i]) * MIB)
            assert bytes(held) == b"h" * MIB
            assert bytes(private(held)) == b"h" * MIB
            del held

    run(main)


def test_a_receiver_that_dies_has_let_go(tmp_path: Path, loop: str) -> None:
    with peer("shm", tmp_path) as (process, address):

        async def main() -> None:
            async with await open_endpoint(kinds=()) as here:
                link = await here.connect(address, KEY)
                channel = link.open("keep")
                block = allocate(MIB)
                for buffer in (b"x" * MIB, block.memory, b"z" * (5 * MIB)):
                    sending = asyncio.create_task(channel.send(b"", [buffer]))
                    await channel.receive()
                    await sending
                assert link.statistics().bytes_lent == 7 * MIB
                process.send_signal(signal.SIGKILL)
                with pytest.raises(LinkBroken):
                    await channel.receive()
                await until(lambda: arena_statistics().used == MIB)
                assert arena_statistics().owned == MIB

        run(main, loop=loop)


def test_any_descriptor_tells_of_a_death(small_arena: Callable[[int], Arena], monkeypatch: pytest.MonkeyPatch) -> None:
    arena = small_arena(4 * MIB)
    pid = os.fork()
    if not pid:
        signal.pause()
        os._exit(0)
    process = os.pidfd_open(pid)
    try:
        monkeypatch.setattr(os, "dup", lambda descriptor: fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 1500))
        extent, other = arena.take(MIB), arena.take(MIB)
        assert extent is not None
        assert other is not None
        arena.leave(Link(), [extent], process, dead=False)
        assert arena.statistics().used == 2 * MIB, "the other end lives"
        signal.pidfd_send_signal(process, signal.SIGKILL)
        assert select.select([process], [], [], 10)[0]
        assert arena.statistics().used == MIB
        assert not other.segment.retired

        def none_left(_: int) -> int:
            raise OSError(errno.EMFILE, "no descriptors")

        monkeypatch.setattr(os, "dup", none_left)
        arena.leave(Link(), [other], process, dead=False)
        assert other.segment.retired, "nobody can tell whether the other end is dead"
        assert arena.statistics().segments == 0
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(process)


class Link:
    """Stands in for a link that has shown segments."""

    def segment_gone(self, number: int) -> None:
        """Nobody is told."""


def test_what_is_held_outlives_its_sender(tmp_path: Path, loop: str) -> None:
    before = mapped()
    with peer("shm", tmp_path) as (process, address):

        async def main() -> None:
            async with await open_endpoint(kinds=()) as here:
                channel = (await here.connect(address, KEY)).open("give_and_die")
                message = await channel.receive()
                channel.send_nowait(b"die")
                with pytest.raises(LinkBroken):
                    await channel.receive()
                process.wait(10)  # It is dying.
                mine = private(message.buffers[0])
                mine[:1] = b"m"
                assert bytes(message.buffers[0]) == b"g" * (3 * MIB)
                assert bytes(mine[:2]) == b"mg"
                del message, mine

        run(main, loop=loop)
    assert mapped() <= before


def test_a_loop_that_ends_leaves_no_receiver_watched(tmp_path: Path, loop: str) -> None:
    """Whether the receiver of what was lent is dying is watched for a second, or until the loop is closed."""
    with peer("shm", tmp_path) as (_, address):

        async def main() -> None:
            async with await open_endpoint(kinds=()) as here:
                channel = (await here.connect(address, KEY)).open("keep")
                await channel.send(b"", [bytes(3 * MIB)])
                assert (await channel.receive()).header == b"kept"

        before = len(os.listdir("/proc/self/fd"))
        run(main, loop=loop)
        assert not arenas.arena()._dying
        assert len(os.listdir("/proc/self/fd")) == before


def mapped() -> int:
    """Return how many times memory of arenas is mapped here."""
    gc.collect()
    with open("/proc/self/maps") as maps:
        return sum("memfd:gangline-arena" in line for line in maps)


def test_segments_come_and_go_at_the_limit(
    small_arena: Callable[[int], Arena], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A descriptor may come before the word that another segment has gone, and is none too many then."""
    for module in (lending, borrowing):
        monkeypatch.setattr(module, "MOST_SEGMENTS", 1)
    monkeypatch.setattr(arenas, "_WARM", 0)
    arena = small_arena(64 * MIB)

    async def main() -> None:
        async with pair("shm") as both:
            ends = await both.channel()
            far = cast("Mux", await both.there.connect(both.here.address, KEY))
            held: list[int] = []
            for _ in range(2):
                view = (await pass_on(*ends, b"a" * MIB)).buffers[0]
                assert both.link.statistics().bytes_lent == MIB
                with monkeypatch.context() as patch:
                    patch.setattr(far, "on_forget", held.append)
                    del view
                    await until(lambda: bool(held) and not arena.statistics().segments)
                    copied = (await pass_on(*ends, b"b" * MIB)).buffers[0]
                    assert both.link.statistics().bytes_lent == 0
                    assert bytes(copied) == b"b" * MIB
                far.on_forget(held.pop())
                await turns()

    run(main)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # Of threads that other tests have left.
def test_a_segment_that_goes_before_the_other_end_has_looked_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with pair("shm") as both:
            one, other = await both.channel()
            far = cast("Mux", await both.there.connect(both.here.address, KEY))
            block = allocate(MIB)
            lent = both.link.lend(block.memory)
            assert lent is not None
            both.link.take_back(lent)
            del block
            assert not arena_statistics().segments
            lender = cast("Sharing", cast("Mux", both.link).carrier.sharing)._lending()
            await until(lambda: not lender._showing and not lender._vanished and not lender._leaving)
            assert bytes((await pass_on(one, other, b"x" * MIB)).buffers[0]) == b"x" * MIB
            assert not far.closed

    monkeypatch.setattr(arenas, "_WARM", 0)
    run(main)


# The kind: a receiver at its limit (of descriptors, of mappings) costs the shared memory, never the link.


def lose_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel does where the receiver is at its limit: SCM_RIGHTS that is truncated to nothing."""
    genuine = rights.receive

    def truncated(sock: socket.socket, count: int, most: int) -> tuple[bytes, list[int]]:
        data, descriptors = genuine(sock, count, most)
        rights.close_all(descriptors)
        return data, []

    monkeypatch.setattr(rights, "receive", truncated)


def fail_to_map(monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = pages.map_file

    def failing(descriptor: int, nbytes: int, access: pages.Access, *, start: int = 0) -> int:
        if access is pages.Access.READ:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return genuine(descriptor, nbytes, access, start=start)

    monkeypatch.setattr(pages, "map_file", failing)


@pytest.mark.parametrize("fail", [lose_descriptors, fail_to_map])
def test_what_the_other_end_cannot_map_comes_as_data_until_it_can(
    fail: Callable[[pytest.MonkeyPatch], None], small_arena: Callable[[int], Arena]
) -> None:
    async def main() -> None:
        small_arena(64 * MIB)
        async with pair("shm") as both:
            one, other = await both.channel()
            far = await both.there.connect(both.here.address, KEY)
            block = allocate(MIB)
            with pytest.MonkeyPatch.context() as patch:
                fail(patch)
                lent = both.link.lend(block.memory)
                assert lent is not None
                for size in (MIB, 9 * MIB):  # copied at once, and by threads
                    came = await pass_on(one, other, b"x" * size)
                    assert bytes(came.buffers[0]) == b"x" * size
                    assert not came.buffers[0].readonly
                assert far.borrow(lent) is None
                await until(lambda: block.uses == 1)
            patch.setattr(lending, "_AGAIN", 0.0)
            sharing = cast("Sharing", cast("Mux", both.link).carrier.sharing)
            sharing._lending()._declined.clear()
            came = await pass_on(one, other, b"y" * MIB)
            assert came.buffers[0].readonly
            assert bytes(came.buffers[0]) == b"y" * MIB
            assert not far.closed

    run(main)


def test_links_to_one_process_map_its_segments_once(small_arena: Callable[[int], Arena]) -> None:
    async def main() -> None:
        small_arena(64 * MIB)
        other_key = Credential("other", bytes(32))
        async with pair("shm") as both:
            both.there.grant(other_key)
            first = await both.channel()
            await pass_on(*first, b"x" * MIB)
            link = await both.here.connect(both.there.address, other_key)
            second = await channel_between(link, both.there, "second")
            before = len(os.listdir("/proc/self/fd"))
            came = await pass_on(*second, b"y" * MIB)
            assert came.buffers[0].readonly
            assert len(os.listdir("/proc/self/fd")) == before
            assert bytes(came.buffers[0]) == b"y" * MIB

    run(main)


def test_a_forked_child_has_copies_of_what_is_held() -> None:
    async def main() -> None:
        async with pair("shm") as both:
            one, other = await both.channel()
            block = allocate(MIB)
            block.memory[:] = b"b" * MIB
            view = (await pass_on(one, other, b"v" * (2 * MIB))).buffers[0]
            mine = private((await pass_on(one, other, b"p" * MIB)).buffers[0])
            mine[:1] = b"m"
            child = os.fork()
            if child == 0:
                right = bytes(block.memory) == b"b" * MIB and bytes(view) == b"v" * (2 * MIB)
                right = right and bytes(mine) == b"m" + b"p" * (MIB - 1)
                lines = mapped()
                del block, view, mine
                os._exit(0 if right and not lines and arena_statistics().mapped == 0 else 1)
            assert os.waitpid(child, 0)[1] == 0  # noqa: ASYNC222  # It has little to do.
            assert bytes(view) == b"v" * (2 * MIB)
            assert bytes((await pass_on(one, other, block.memory)).buffers[0]) == b"b" * MIB

    run(main)


def test_between_hosts_everything_is_copied() -> None:
    async def main() -> None:
        async with (
            await open_endpoint(kinds=("shm", "tcp"), host="one") as here,
            await open_endpoint(kinds=("shm", "tcp"), host="other") as there,
        ):
            there.grant(KEY)
            link = await here.connect(there.address, KEY)
            assert link.kind == "tcp"
            ends = await channel_between(link, there)
            block = allocate(MIB)
            block.memory[:] = b"b" * MIB
            view = (await pass_on(*ends, block.memory)).buffers[0]
            view[:1] = b"c"
            assert bytes(block.memory) == b"b" * MIB

    run(main)


def test_extents_never_overlap_and_all_are_found_again() -> None:
    dice = random.Random(4)
    segment = Segment(0, MIB)
    taken = []
    for _ in range(3000):
        if taken and dice.random() < 0.5:
            segment.give_back(taken.pop(dice.randrange(len(taken))))
        elif (extent := segment.take(dice.randrange(1, 100_000))) is not None:
            taken.append(extent)
        ranges = sorted((extent.offset, extent.offset + extent.size) for extent in taken)
        assert all(stop <= start for (_, stop), (start, _) in pairwise(ranges))
        assert segment.unused == MIB - sum(extent.size for extent in taken)
    for extent in taken:
        segment.give_back(extent)
    assert segment.idle


@pytest.mark.parametrize("elsewhere", [True, False], ids=["on another thread", "on the same thread"])
@pytest.mark.parametrize("busy", ["take", "give_back"])
def test_what_is_let_go_of_while_the_arena_is_busy_is_told_at_once(
    elsewhere: bool, busy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finalizer that cannot have the lock is done with when whoever has it leaves, and not by some later call."""
    made = Arena(1 << 30)
    told: list[int] = []
    held = [made.allocate(MIB, watch=told.append)]
    other = made.take(1)
    assert other is not None
    do = getattr(Segment, busy)

    def let_go_and_do(segment: Segment, what: int | Extent) -> object:
        if held:
            thread = threading.Thread(target=held.clear)
            thread.start() if elsewhere else thread.run()
            if elsewhere:
                thread.join()
            assert not told
        return do(segment, what)

    monkeypatch.setattr(Segment, busy, let_go_and_do)
    if busy == "take":
        made.take(1)
    else:
        made.release(other)
    assert told == [0]


def test_what_nobody_uses_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within its limit an arena can always be had, whatever it keeps warm: as much of that goes as is in the way."""
    monkeypatch.setattr(arenas, "_SEGMENT", 4 * MIB)
    made = Arena(16 * MIB)
    link = Link()
    made.join(link)
    used, *idle = [made.allocate(3 * MIB) for _ in range(4)]
    del idle
    assert made.statistics().segments == 4
    with pytest.raises(MemoryError, match="the arena may have 16777216"):
        made.allocate(12 * MIB + 1)
    assert made.statistics().segments == 4, "it gave up warm pages, and did not have the memory all the same"
    block = made.allocate(7 * MIB)
    assert (made.statistics().segments, made.statistics().mapped) == (3, 15 * MIB)
    del block
    whole = made.allocate(12 * MIB)
    assert (made.statistics().segments, made.statistics().mapped) == (2, 16 * MIB)
    del whole, used
    assert made.allocate(16 * MIB).nbytes == 16 * MIB


def test_those_with_a_limit_of_their_own_use_up_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is beyond the limit lies in segments of its own, so that each side's bytes count for that side alone."""
    monkeypatch.setattr(arenas, "_SEGMENT", 4 * MIB)
    made = Arena(4 * MIB)
    link = Link()
    made.join(link)
    warm = made.allocate(MIB)
    del warm
    beyond = [made.allocate(2 * MIB, beyond=True) for _ in range(5)]
    within = [made.allocate(MIB) for _ in range(4)]
    assert made.take(1) is None
    del beyond
    assert made.take(1) is None
    del within
    assert made.statistics().used == 0


@pytest.mark.parametrize(("number", "what"), [(errno.EMFILE, "file descriptors"), (errno.ENOMEM, "memory")])
def test_no_segment_for_want_of_resources_says_which(
    number: int, what: str, small_arena: Callable[[int], Arena]
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, "none left")

    small_arena(64 * MIB)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "memfd_create", refuse)
        with pytest.raises(MemoryError, match=f"no {what} left to take more"):
            allocate(MIB)
    assert allocate(MIB).nbytes == MIB


def test_who_looks_for_a_segment_loses_no_call_to_wake() -> None:
    """Both come over the socket, and somebody else than the poller may be the one who reads them."""

    async def main() -> None:
        async with pair("shm") as both:
            one, other = await both.channel()
            far = cast("Mux", await both.there.connect(both.here.address, KEY))
            block = allocate(MIB)
            await until(lambda: not cast("ShmCarrier", far.carrier).awake)
            one.send_nowait(b"x")
            lent = both.link.lend(block.memory)
            assert lent is not None
            assert far.borrow(lent) is not None
            async with asyncio.timeout(5):
                assert (await other.receive()).header == b"x"

    run(main)
