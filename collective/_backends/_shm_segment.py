"""The memory that the members of a group share, and the words in it by which they tell each other how far they are.

A memfd holds a head and two slots for each member, and room for their blocks (`_shm_blocks`). A member writes its own
words and slots and reads the others'. Publishing relies on the order in which x86 makes stores visible: data first,
then the word that tells of it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import numpy as np

from collective._backends._shm_blocks import SPAN, Blocks
from collective._links import forks, memfd
from collective._links.mapping import PAGE, Access, MemoryFile, round_up
from collective._links.ring import fence

if TYPE_CHECKING:
    from collections.abc import Sequence

_LINE: Final = 512
"""Bytes of the head that each member has, so that no cache line, nor a prefetched neighbour, has two writers."""
_POSTED, _AWAITED, _PROCESS, _DISOWNED = 0, 16, 32, 48
"""Words in a member's line: phases that it has posted; the phase that it sleeps for, or 0; its process id; whether
its callers' memory is their own again, though others may be reading it."""


class Geometry:
    """Where things lie in the segment of a group of so many members.

    :ivar chunk: bytes of data that a member can show to the others at a time: 1 MiB, and less with more than 4 members,
        so that all slots together stay in a shared cache. Measured with 2 and 4 processes on 2 cores, 512 KiB take a
        fourth to a half more time for 1 to 64 MiB, 256 KiB up to twice, as waits begin to count.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.chunk = max(64 << 10, round_up(min(1 << 20, (4 << 20) // size)))
        self._row = round_up(8 * size)
        self._result = round_up(self.chunk // size + 16)
        """Bytes of the largest shard of a chunk, which has an element more than the chunk's even parts."""
        self._slot = self._row + self.chunk + self._result
        self._head = PAGE + round_up(size * _LINE)
        self.nbytes = self._head + 2 * size * self._slot
        """Bytes of head and slots; the spans of the members' blocks come behind."""
        self.file_bytes = self.nbytes + size * SPAN

    def line(self, rank: int) -> int:
        """Return where a member's words begin, in words."""
        return (PAGE + rank * _LINE) // 8

    def slot(self, rank: int, which: int) -> tuple[slice, slice, slice]:
        """Return where a slot's row of sizes, its chunk and its result are."""
        row = self._head + (2 * rank + which) * self._slot
        chunk = row + self._row
        result = chunk + self.chunk
        return slice(row, row + 8 * self.size), slice(chunk, result), slice(result, result + self._result)


def create_memory(geometry: Geometry, nonce: bytes) -> int:
    """Return the descriptor of a new memory file with the nonce in it, whose size nobody can change any more."""
    return memfd.create("gangline-group", geometry.file_bytes, contents=nonce)


def is_genuine(fd: int, geometry: Geometry, nonce: bytes) -> bool:
    """Whether a descriptor is of the memory file that a member made with this nonce."""
    return memfd.is_sealed(fd, geometry.file_bytes) and os.pread(fd, len(nonce), 0) == nonce


