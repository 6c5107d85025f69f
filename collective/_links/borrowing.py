"""What one end of a link borrows from the other: memory of its segments, read in place."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Final

import numpy as np

from collective._links import rights
from collective._links.arena import arena
from collective._links.lending import MOST_SEGMENTS
from collective._links.mapping import PAGE, Access, MemoryFile, Pages
from collective._links.memfd import is_sealed
from collective._links.wire import ADOPTED, FORGOT, WireError, encode_release, frame_head

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from collective._links.wire import Reference

_MOST_RELEASED: Final = 4096
"""What one frame gives back."""


class Borrowed(np.ndarray):
    """Memory of a lender. It goes back when this and all that was made from it are gone."""

    segment: _Foreign
    start: int


class _Foreign:
    """A segment of another process, mapped once however many links show it. Raises: OSError."""

    def __init__(self, file: MemoryFile) -> None:
        self.file = file
        self.array, self.pages = file.map(Access.READ)


_mapped: weakref.WeakValueDictionary[tuple[int, int], _Foreign] = weakref.WeakValueDictionary()
"""By device and inode, which no living file shares with another."""
os.register_at_fork(after_in_child=_mapped.clear)


def _map(descriptor: int, nbytes: int) -> _Foreign | None:
    """Map a segment, or find it mapped; None where that cannot be. Takes over the descriptor. Raises: WireError."""
    if not is_sealed(descriptor, nbytes):
        os.close(descriptor)
        raise WireError(f"a segment that is not sealed, or not of {nbytes} bytes")
    status = os.fstat(descriptor)
    key = status.st_dev, status.st_ino
    found = _mapped.get(key)
    if found is not None:
        os.close(descriptor)
        return found
    file = MemoryFile(descriptor, nbytes)
    try:
        foreign = _mapped[key] = _Foreign(file)
    except OSError:  # too many mappings, or no address space
        file.close()
        return None
    return foreign


class Borrower:
    """The borrowing half of one link's sharing.

    :param look: take the descriptors that have come over the socket.
    """

    def __init__(self, urge: Callable[[bytes], None], look: Callable[[], object]) -> None:
        self._urge = urge
        self._look = look
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._segments: dict[int, _Foreign] = {}
        self._held: dict[int, int] = {}
        self._released: deque[int] = deque()
        self._scheduled = False
        self._closed = False

    @property
    def nbytes(self) -> int:
        """Bytes that somebody here holds."""
        return sum(list(self._held.values()))  # At once: other threads let go of some.

    def adopt(self, number: int, nbytes: int, descriptor: int | None) -> None:
        """Take a segment that the other end shows; takes over the descriptor. Raises: WireError.

        Where there is no descriptor or no memory left for it, the other end is told, and sends data instead.
        """
        if number in self._segments or len(self._segments) >= MOST_SEGMENTS:
            rights.close_all([descriptor] if descriptor is not None else [])
            raise WireError(f"segment {number} of {nbytes} bytes is another, or one too many")
        foreign = _map(descriptor, nbytes) if descriptor is not None else None
        if foreign is not None:
            self._segments[number] = foreign
        self._urge(frame_head(ADOPTED, 0, count=number, head=foreign is not None))

    def borrow(self, references: Sequence[Reference]) -> dict[int, memoryview]:
        """Return read-only views of what the other end lends, by the buffers' places in the message.

        Raises: WireError.
        """
        return {reference.place: self._view(reference) for reference in references}

    def borrow_one(self, reference: Reference) -> memoryview | None:
        """Return such a view, or None where the segment could not be mapped here, or never was.

        Raises: WireError.
        """
        self._find(reference.segment)
        if reference.segment in self._segments:
            return self._view(reference)
        self._urge(encode_release([reference.number]))
        return None

    def forget(self, number: int) -> None:
        """The other end has no use for a segment any more. Raises: WireError."""
        if self._segments.pop(number, None) is None:
            raise WireError(f"segment {number} is gone, which was never there")
        self._urge(frame_head(FORGOT, 0, count=number))

    def close(self) -> None:
        """The link has ended: nothing goes back any more, and what is held stays readable."""
        self._closed = True
        self._segments.clear()
        self._urge = self._look = _do_nothing  # What is held refers to this object, and shall not keep the link.

    drop = close

    def _find(self, number: int) -> _Foreign | None:
        if number not in self._segments:
            self._look()  # Its descriptor may still be on the socket.
        return self._segments.get(number)

    def _view(self, reference: Reference) -> memoryview:
        number, start, stop = reference.number, reference.offset, reference.offset + reference.size
        segment = self._find(reference.segment)
        if segment is None or number in self._held or not 0 <= start < stop <= segment.file.nbytes:
            raise WireError(f"bytes {start} to {stop} of segment {reference.segment} are not there")
        borrowed = segment.array[start:stop].view(Borrowed)
        borrowed.segment, borrowed.start = segment, start
        self._held[number] = reference.size
        key = segment.pages.keep(start, stop)
        weakref.finalize(borrowed, self._let_go, number, segment.pages, key).atexit = False
        return borrowed.data

    def _let_go(self, number: int, pages: Pages, key: int) -> None:
        """Give memory back. This is a finalizer: in any thread, in the middle of anything."""
        pages.let_go(key)
        self._held.pop(number, None)
        if self._closed:
            return
        self._released.append(number)
        if self._scheduled:
            return
        self._scheduled = True
        try:
            if threading.get_ident() == self._thread:
                self._loop.call_soon(self._give_back)
            else:
                self._loop.call_soon_threadsafe(self._give_back)
        except RuntimeError:
            self._closed = True  # The loop is, and the link with it.

    def _give_back(self) -> None:
        self._scheduled = False
        while self._released and not self._closed:
            count = min(len(self._released), _MOST_RELEASED)
            self._urge(encode_release([self._released.popleft() for _ in range(count)]))


def _do_nothing(*_: object) -> None:
    """Stand in for what a link that has ended did."""


def private(buffer: memoryview) -> memoryview:
    """Return writable memory with a buffer's contents, for the caller alone.

    A buffer that is writable is returned itself, since nobody else holds it, unless it is memory of a block. That and
    borrowed memory is mapped once more, so that a write copies its page; it goes back when that mapping is gone as
    well. Anything else is copied.
    """
    if not buffer.readonly:
        return arena().private(buffer) or buffer
    borrowed = buffer.obj
    if not isinstance(borrowed, Borrowed) or borrowed.segment.file.descriptor < 0:  # Below 0 in a forked child.
        return memoryview(bytearray(buffer))
    within = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0] - borrowed.__array_interface__["data"][0]
    start = borrowed.start + within
    first = start // PAGE * PAGE
    nbytes = start + buffer.nbytes - first
    try:
        array, pages = borrowed.segment.file.map(Access.PRIVATE, start=first, nbytes=nbytes, holding=borrowed)
    except OSError:  # too many mappings, or no address space: a copy does as well
        return memoryview(bytearray(buffer))
    pages.keep(0, nbytes)
    return array[start - first :].data
