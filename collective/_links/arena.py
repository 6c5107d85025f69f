"""The arena: memory of this process that processes of its host read in place.

It consists of segments, each a memory file, which a link shows to its other end once. A large message is copied into a
part of a segment, an extent, and only where that is travels over the link. An extent is free again when all who use it
have let go: its owner, and each receiver. Space is taken first-fit, so that the same warm pages are used again.

One arena serves all loops of a process. Any thread may use it; what lets go of extents may be the garbage collector,
in the middle of anything, so that letting go never waits for the lock: it is left to whoever has that.
"""

from __future__ import annotations

import os
import threading
import weakref
from bisect import bisect_left, bisect_right, insort
from collections import deque
from time import monotonic
from typing import TYPE_CHECKING, Final

import numpy as np

from collective._links import mapping
from collective._links.mapping import round_up
from collective._links.processes import has_ended
from collective._links.segments import Extent, Segment, User
from collective.errors import OutOfResources
from collective.types import ArenaStatistics

if TYPE_CHECKING:
    from collections.abc import Callable

_SEGMENT: Final = 64 << 20
"""Bytes of a segment, unless an extent needs more. Pages that were never written take no memory."""
_WARM: Final = 256 << 20
"""Bytes of segments in which nothing is used that are kept for later."""
_LIMIT: Final = 1 << 30
DYING_SECONDS: Final = 1.0
"""For how long a link's end may be the first sign of the other process's death."""


