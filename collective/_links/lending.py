"""What one end of a link lends to the other: which segments it has shown, and which extents have not come back."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np

from collective._core.offload import LONG, offload
from collective._gate import Gate
from collective._links import mapping
from collective._links.arena import DYING_SECONDS, arena
from collective._links.timers import call_later_or_at_close
from collective._links.wire import FORGET, REFERENCE, SHOW, SHOWN, WireError, frame_head
from collective.abc import LARGE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from collective._links.segments import Extent, Segment
    from collective._links.wire import Piece

MOST_SEGMENTS: Final = 256
"""Segments that one end may have shown to the other."""
_AGAIN: Final = 1.0
"""Seconds after which a segment is shown again that could not be mapped: there may be descriptors by then."""
MOST_REFERENCES: Final = 2000
"""Buffers of one message that may be lent: their references fit into one frame."""


class Lender:
    """The lending half of one link's sharing."""

    def __init__(self, sock: socket.socket, urge: Callable[[bytes], None]) -> None:
        self._sock = sock
        self._urge = urge
        self._loop = asyncio.get_running_loop()
        self._shown: set[int] = set()
        """What the other end has mapped."""
        self._showing: dict[int, list[Loan]] = {}
        """What it was sent and has not answered, and who waits for that."""
        self._vanished: set[int] = set()
        """Which of these are no more: it is told when it has answered."""
        self._declined: dict[int, float] = {}
        """What it could not map, and when it is asked again."""
        self._leaving: set[int] = set()
        """What the other end was told to forget. Descriptors overtake that word: until it confirms, these count."""
        self._lent: dict[int, Extent] = {}
        self._loans: set[Loan] = set()
        self._taken_back: set[int] = set()
        self._numbers = 0
        self._closed = False
        self._arena = arena()
        self._arena.join(self)

    @property
    def nbytes(self) -> int:
        """Bytes that the other end holds."""
        return sum(extent.nbytes for extent in self._lent.values())

    def loan(self, buffers: Sequence[Piece]) -> Loan | None:
        """Find room for the large ones of a message's buffers, as far as there is any; None where there is none."""
        loan = Loan(self)
        for index, buffer in enumerate(buffers):
            if len(buffer) > LARGE and len(loan.shares) < MOST_REFERENCES:
                found = self._arena.find(buffer)
                extent, start = found or (self._arena.take(len(buffer)), 0)
                if extent is None:
                    break
                if not self._show(extent.segment):
                    self._arena.release(extent)
                    break
                loan.add(index, extent, start, buffer, copied=found is None)
        if not loan.shares:
            return None
        self._loans.add(loan)
        for number in {extent.segment.number for _, extent, _, _ in loan.shares}.intersection(self._showing):
            loan.awaited.add(number)
            self._showing[number].append(loan)
        return loan

    def lend(self, extent: Extent) -> int:
        """Count a use of an extent as the other end's from now on; return the number by which it is given back."""
        self._numbers += 1
        self._lent[self._numbers] = extent
        return self._numbers

    def lend_view(self, view: memoryview) -> tuple[int, ...] | None:
        """Lend memory of a block apart from any message: return a Reference, or None where it cannot be shown."""
        found = self._arena.find(view)
        if found is None:
            return None
        extent, start = found
        if not self._show(extent.segment):
            self._arena.release(extent)
            return None
        return 0, extent.segment.number, self.lend(extent), extent.offset + start, len(view)

    def take_back(self, reference: tuple[int, ...]) -> None:
        """Undo a `lend_view` of which the other end has not heard, as far as is known here."""
        extent = self._lent.pop(reference[2], None)
        if extent is not None:
            self._taken_back.add(reference[2])
            self._arena.release(extent)

    def give_back(self, numbers: Sequence[int]) -> None:
        """Take what the other end does not use any more. Raises: WireError."""
        for number in numbers:
            extent = self._lent.pop(number, None)
            if extent is None and number in self._taken_back:
                self._taken_back.remove(number)
                continue
            if extent is None:
                raise WireError(f"shared memory {number} was given back, which was not lent")
            self._arena.release(extent)

    def concluded(self, loan: Loan) -> None:
        """Take note that a loan has handed its extents over, or let go of them. In any thread."""
        self._loans.discard(loan)

    def keep(self, extent: Extent) -> None:
        """Let go of an extent that was not lent after all. In any thread."""
        self._arena.release(extent)

    def adopted(self, number: int, *, mapped: bool) -> None:
        """The other end has mapped a segment, or could not. Raises: WireError."""
        waiting = self._showing.pop(number, None)
        if waiting is None:
            raise WireError(f"segment {number} was adopted, which was not shown")
        if mapped:
            self._shown.add(number)
        else:
            self._declined[number] = self._loop.time() + _AGAIN
        for loan in waiting:
            loan.answered(number, mapped=mapped)
        if number in self._vanished:
            self._vanished.remove(number)
            self._forget(number)

    def forgot(self, number: int) -> None:
        """The other end has forgotten a segment. Raises: WireError."""
        if number not in self._leaving:
            raise WireError(f"segment {number} was forgotten, which was still shown or never was")
        self._leaving.remove(number)

    def segment_gone(self, number: int) -> None:
        with contextlib.suppress(RuntimeError):  # The loop is closed, and the link with it.
            self._loop.call_soon_threadsafe(self._forget, number)

    def close(self, process: int, *, dead: bool) -> None:
        """The link has ended; see `Arena.leave`. What was not lent yet is let go of, also where the loop is closed."""
        if not self._closed:
            self._closed = True
            for loan in list(self._loans):
                loan.drop()
            lent, self._lent = list(self._lent.values()), {}
            over = self._loop.is_closed()  # Then nobody would look again whether the other end has died.
            self._arena.leave(self, lent, -1 if over else process, dead=dead)
            if lent and not over:
                call_later_or_at_close(self._loop, DYING_SECONDS, self._settle)

    def _settle(self) -> None:
        self._arena.settle(last=self._loop.is_closed())

    def _forget(self, number: int) -> None:
        self._declined.pop(number, None)
        if number in self._showing:
            self._vanished.add(number)
        if number in self._shown and not self._closed:
            self._shown.remove(number)
            self._leaving.add(number)
            self._urge(frame_head(FORGET, 0, count=number))

    def _show(self, segment: Segment) -> bool:
        """Send the other end a segment's descriptor, if it does not have it. Return whether it has, or was sent it."""
        if segment.number in self._shown or segment.number in self._showing:
            return True
        if len(self._shown) + len(self._showing) + len(self._leaving) >= MOST_SEGMENTS:
            return False
        if self._loop.time() < self._declined.get(segment.number, 0.0):
            return False
        self._declined.pop(segment.number, None)
        record = SHOWN.pack(SHOW, segment.number, segment.nbytes)
        try:
            count = socket.send_fds(self._sock, [record], [segment.file.descriptor])
        except OSError:  # It does not read, or has ended, which is told elsewhere: its frames go without.
            return False
        if count != len(record):
            # Never seen of so few bytes. The other end waits for the rest of a record that nobody will send.
            self._sock.shutdown(socket.SHUT_RDWR)
            return False
        self._showing[segment.number] = []
        segment.users.add(self)
        return True


