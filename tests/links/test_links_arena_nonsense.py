"""A peer that has proved itself, and then shares nonsense: its link ends, and nothing else."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import TYPE_CHECKING

import pytest
from link_harness import KEY, Pair, channel_between, endpoint, pair, pass_on, run, turns
from test_links_shm import carrier

from collective._links import mapping, ring
from collective._links import wire as w
from collective.errors import LinkBroken

if TYPE_CHECKING:
    from collections.abc import Callable

    from collective._links.arena import Arena

pytestmark = pytest.mark.skipif(not ring.usable(), reason="rings need the store order of x86")

MIB = 1 << 20


def reference(*, segment: int = 0, number: int = 9, offset: int = 0, size: int = MIB) -> bytes:
    body = w.REFERENCE.pack(0, segment, number, offset, size)
    return w.frame_head(w.LEND, 2, count=1, body=len(body)) + body


FRAMES = {
    "a segment that was not shown": reference(segment=77),
    "beyond the end": reference(offset=64 * MIB),
    "far beyond the end": reference(offset=(1 << 64) - 1),
    "of another size": reference(size=5),
    "under a number that is in use": reference(number=1),
    "for a second buffer": reference().replace(w.REFERENCE.pack(0, 0, 9, 0, MIB), w.REFERENCE.pack(1, 0, 9, 0, MIB)),
}


@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES.keys())
def test_a_wrong_reference_ends_its_link_and_nothing_else(frame: bytes, small_arena: Callable[[int], Arena]) -> None:
    small_arena(64 * MIB)
    size = w.encode_sizes([bytes(MIB)])
    start, _ = w.encode_start(2, MIB + 8, b"", size)
    run(lambda: end_of_a_link(lambda both: both.link.urge(start + frame)))  # type: ignore[attr-defined]


RETURNS = {
    "what was not lent": w.encode_release([5]),
    "a segment unknown": w.frame_head(w.FORGET, 0, count=7),
    "one that is still shown": w.frame_head(w.FORGOT, 0, count=0),
    "a segment adopted twice": w.frame_head(w.ADOPTED, 0, count=0, head=1),
}


@pytest.mark.parametrize("frame", RETURNS.values(), ids=RETURNS.keys())
def test_giving_back_what_is_not_there_ends_the_link_and_nothing_else(frame: bytes) -> None:
    run(lambda: end_of_a_link(lambda both: both.link.urge(frame)))  # type: ignore[attr-defined]


def descriptor(what: str) -> list[int]:
    if what == "no memory file":
        return [os.open("/dev/zero", os.O_RDONLY)]
    made = os.memfd_create("gangline-test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(made, MIB if what != "another size" else MIB + 1)
    if what != "not sealed":
        mapping.forbid_writing(mapping.MemoryFile(os.dup(made), MIB))
    return [made]


@pytest.mark.parametrize("what", ["no memory file", "another size", "not sealed", "a number twice"])
def test_a_wrong_descriptor_ends_its_link_and_nothing_else(what: str) -> None:
    def show(both: Pair) -> None:
        number = 0 if what == "a number twice" else 5
        made = descriptor(what)
        socket.send_fds(carrier(both)._sock, [w.SHOWN.pack(w.SHOW, number, MIB)], made)
        for each in made:
            os.close(each)

    run(lambda: end_of_a_link(show))


async def end_of_a_link(spoil: Callable[[Pair], None]) -> None:
    """Have one end of a link say what it must not; the other end shall break that link and no other."""
    async with pair("shm") as both, await endpoint("shm") as third:
        ends = await both.channel()
        held = (await pass_on(*ends, b"h" * MIB)).buffers[0]
        beside = await channel_between(await third.connect(both.there.address, KEY), both.there, "beside")
        far = await both.there.connect(both.here.address, KEY)
        descriptors = len(os.listdir("/proc/self/fd"))
        receiving = asyncio.create_task(ends[1].receive())
        await turns()
        spoil(both)
        with pytest.raises(LinkBroken, match="does not speak this protocol"):
            await receiving
        assert far.closed
        assert len(os.listdir("/proc/self/fd")) < descriptors
        assert bytes(held) == b"h" * MIB
        assert bytes((await pass_on(*beside, b"x" * MIB)).buffers[0]) == b"x" * MIB


@pytest.mark.parametrize(("said", "which"), [(b"x", "no kind"), (w.WAKE, "no record"), (w.SHOW, "half a record")])
def test_nonsense_on_the_socket_ends_its_link_and_nothing_else(said: bytes, which: str) -> None:
    def say(both: Pair) -> None:
        made = descriptor("sealed") if which != "no kind" else []
        for _ in range(2):
            socket.send_fds(carrier(both)._sock, [said], made)
        for each in made:
            os.close(each)

    run(lambda: end_of_a_link(say))
