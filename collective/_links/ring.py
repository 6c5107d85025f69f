"""A ring of bytes in memory that two processes share: one of them writes, the other reads. No lock, no system call.

Positions count bytes since the start and never go back. Each is an aligned word that one side stores and the other
loads, each on cache lines of its own:

    tail    the writer's: what is before it can be read
    head    the reader's: what is before it can be overwritten
    asleep  set by a reader that goes to sleep, cleared by the writer that wakes it
    wanted  the head that a sleeping writer waits for, 0 where none does; cleared by the reader that wakes it

Who goes to sleep says so, fences, and looks once more; who publishes stores its position, fences, and looks whether
the other sleeps. Without both fences a store may pass the load that follows it, both sides see the past, and a wake-up
is lost (measured on x86: in 0.02 to 4 % of the races, each a hang). Nothing that the other side wrote is believed
before it is checked.
"""

from __future__ import annotations

import platform
import threading
from typing import TYPE_CHECKING, Final

from collective._links.wire import WireError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from collective._links.wire import Piece

HEADER: Final = 4096
"""Bytes before the data, which hold the words."""
_TAIL, _HEAD, _ASLEEP, _WANTED = 0, 16, 32, 48
"""Indices of the words: 128 bytes apart, since processors fetch cache lines by two."""

MACHINES: Final = ("x86_64", "AMD64", "i386", "i686")
"""Where stores become visible in their order, so that a position is never seen before the bytes that it covers."""

_new_lock = threading.Lock


def usable() -> bool:
    """Return whether rings work on this machine's processors."""
    return platform.machine() in MACHINES


def fence() -> None:
    """Let no load that follows be done before the stores that precede it are visible to all.

    On x86 any atomic read-modify-write is a full fence, and taking a lock that is free is one. To try for one that is
    taken may be a plain load, and none. So each fence has a lock of its own: no other thread, no signal handler and no
    fork can come between. It costs 13 ns more than one lock for all (126 ns against 113 ns).
    """
    _new_lock().acquire()


class _Side:
    """What writer and reader share."""

    def __init__(self, memory: memoryview, wake: Callable[[], None]) -> None:
        self._words = memory[:HEADER].cast("Q")
        self._data = memory[HEADER:]
        self.capacity = len(self._data)
        self._wake = wake

    def release(self) -> None:
        """Let go of the memory. Idempotent."""
        self._words.release()
        self._data.release()


class RingWriter(_Side):
    """The writing side. `wake` wakes the reader."""

    def __init__(self, memory: memoryview, wake: Callable[[], None]) -> None:
        super().__init__(memory, wake)
        self._tail = 0
        self._head = 0

    def room(self, wanted: int) -> int:
        """Return how many bytes there is room for; looks at the reader's position only if it knows of less.

        Raises: WireError.
        """
        room = self.capacity - self._tail + self._head
        if room < wanted:
            head = self._words[_HEAD]
            if not self._head <= head <= self._tail:
                raise WireError(f"a ring's reader is at {head}, not between {self._head} and {self._tail}")
            self._head = head
            room = self.capacity - self._tail + head
        return room

    def put(self, piece: Piece) -> None:
        """Copy a piece into the room there is. It must fit."""
        size, capacity = len(piece), self.capacity
        at = self._tail % capacity
        end = at + size
        if end <= capacity:
            self._data[at:end] = piece
        else:
            first = capacity - at
            view = memoryview(piece)
            self._data[at:] = view[:first]
            self._data[: size - first] = view[first:]
        self._tail += size

    def write(self, frame: bytes) -> bool:
        """Copy and publish a frame, if there is room for all of it; return whether there was. Raises: WireError."""
        size = len(frame)
        if self.room(size) < size:
            return False
        self.put(frame)
        self.publish()
        return True

    def fill(self, pieces: Sequence[Piece]) -> int:
        """Copy as much of pieces as there is room for, and return how much that was. Raises: WireError."""
        room = left = self.room(sum(map(len, pieces)))
        for piece in pieces:
            if len(piece) > left:
                self.put(memoryview(piece)[:left])
                return room
            self.put(piece)
            left -= len(piece)
        return room - left

    def publish(self) -> None:
        """Let the reader see what was put, and wake it if it sleeps."""
        words = self._words
        words[_TAIL] = self._tail
        _new_lock().acquire()  # This is `fence()`.
        if words[_ASLEEP]:
            words[_ASLEEP] = 0
            self._wake()

    def moved(self) -> bool:
        """Return whether the reader has moved since this side last looked."""
        return bool(self._words[_HEAD] != self._head)

    def say_waiting(self) -> None:
        """Ask to be woken once a quarter of the ring is free; then `fence()` and look at `moved()`."""
        self._words[_WANTED] = max(1, self._tail - self.capacity + self.capacity // 4)

    def say_awake(self) -> None:
        """Ask no more to be woken."""
        self._words[_WANTED] = 0


class RingReader(_Side):
    """The reading side. `wake` wakes the writer."""

    def __init__(self, memory: memoryview, wake: Callable[[], None]) -> None:
        super().__init__(memory, wake)
        self._head = 0

    def available(self) -> int:
        """Return how many bytes can be read. Raises: WireError."""
        available = self._words[_TAIL] - self._head
        if not 0 <= available <= self.capacity:
            raise WireError(f"a ring of {self.capacity} bytes holds {available}")
        return available

    def moved(self) -> bool:
        """Return whether there is something to read."""
        return bool(self._words[_TAIL] != self._head)

    def take(self, targets: Sequence[memoryview], available: int) -> int:
        """Copy out as much of what is available as the targets hold, in order, and return how much that was."""
        data, capacity = self._data, self.capacity
        left = available
        for target in targets:
            size = len(target)
            if size > left:
                size = left
                target = target[:size]
            at = self._head % capacity
            end = at + size
            if end <= capacity:
                target[:] = data[at:end]
            else:
                first = capacity - at
                target[:first] = data[at:]
                target[first:] = data[: size - first]
            self._head += size
            left -= size
            if not left:
                break
        return available - left

    def publish(self) -> None:
        """Give the room of what was taken back to the writer, and wake it if it waits for that."""
        words = self._words
        words[_HEAD] = self._head
        _new_lock().acquire()  # This is `fence()`.
        wanted = words[_WANTED]
        if wanted and self._head >= wanted:
            words[_WANTED] = 0
            self._wake()

    def say_asleep(self) -> None:
        """Ask to be woken when something is published; then `fence()` and look at `moved()`."""
        self._words[_ASLEEP] = 1

    def say_awake(self) -> None:
        """Ask no more to be woken."""
        self._words[_ASLEEP] = 0
