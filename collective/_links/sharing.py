"""How the two ends of a link read each other's memory in place, once it has switched to shared memory.

What is lent travels as references in the frames of the link, the descriptors of the memory over its socket. A segment
is sent there before the frame that first refers to it, so that who reads such a frame finds it there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from collective._links import rights
from collective._links.stream import cause_of
from collective._links.wire import SHOW, SHOWN, WAKE, WireError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from collective._links.borrowing import Borrower
    from collective._links.lending import Lender, Loan
    from collective._links.wire import Piece, Reference

_ROOM: Final = 256
"""Bytes that one read takes at most: some records, and every call to wake since the last."""


class Sharing:
    """Both directions of one link. Made without cost: each direction begins at its first use.

    :param urge: sends a control frame.
    :param ended: is told why, when the socket has ended.
    :param rung: is told where the other end rang while somebody else than the carrier looked for a segment.
    """

    def __init__(
        self,
        sock: socket.socket,
        urge: Callable[[bytes], None],
        ended: Callable[[str], None],
        rung: Callable[[], None],
    ) -> None:
        self._sock = sock
        self._urge = urge
        self._ended = ended
        self._rung = rung
        self._lender: Lender | None = None
        self._borrower: Borrower | None = None
        self._came = b""
        self._descriptors: list[int] = []

    @property
    def bytes_lent(self) -> int:
        """Bytes that the other end holds."""
        return self._lender.nbytes if self._lender is not None else 0

    @property
    def bytes_borrowed(self) -> int:
        """Bytes of the other end that this end holds."""
        return self._borrower.nbytes if self._borrower is not None else 0

    def loan(self, buffers: Sequence[Piece]) -> Loan | None:
        """See `Lender.loan`."""
        return self._lending().loan(buffers)

    def lend(self, view: memoryview) -> tuple[int, ...] | None:
        """See `Lender.lend_view`."""
        return self._lending().lend_view(view)

    def take_back(self, lent: tuple[int, ...]) -> None:
        """See `Lender.take_back`."""
        self._lending().take_back(lent)

    def give_back(self, numbers: Sequence[int]) -> None:
        """See `Lender.give_back`."""
        if self._lender is None:
            raise WireError("shared memory was given back, and none was lent")
        self._lender.give_back(numbers)

    def borrow(self, references: Sequence[Reference]) -> dict[int, memoryview]:
        """See `Borrower.borrow`."""
        return self._borrowing().borrow(references)

    def borrow_one(self, reference: Reference) -> memoryview | None:
        """See `Borrower.borrow_one`."""
        return self._borrowing().borrow_one(reference)

    def adopted(self, number: int, *, mapped: bool) -> None:
        """See `Lender.adopted`."""
        if self._lender is None:
            raise WireError("a segment was adopted, and none was shown")
        self._lender.adopted(number, mapped=mapped)

    def forget(self, number: int) -> None:
        """See `Borrower.forget`."""
        self._borrowing().forget(number)

    def forgot(self, number: int) -> None:
        """See `Lender.forgot`."""
        if self._lender is None:
            raise WireError("a segment was forgotten, and none was shown")
        self._lender.forgot(number)

    def look(self) -> bool:
        """Take what has come over the socket. Return whether the other end rang. Raises: WireError."""
        rang = False
        while True:
            try:
                data, descriptors = rights.receive(self._sock, _ROOM, 1)
            except (BlockingIOError, InterruptedError):
                return rang
            except OSError as error:
                self._ended(cause_of(error))
                return rang
            if not data:
                self._ended("connection ended")
                return rang
            self._descriptors += descriptors
            self._came += data
            rang |= self._take_records()
            if len(data) < _ROOM and not data.strip(WAKE):  # A descriptor ends a read, though more may have come.
                return rang

    def close(self, process: int, *, dead: bool) -> None:
        """The link has ended; see `Lender.close`."""
        self._close_descriptors()
        if self._lender is not None:
            self._lender.close(process, dead=dead)
        if self._borrower is not None:
            self._borrower.close()

    def drop(self) -> None:
        """Let go in a forked child."""
        self._close_descriptors()
        if self._borrower is not None:
            self._borrower.drop()

    def _look_for_segment(self) -> None:
        if self.look():
            self._rung()  # It rings once; nobody else will hear of it.

    def _take_records(self) -> bool:
        """Take what is complete. Return whether the other end rang."""
        rang = False
        while self._came:
            kind = self._came[:1]
            if kind == WAKE:
                self._came = self._came.lstrip(WAKE)
                rang = True
            elif kind != SHOW:
                raise WireError(f"{kind!r} on the socket, which is neither a call to wake nor a segment")
            elif len(self._came) < SHOWN.size:
                break
            else:
                _, number, nbytes = SHOWN.unpack_from(self._came)
                self._came = self._came[SHOWN.size :]
                self._take_segment(number, nbytes)
        if len(self._descriptors) > bool(self._came):
            raise WireError(f"{len(self._descriptors)} descriptors beside what is no whole segment")
        return rang

    def _take_segment(self, number: int, nbytes: int) -> None:
        if len(self._descriptors) > 1:
            raise WireError(f"segment {number} came with {len(self._descriptors)} descriptors")
        descriptors, self._descriptors = self._descriptors, []
        # None where this process is at its limit of descriptors.
        self._borrowing().adopt(number, nbytes, descriptors[0] if descriptors else None)

    def _lending(self) -> Lender:
        if self._lender is None:
            from collective._links.lending import Lender  # which imports numpy

            self._lender = Lender(self._sock, self._urge)
        return self._lender

    def _borrowing(self) -> Borrower:
        if self._borrower is None:
            from collective._links.borrowing import Borrower

            self._borrower = Borrower(self._urge, self._look_for_segment)
        return self._borrower

    def _close_descriptors(self) -> None:
        descriptors, self._descriptors = self._descriptors, []
        rights.close_all(descriptors)