class Segment:
    """One member's view of the segment, and its part in telling and waiting.

    :param memory: descriptor of the memory file; a copy of it is kept.
    :param bells: each member's eventfd, which the others write to wake it; owned by the segment from now on.
    """

    def __init__(self, geometry: Geometry, rank: int, memory: int, bells: Sequence[int]) -> None:
        self.geometry = geometry
        self.rank = rank
        self.size = geometry.size
        self.bell = bells[rank]
        self._bells: list[int] = list(bells)
        file = MemoryFile(os.dup(memory), geometry.file_bytes)
        self._bytes, _ = file.map(Access.WRITE, nbytes=geometry.nbytes)
        self.blocks = Blocks(file, start=geometry.nbytes, rank=rank, size=self.size)
        head = geometry.slot(0, 0)[0].start
        self._words = self._bytes.data[:head].cast("Q")
        lines = [geometry.line(other) for other in range(self.size)]
        self._own = lines[rank]
        self.others = [(rank + step) % self.size for step in range(1, self.size)]
        """The other ranks, from the one that follows this one on: so that not all turn to one at the same time."""
        self._others = [(other, line) for other, line in enumerate(lines) if other != rank]
        self._posts = [line + _POSTED for _, line in self._others]
        self.phase = 0
        """How many phases this member has posted."""
        self._words[self._own + _PROCESS] = os.getpid()
        slots = [[geometry.slot(other, which) for which in (0, 1)] for other in range(self.size)]
        self.rows = [[self._bytes[row].view(np.int64) for row, _, _ in each] for each in slots]
        self.chunks = [[self._bytes[chunk] for _, chunk, _ in each] for each in slots]
        self.results = [[self._bytes[result] for _, _, result in each] for each in slots]
        self.shown = [[array.data for array in each] for each in self.chunks]
        """The chunks again, as memoryviews, which are quicker for a few bytes."""
        forks.hold(self)

    @property
    def writing(self) -> int:
        """Which of its slots a member writes before it posts its next phase."""
        return (self.phase + 1) & 1

    @property
    def reading(self) -> int:
        """Which slots show the phase that this member posted last."""
        return self.phase & 1

    def shares_process(self) -> bool:
        """Whether another member, which has mapped the segment too, lives in this process."""
        return any(self._words[line + _PROCESS] == os.getpid() for _, line in self._others)

    def post(self) -> None:
        """Tell the others that this member's part of the next phase is there, and wake who sleeps for the last one."""
        self.phase += 1
        words, own, phase = self._words, self._own, self.phase
        words[own + _POSTED] = phase
        fence()  # Both who posts and who goes to sleep store, then look: without it both may miss the other's store.
        for other, line in self._others:
            awaited = words[line + _AWAITED]
            if awaited and awaited <= phase and self._all_posted(awaited, line):
                os.eventfd_write(self._bells[other], 1)

    @property
    def arrived(self) -> bool:
        """Whether all members have posted the phase that this one posted last."""
        words, phase = self._words, self.phase
        for post in self._posts:  # a plain loop: a fraction of the time that all(...) takes
            if words[post] < phase:
                return False
        return True

    def has_posted(self, rank: int) -> bool:
        """Whether a member has posted the phase that this one posted last."""
        return bool(self._words[self.geometry.line(rank) + _POSTED] >= self.phase)

    def disown(self) -> None:
        """Say that this member's callers may change from now on what it lent to the others: its operations fail."""
        self._words[self._own + _DISOWNED] = 1

    def owns(self, rank: int) -> bool:
        """Whether what a member lent was as it should be, when it was read before this."""
        # Whatever its caller stores there comes after the word, and x86 keeps the order of stores and that of loads.
        return not self._words[self.geometry.line(rank) + _DISOWNED]

    def announce_sleep(self) -> bool:
        """Say that this member sleeps until all have come; False where they just have. The bell rings when they do."""
        self._words[self._own + _AWAITED] = self.phase
        fence()
        if self.arrived:
            self.announce_awake()
            return False
        return True

    def announce_awake(self) -> None:
        """Take back `announce_sleep`, and silence the bell."""
        self._words[self._own + _AWAITED] = 0
        try:
            os.eventfd_read(self.bell)
        except BlockingIOError:
            pass

    def ring(self) -> None:
        """Wake this member's own thread; from any thread."""
        os.eventfd_write(self.bell, 1)

    def close(self) -> None:
        """Close the descriptors. The memory goes when the last array of it does. Idempotent."""
        forks.release(self)
        bells, self._bells = self._bells, []
        for bell in bells:
            os.close(bell)
        self.blocks.close()
        self._words = memoryview(b"").cast("Q")
        self._bytes = np.empty(0, np.uint8)
        self.rows, self.chunks, self.results, self.shown = [], [], [], []

    def drop(self) -> None:
        """Let go in a forked child, which finds zeros in the memory's place (`mapping`)."""
        for bell in self._bells:
            os.close(bell)
        self._bells = []

    def _all_posted(self, phase: int, without: int) -> bool:
        """Whether all but the member of that line have posted a phase."""
        words = self._words
        return words[self._own + _POSTED] >= phase and all(
            words[line + _POSTED] >= phase for _, line in self._others if line != without
        )