class Loan:
    """The large buffers of one message, on their way into shared memory.

    :ivar shares: which buffer of the message, its extent, where in it the buffer begins, and its size.
    """

    def __init__(self, lender: Lender) -> None:
        self.shares: list[tuple[int, Extent, int, int]] = []
        self.size = 0
        """Bytes of all of them."""
        self.copied = 0
        """Bytes that `begin` copied in the caller's turn of the loop."""
        self.awaited: set[int] = set()
        """Segments of which the other end has not said yet whether it could map them."""
        self.refused = False
        """Whether it could not."""
        self._then: Callable[[], None]
        self._done = False
        self._lender = lender
        self._copies: list[tuple[np.ndarray, np.ndarray]] = []
        self._copying = 0
        """Threads that copy: while there are any, the extents are theirs."""
        self._gates: list[Gate] = []
        """One a thread that copies, so that they do not wait for each other."""
        self._dropped = False
        self._lock = threading.Lock()

    def add(self, index: int, extent: Extent, start: int, buffer: Piece, *, copied: bool) -> None:
        """Add a buffer, which `begin` copies into the extent unless it is there."""
        size = len(buffer)
        self.shares.append((index, extent, start, size))
        self.size += size
        if copied:
            self._copies.append((extent.array, np.frombuffer(buffer, np.uint8)))

    @property
    def ready(self) -> bool:
        """Whether all is copied, and the other end can read it."""
        return self._done and not self.awaited

    def begin(self, then: Callable[[], None]) -> None:
        """Copy what has to be: at once where that is quick, else off the loop, calling `then` when it is ready."""
        copies, self._copies = self._copies, []
        self._then = then
        total = sum(source.nbytes for _, source in copies)
        if total <= LONG:
            _copy(copies)
            self.copied = total
            self._done = True
            return
        halves = _halves(copies)
        self._copying = len(halves)
        self._gates = [Gate() for _ in halves]
        pairs = zip(halves, self._gates, strict=True)
        both = asyncio.gather(*(offload(partial(self._copy_half, half, gate)) for half, gate in pairs))
        both.add_done_callback(lambda _: self._copied_all())

    def answered(self, number: int, *, mapped: bool) -> None:
        """The other end has mapped one of its segments, or could not: then none of it is lent."""
        self.awaited.discard(number)
        self.refused |= not mapped
        if not self._dropped and (self.ready or self.refused):
            self._then()

    def references(self) -> bytes:
        """Hand the extents over; return what tells the other end where they are."""
        shares, self.shares = self.shares, []
        self._lender.concluded(self)
        return b"".join(
            REFERENCE.pack(index, extent.segment.number, self._lender.lend(extent), extent.offset + start, size)
            for index, extent, start, size in shares
        )

    def drop(self) -> None:
        """The message is not sent after all. Idempotent."""
        self._dropped = True
        for gate in self._gates:
            gate.shut()
        self._let_go()

    def _copy_half(self, half: list[tuple[np.ndarray, np.ndarray]], gate: Gate) -> None:
        # The last thread of a dropped loan lets go: the loop may be closed by now, and nobody else left to do it.
        try:
            for target, source in half:
                gate.copy(target, source)
        finally:
            with self._lock:
                self._copying -= 1
            self._let_go()

    def _copied_all(self) -> None:
        self._done = True
        if not self._dropped and self.ready:
            self._then()

    def _let_go(self) -> None:
        """Let go of the extents of a dropped loan, once no thread writes there. In any thread."""
        with self._lock:
            if self._copying or not self._dropped:
                return
            shares, self.shares = self.shares, []
        self._lender.concluded(self)
        for _, extent, _, _ in shares:
            self._lender.keep(extent)


def _copy(copies: list[tuple[np.ndarray, np.ndarray]]) -> None:
    for target, source in copies:
        np.copyto(target, source)


def _halves(
    copies: list[tuple[np.ndarray, np.ndarray]],
) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[tuple[np.ndarray, np.ndarray]]]:
    """Cut copies into two lists of about the same number of bytes."""
    first, second = [], []
    left = sum(source.nbytes for _, source in copies) // 2
    for target, source in copies:
        cut = min(source.nbytes, left // mapping.PAGE * mapping.PAGE)
        left -= cut
        first.append((target[:cut], source[:cut]))
        second.append((target[cut:], source[cut:]))
    return first, second
