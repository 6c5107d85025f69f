"""The ring under a link over shared memory: its bounds, its checks, and a million races between sleep and wake-up."""

from __future__ import annotations

import mmap
import os
import random
import select
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import Mock

import pytest

from collective._links import region, rights, ring
from collective._links.ring import HEADER, RingReader, RingWriter
from collective._links.wire import WireError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CAPACITY = 4096
RACES = 1_000_000


@pytest.fixture
def sides() -> tuple[RingWriter, RingReader, memoryview]:
    """Both sides of a ring in one process, and its words."""
    memory = memoryview(mmap.mmap(-1, HEADER + CAPACITY))
    woken = Mock()
    return RingWriter(memory, woken), RingReader(memory, woken), memory[:HEADER].cast("Q")


def read(reader: RingReader, most: int = CAPACITY) -> bytes:
    target = memoryview(bytearray(most))
    count = reader.take([target], reader.available())
    reader.publish()
    return bytes(target[:count])


def test_what_goes_in_comes_out_whatever_the_sizes(sides: tuple[RingWriter, RingReader, memoryview]) -> None:
    writer, reader, _ = sides
    dice = random.Random(1)
    sent, got = bytearray(), bytearray()
    for _ in range(3000):
        pieces = [dice.randbytes(dice.choice([0, 1, 30, 1000, CAPACITY])) for _ in range(dice.randrange(1, 4))]
        whole = b"".join(pieces)
        count = writer.fill(pieces)
        assert count == min(len(whole), CAPACITY - len(sent) + len(got))
        writer.publish()
        sent += whole[:count]
        got += read(reader, dice.choice([1, 100, CAPACITY]))
    got += read(reader)
    assert got == sent


def test_nothing_is_seen_before_it_is_published(sides: tuple[RingWriter, RingReader, memoryview]) -> None:
    writer, reader, _ = sides
    writer.put(b"x")
    assert not reader.moved()
    assert reader.available() == 0
    writer.publish()
    assert reader.moved()
    assert read(reader) == b"x"


@pytest.mark.parametrize("tail", [CAPACITY + 1, 1 << 62, (1 << 64) - 1])
def test_an_absurd_length_is_an_error(sides: tuple[RingWriter, RingReader, memoryview], tail: int) -> None:
    _, reader, words = sides
    words[ring._TAIL] = tail
    with pytest.raises(WireError, match="a ring of 4096 bytes holds"):
        reader.available()


@pytest.mark.parametrize("head", [11, 1 << 62])
def test_an_absurd_position_of_the_reader_is_an_error(
    sides: tuple[RingWriter, RingReader, memoryview], head: int
) -> None:
    writer, _, words = sides
    writer.put(bytes(10))
    words[ring._HEAD] = head
    with pytest.raises(WireError, match="a ring's reader is at"):
        writer.room(CAPACITY)


def test_memory_that_could_shrink_is_not_taken() -> None:
    def offer() -> list[int]:
        made = os.memfd_create("test", os.MFD_ALLOW_SEALING)
        os.ftruncate(made, region.SIZE)
        return [made]

    with pytest.raises(OSError, match="not sealed"):
        region.adopt(offer(), Mock())
    with pytest.raises(OSError, match="not sealed"):
        region.adopt([os.open("/dev/null", os.O_RDWR)], Mock())
    with pytest.raises(OSError, match="0 descriptors"):
        region.adopt([], Mock())
    with pytest.raises(OSError, match="2 descriptors"):
        region.adopt(offer() + offer(), Mock())


def free_locks_taken(call: Callable[[], object]) -> int:
    """Return how many locks a call takes that are free. Each is a full fence; one that is taken may be none."""
    free = 0

    def look(_: object, event: str, method: object) -> None:
        nonlocal free
        lock = getattr(method, "__self__", None)
        if event == "c_call" and getattr(method, "__name__", "") == "acquire" and hasattr(lock, "locked"):
            free += not lock.locked()

    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    return free


@pytest.fixture
def fencing(sides: tuple[RingWriter, RingReader, memoryview]) -> Iterator[list[Callable[[], None]]]:
    """What fences, while another thread has stopped in the middle of a fence."""
    within, over = threading.Event(), threading.Event()

    def stop(_: object, event: str, method: object) -> None:
        if event == "c_return" and getattr(method, "__name__", "") == "acquire":
            within.set()
            over.wait()

    def fence_and_stop() -> None:
        sys.setprofile(stop)
        ring.fence()
        sys.setprofile(None)

    other = threading.Thread(target=fence_and_stop)
    other.start()
    within.wait()
    yield [ring.fence, sides[0].publish, sides[1].publish]
    over.set()
    other.join()


def test_a_fence_is_one_whoever_else_fences(fencing: list[Callable[[], None]]) -> None:
    """A fence has nothing that another thread may hold just then, and be no fence."""
    assert [free_locks_taken(each) for each in fencing] == [1, 1, 1]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_fence_is_one_in_a_child_that_was_forked_in_the_middle_of_one(fencing: list[Callable[[], None]]) -> None:
    """A fence has nothing that a fork leaves locked."""
    child = os.fork()
    if child == 0:
        os._exit(int([free_locks_taken(each) for each in fencing] != [1, 1, 1]))
    assert os.waitpid(child, 0)[1] == 0


def play(end: region.Region, own: int, seed: int, *, first: bool) -> bool:
    """Send a byte to and fro, going to sleep at every turn, until RACES of both ends; return whether all were woken.

    Before it says that it sleeps it lingers for a moment of random length, so that saying so and the other's publishing
    fall together in every way. Then it looks on for a while, only so as to be quick again: the wake-up has to come.

    :param own: the eventfd on which this end is woken.
    """
    writer, reader = end.writer, end.reader
    awaited = select.poll()
    awaited.register(own, select.POLLIN)
    target = [memoryview(bytearray(64))]
    dice = random.Random(seed)
    lingers = [dice.randrange(30) for _ in range(1009)]
    if first:
        writer.put(b"x")
        writer.publish()
    for race in range(RACES // 2):
        for _ in range(lingers[race % 1009]):
            if reader.moved():
                break
        reader.say_asleep()
        ring.fence()
        while not reader.moved():
            for _ in range(500):
                if reader.moved():
                    break
            if not awaited.poll(10_000):
                return False
            os.eventfd_read(own)  # It may be an old one, for what was found by looking.
            if not reader.moved():
                reader.say_asleep()
                ring.fence()
        reader.say_awake()
        reader.take(target, reader.available())
        reader.publish()
        writer.put(b"x")
        writer.publish()
    return True


@pytest.mark.skipif(not ring.usable(), reason="rings need the store order of x86")
def test_a_million_sleep_races_lose_no_wake_up() -> None:
    own, others = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
    end, memory = region.create(partial(os.eventfd_write, others, 1))
    passed = [memory, others, own]
    other = subprocess.Popen(
        [sys.executable, __file__, *map(str, passed)],
        pass_fds=passed,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    try:
        assert play(end, own, 2, first=True)
        assert other.wait(10) == 0
    finally:
        other.kill()
        other.wait()
        end.close()
        rights.close_all(passed)


if __name__ == "__main__":
    memory, own, others = map(int, sys.argv[1:])
    end = region.adopt([memory], partial(os.eventfd_write, others, 1))
    sys.exit(play(end, own, 1, first=False) is False)
