"""The memory that the two ends of a shared-memory link have in common, and how it is handed over."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from collective._links import memfd, pages
from collective._links.rights import close_all
from collective._links.ring import HEADER, RingReader, RingWriter

if TYPE_CHECKING:
    from collections.abc import Callable

CAPACITY: Final = 512 << 10
"""Bytes of the ring of each direction: a few of the largest frames, and still in the processor's cache."""
NONCE: Final = 16
"""Bytes at the start, which only who has this memory mapped can read back."""
_RING: Final = HEADER + CAPACITY
SIZE: Final = HEADER + 2 * _RING


class Region:
    """One end's mapping. The first ring is what the dialer writes.

    :param memory: the mapping, which is released with this object.
    :param wake: wakes the other end, which sleeps.
    """

    def __init__(self, memory: memoryview, wake: Callable[[], None], *, dialed: bool) -> None:
        self._memory = memory
        rings = [memory[start : start + _RING] for start in (HEADER, HEADER + _RING)]
        self.writer = RingWriter(rings[0 if dialed else 1], wake)
        self.reader = RingReader(rings[1 if dialed else 0], wake)
        for ring in rings:
            ring.release()

    @property
    def nonce(self) -> bytes:
        """What the dialer wrote at the start of the memory."""
        return bytes(self._memory[:NONCE])

    def close(self) -> None:
        """Unmap the memory, or where somebody copies a piece of it just now, let him be the last. Idempotent."""
        self.writer.release()
        self.reader.release()
        self._memory.release()


def create(wake: Callable[[], None]) -> tuple[Region, int]:
    """Return the dialer's end, and the descriptor to send, which the caller closes.

    Raises:
        OSError: this kernel or sandbox has no memfds, or there are no descriptors or no memory left.
    """
    descriptor = memfd.create("gangline", SIZE, contents=os.urandom(NONCE))
    try:
        return Region(pages.memory_of(descriptor, SIZE), wake, dialed=True), descriptor
    except BaseException:
        os.close(descriptor)
        raise


def adopt(descriptors: list[int], wake: Callable[[], None]) -> Region:
    """Return the acceptor's end; takes over the descriptors that the dialer sent.

    Raises:
        OSError: they are not what `create` makes, or cannot be mapped.
    """
    try:
        if len(descriptors) != 1:
            raise OSError(f"{len(descriptors)} descriptors came, not 1")
        if not memfd.is_sealed(descriptors[0], SIZE):
            raise OSError("the memory is of another size, or not sealed")
        return Region(pages.memory_of(descriptors[0], SIZE), wake, dialed=False)
    finally:
        close_all(descriptors)
