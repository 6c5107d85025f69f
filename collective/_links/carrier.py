"""What a kind of link has to bring: a carrier, which moves bytes in order between two multiplexers.

The multiplexer decides which frame goes next, the carrier when: whenever it can take bytes, it asks
`FrameSource.next_frame()` until there is none, and puts what arrives at `FrameSource.targets()`. A carrier knows
nothing of channels, and a multiplexer nothing of sockets.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from collective._links.sharing import Sharing
    from collective._links.wire import Frame
    from collective.types import Address


class FrameSource(Protocol):
    """The multiplexer, as a carrier sees it."""

    stopped: bool
    """Whether the link has ended; nothing more is to be read."""

    def targets(self) -> list[memoryview]:
        """Return where the next bytes that arrive go, in order; never empty."""
        ...

    def received(self, count: int) -> None:
        """Take `count` bytes that were put at the targets. May end the link."""
        ...

    def next_frame(self) -> Frame | None:
        """Return what to write next. Once all of it is written, the carrier calls `frame.owner.written()`."""
        ...

    def urge(self, frame: bytes) -> None:
        """Have a control frame written before everything else."""
        ...

    def carrier_ended(self, cause: str) -> None:
        """Learn that nothing more will arrive; all that did was handed over before."""
        ...


class Carrier(ABC):
    """An ordered, reliable pipe of bytes between two endpoints. Belongs to one event loop.

    First the handshake uses `put` and `take`; then `start` hands the pipe to a multiplexer for the rest of its life.
    Work done in one turn of the loop is bounded (about a millisecond), in both directions.
    """

    kind: ClassVar[str]
    where: str
    """Names the other end in errors, for example "unix socket /tmp/x/s"."""
    last: bool = False
    """Whether it was accepted with the last descriptor, only to be told so."""
    sharing: Sharing | None = None
    """How large buffers are read in place, where the two ends share memory."""

    @abstractmethod
    def put(self, data: bytes) -> None:
        """Write a few hundred bytes at once. Raises: LinkBroken."""

    @abstractmethod
    async def take(self, count: int) -> bytes:
        """Read exactly `count` bytes and not one more. Raises: LinkBroken."""

    @abstractmethod
    def start(self, source: FrameSource) -> None:
        """Begin to write the frames of `source`, and to hand it what arrives."""

    @abstractmethod
    def flush(self) -> None:
        """Write frames now, in the caller's context, until there are none or the pipe is full; then as it empties."""

    def write_now(self, frame: bytes) -> bool:
        """Write one small frame, where there is room for all of it and nothing waits before it; return whether so."""
        return False

    def linger(self, until: Callable[[], bool]) -> None:
        """As `Link.linger`."""
        return

    @abstractmethod
    def detach(self) -> None:
        """Copy what waits to be written, so that the memory it came from may be changed."""

    @property
    @abstractmethod
    def idle(self) -> bool:
        """Whether all that was taken from the source is written."""

    @abstractmethod
    def finish(self) -> None:
        """Tell the other end that nothing more is coming; reading goes on."""

    @abstractmethod
    def close(self) -> None:
        """End the pipe at once, without a call to the source. Idempotent; callable when the loop is closed."""


class Kind(ABC):
    """One way to reach other endpoints; one object an endpoint."""

    name: ClassVar[str]

    @abstractmethod
    def listen(self, accept: Callable[[Carrier], None], address: Address) -> Address:
        """Accept carriers from now on, and return `address` with how to reach this end added."""

    @abstractmethod
    def reaches(self, address: Address) -> bool:
        """Whether it is worth while to dial this address."""

    @abstractmethod
    async def dial(self, address: Address) -> Carrier:
        """Return a carrier to the endpoint. Raises: LinkBroken, saying why there is none."""

    @abstractmethod
    def close(self) -> None:
        """Stop listening and remove what listening left in the file system. Idempotent."""