def default_limit() -> int:
    """Return how many bytes an arena may map: GANGLINE_ARENA_BYTES, else an eighth of the memory, at most 1 GiB."""
    wish = os.environ.get("GANGLINE_ARENA_BYTES")
    if wish:
        return int(wish)
    return min(_LIMIT, os.sysconf("SC_PHYS_PAGES") * mapping.PAGE // 8)


class _Owned(np.ndarray):
    """The memory of a block; who looks at any of it keeps it alive."""


class Block:
    """Memory that its owner writes, and that links of shared memory send without copying it.

    Sending `memory`, a part of it, or an array in it, any number of times and to any number of processes of this host,
    shows it to the receivers: it must not be changed until they have let go, or they see that. Links of other kinds
    copy. It is freed when `memory` and all that was made from it are gone here, and every receiver's arrays too.
    """

    def __init__(self, memory: memoryview, extent: Extent) -> None:
        self.memory = memory
        self._extent = extent

    @property
    def uses(self) -> int:
        """How many use it: its owner, and each message and receiver that has not let go."""
        return self._extent.uses

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.memory.nbytes


class _Lock:
    """A lock for those who may wait, and for those who may not: they leave their work to who has it.

    :param work: does what was left. It takes this lock, if `acquire(False)` does.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        lock = threading.Lock()
        self.acquire = lock.acquire
        self.release_only = lock.release
        """For who does the work, and looks again himself whether some was left."""
        self._work = work

    def release(self) -> None:
        """Release it, and do what was left meanwhile. Whoever comes later gets the lock himself."""
        self.release_only()
        self._work()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class Arena:
    """The segments of one process. `limit` bounds the bytes that they map for those who have no limit of their own."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._segments: list[Segment] = []
        self._numbers = 0
        self._users: weakref.WeakSet[User] = weakref.WeakSet()
        self._let_go: deque[Extent] = deque()
        self._lock = _Lock(self._drain)
        self._dying: list[tuple[int, float, list[Extent]]] = []
        self._blocks = 0
        self._dropped = False
        self._shortage: OSError | None = None
        """Why the last `take` could make no segment, where the system had none."""

    def allocate(self, nbytes: int, *, beyond: bool = False, watch: Callable[[int], None] | None = None) -> Block:
        """Return new memory, whose contents are undefined.

        :param beyond: do not count it against the limit: the caller has one of his own.
        :param watch: is told when only one uses it any more (its owner or the last receiver), and when nobody does; in
            any thread, under a lock.

        Raises:
            MemoryError: the arena has reached its limit, or the system has no more.
        """
        extent = self.take(nbytes, beyond=beyond)
        if extent is None:
            why = f"the arena may have {self.limit}, set by GANGLINE_ARENA_BYTES"
            if (error := self._shortage) is not None:
                why = str(OutOfResources.of(error, f"this process ({os.getpid()})", "take more") or error)
            raise MemoryError(f"no {nbytes} bytes of shared memory: {why}")
        owned = extent.array.view(_Owned)
        with self._lock:
            key = extent.segment.pages.keep(extent.offset, extent.offset + nbytes)
            extent.is_block = extent.owned = True
            extent.watch = watch
            insort(extent.segment.blocks, (extent.offset, extent), key=_offset)
            self._blocks += 1
        weakref.finalize(owned, self._disown, extent, key).atexit = False
        return Block(owned.data, extent)

    def take(self, nbytes: int, *, beyond: bool = False) -> Extent | None:
        """Return an extent with one use, or None where the limit is reached or the system has no more memory."""
        self.settle()
        with self._lock:
            self._shortage = None
            for segment in self._segments:
                if segment.beyond == beyond and not segment.retired and (extent := segment.take(nbytes)) is not None:
                    return extent
            if nbytes <= 0 or self._dropped:
                return None
            size = round_up(nbytes)
            if not beyond and not self._make_room(size):
                return None
            try:
                room = _SEGMENT if beyond else self.limit - self._counted()
                segment = Segment(self._numbers, max(size, min(_SEGMENT, room)), beyond=beyond)
            except OSError as error:  # no descriptors, no memory, or a sandbox: links go on without
                self._shortage = error
                return None
            self._numbers += 1
            self._segments.append(segment)
            return segment.take(nbytes)

    def _make_room(self, size: int) -> bool:
        """See to it that so many bytes more are within the limit, at the cost of segments in which nothing is used.

        Return whether they are. Nothing is given up in vain.
        """
        excess = self._counted() + size - self.limit
        idle = [segment for segment in self._segments if segment.idle and not segment.beyond]
        if excess > sum(segment.nbytes for segment in idle):
            return False
        for segment in idle:
            if excess <= 0:
                break
            excess -= segment.nbytes
            self._remove(segment)
        return True

    def find(self, view: memoryview | bytes) -> tuple[Extent, int] | None:
        """Return the extent of the block that a buffer lies in, with one more use, and where in it the buffer is."""
        if not self._blocks or type(view) is bytes:
            return None
        address: int = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
        with self._lock:
            for segment in self._segments:
                offset = address - segment.pages.address
                if 0 <= offset < segment.nbytes:
                    at = bisect_right(segment.blocks, offset, key=_offset) - 1
                    extent = segment.blocks[at][1] if at >= 0 else None
                    if extent is None or offset + len(view) > extent.offset + extent.nbytes:
                        return None
                    extent.uses += 1
                    return extent, offset - extent.offset
        return None

    def private(self, view: memoryview) -> memoryview | None:
        """Map memory of a block once more, so that writing copies its page for the writer alone; None: it is no block.

        The mapping holds the memory as `view` does.
        """
        found = self.find(view)
        if found is None:
            return None
        extent, start = found
        try:
            begin = extent.offset + start
            first = begin // mapping.PAGE * mapping.PAGE
            nbytes = begin + view.nbytes - first
            file = extent.segment.file
            try:
                array, pages = file.map(mapping.Access.PRIVATE, start=first, nbytes=nbytes, holding=view)
            except OSError:  # too many mappings, or no address space: a copy does as well
                return memoryview(bytearray(view))
            pages.keep(0, nbytes)
            return array[begin - first :].data
        finally:
            self.release(extent)

    def release(self, extent: Extent) -> None:
        """Take one use away. In any thread, also within a finalizer."""
        self._let_go.append(extent)
        self._drain()

    def join(self, user: User) -> None:
        """Take note of who has a use for the arena: it keeps warm pages while there is one."""
        self._users.add(user)

    def leave(self, user: User, lent: list[Extent], process: int, *, dead: bool) -> None:
        """Take note that a link has ended, with what its other end has not given back.

        Who is on the other end may still read that: where it is not found dead soon, the segments of these extents are
        retired. They go when all else in them is free, and the receiver's mapping keeps what it holds.

        :param process: a pidfd of the other end, which stays the caller's, or -1.
        :param dead: whether the other end is known to be dead.
        """
        self._users.discard(user)
        watched = _copy_of(process) if lent and not dead else -1
        if watched >= 0:
            with self._lock:
                self._dying.append((watched, monotonic() + DYING_SECONDS, lent))
        else:
            self._give_up(lent, dead=dead)
        self.settle()
        self._trim()

    def statistics(self) -> ArenaStatistics:
        """Return what is used, and by whom."""
        self.settle()
        with self._lock:
            mapped = self._mapped()
            return ArenaStatistics(
                limit=self.limit,
                mapped=mapped,
                used=mapped - sum(segment.unused for segment in self._segments),
                owned=sum(block.size for segment in self._segments for _, block in segment.blocks if block.owned),
                segments=len(self._segments),
            )

    def drop(self) -> None:
        """Do nothing more, in a forked child."""
        self._dropped = True
        for process, _, _ in self._dying:
            os.close(process)

    def _mapped(self) -> int:
        return sum(segment.nbytes for segment in self._segments)

    def _counted(self) -> int:
        return sum(segment.nbytes for segment in self._segments if not segment.beyond)

    def _disown(self, extent: Extent, key: int) -> None:
        extent.owned = False
        extent.segment.pages.let_go(key)
        self.release(extent)

    def settle(self, *, last: bool = False) -> None:
        """See which of the ends that have left are dead, and free what is free. Every other call does this as well.

        :param last: wait for none of them any more: perhaps nobody looks again.
        """
        if self._dying and not self._dropped:
            with self._lock:
                dying, self._dying = self._dying, []
            for entry in dying:
                process, deadline, lent = entry
                dead = has_ended(process)
                if not dead and not last and monotonic() < deadline:
                    with self._lock:
                        self._dying.append(entry)
                    continue
                os.close(process)
                self._give_up(lent, dead=dead)
        self._drain()

    def _give_up(self, lent: list[Extent], *, dead: bool) -> None:
        for extent in lent:
            extent.segment.retired |= not dead
            self._let_go.append(extent)

    def _drain(self) -> None:
        # A finalizer that comes while somebody has the lock, perhaps its own thread, leaves its work to him.
        while self._let_go and not self._dropped and self._lock.acquire(False):
            try:
                while self._let_go:
                    self._take_away(self._let_go.popleft())
            finally:
                self._lock.release_only()

    def _take_away(self, extent: Extent) -> None:
        extent.uses -= 1
        if extent.watch is not None and extent.uses <= 1:
            extent.watch(extent.uses)
        if extent.uses:
            return
        segment = extent.segment
        if extent.is_block:
            del segment.blocks[bisect_left(segment.blocks, extent.offset, key=_offset)]
            self._blocks -= 1
        segment.give_back(extent)
        if segment.idle and (segment.retired or not self._users or self._idle() > _WARM):
            self._remove(segment)

    def _idle(self) -> int:
        return sum(segment.nbytes for segment in self._segments if segment.idle)

    def _trim(self) -> None:
        """Keep nothing warm where no link is left."""
        if self._users or self._dropped:
            return
        with self._lock:
            for segment in [segment for segment in self._segments if segment.idle]:
                self._remove(segment)

    def _remove(self, segment: Segment) -> None:
        self._segments.remove(segment)
        segment.file.close()
        for user in list(segment.users):
            user.segment_gone(segment.number)


def _copy_of(process: int) -> int:
    """Return a descriptor of one's own for a process, or -1 where there is none to have."""
    try:
        return os.dup(process) if process >= 0 else -1
    except OSError:  # No descriptors are left: nobody will know whether the process is dead.
        return -1


def _offset(entry: tuple[int, Extent]) -> int:
    return entry[0]


_arena: Arena | None = None
_making = threading.Lock()


def arena() -> Arena:
    """Return this process's arena, made at first use."""
    global _arena
    if _arena is None:
        with _making:
            if _arena is None:
                _arena = Arena(default_limit())
    return _arena


def _in_child() -> None:
    global _arena, _making
    _making = threading.Lock()  # Another thread of the parent may have held it.
    if _arena is not None:
        _arena.drop()
        _arena = None


os.register_at_fork(after_in_child=_in_child)
