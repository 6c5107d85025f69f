"""The memory and the eventfds that the two ends of a shared-memory link have in common; how they are handed over."""

from __future__ import annotations

import mmap
import os
from typing import Final

from collective._links import memfd
from collective._links.ring import HEADER, RingReader, RingWriter

CAPACITY: Final = 512 << 10
"""Bytes of the ring of each direction: a few of the largest frames, and still in the processor's cache."""
NONCE: Final = 16
"""Bytes at the start, which only who has this memory mapped can read back."""
_RING: Final = HEADER + CAPACITY
SIZE: Final = HEADER + 2 * _RING


class Region:
    """One end's mapping. The first ring is what the dialer writes; of the eventfds the first is the dialer's."""

    def __init__(self, memory: int, eventfds: tuple[int, int], *, dialed: bool) -> None:
        """Map the memory; takes over all three descriptors. Raises: OSError; the descriptors are closed then."""
        self._eventfds = eventfds
        self.wake = eventfds[0 if dialed else 1]
        """The eventfd on which this end is woken."""
        try:
            self._map = mmap.mmap(memory, SIZE)
        except BaseException:
            close_all((memory, *eventfds))
            raise
        os.close(memory)  # The map keeps a descriptor of its own.
        self._memory = memoryview(self._map)
        rings = [self._memory[start : start + _RING] for start in (HEADER, HEADER + _RING)]
        other = eventfds[1 if dialed else 0]
        self.writer = RingWriter(rings[0 if dialed else 1], other)
        self.reader = RingReader(rings[1 if dialed else 0], other)
        for ring in rings:
            ring.release()

    @property
    def nonce(self) -> bytes:
        """What the dialer wrote at the start of the memory."""
        return bytes(self._memory[:NONCE])

    def close(self) -> None:
        """Unmap the memory and close the descriptors. Idempotent."""
        eventfds, self._eventfds = self._eventfds, (-1, -1)
        if eventfds[0] < 0:
            return
        close_all(eventfds)
        self.writer.release()
        self.reader.release()
        self._memory.release()
        self._map.close()

    def drop(self) -> None:
        """Do the same in a forked child, which may have been forked while a piece of the memory was being copied."""
        try:
            self.close()
        except BufferError:
            return  # Then the last who looks at it unmaps it.


def create() -> tuple[Region, list[int]]:
    """Return the dialer's end, and the descriptors to send, which the caller closes.

    Raises:
        OSError: this kernel or sandbox has no memfds or eventfds, or there are no descriptors left.
    """
    made: list[int] = []
    try:
        made.append(memfd.create("gangline", SIZE, contents=os.urandom(NONCE)))
        made += [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2)]
        own: list[int] = []
        try:
            for descriptor in made:
                own.append(os.dup(descriptor))  # noqa: PERF401  # Those made before one that fails have to be closed.
        except BaseException:
            close_all(own)
            raise
        return Region(own[0], (own[1], own[2]), dialed=True), made
    except BaseException:
        close_all(made)
        raise


def adopt(descriptors: list[int]) -> Region:
    """Return the acceptor's end; takes over the descriptors that the dialer sent.

    Raises:
        OSError: they are not what `create` makes, or cannot be mapped.
    """
    try:
        if len(descriptors) != 3:
            raise OSError(f"{len(descriptors)} descriptors came, not 3")
        memory, *eventfds = descriptors
        if not memfd.is_sealed(memory, SIZE):
            raise OSError("the memory is of another size, or not sealed")
        for eventfd in eventfds:
            if os.readlink(f"/proc/self/fd/{eventfd}") != "anon_inode:[eventfd]":
                raise OSError("no eventfd")
            os.set_blocking(eventfd, False)
    except BaseException:
        close_all(descriptors)
        raise
    return Region(memory, (eventfds[0], eventfds[1]), dialed=False)


def close_all(descriptors: list[int] | tuple[int, ...]) -> None:
    """Close descriptors."""
    for descriptor in descriptors:
        os.close(descriptor)
