"""The contracts of this room: channels, links, endpoints, and the data planes of groups."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable, Sequence
    from types import TracebackType
    from typing import Self

    from collective.types import Address, Credential, LinkStatistics, ReduceOp

Buffer: TypeAlias = "bytes | bytearray | memoryview"

WINDOW = 1 << 20
"""Bytes of credit that a channel starts with, in each direction."""
LARGE = 64 << 10
"""Bytes above which a message is not buffered for a receiver that has not asked for it."""


class Message(NamedTuple):
    """What one `send` carried: a header, and the buffers that travelled beside it.

    A buffer is a writable memoryview that nobody else holds, or what `allocate` gave for it, or a read-only view of
    memory that the sender shares. The sender does not use that for anything else before the last view of it is gone,
    which may be long after the link's end; hold it as long as you like. `collective.links.private` makes it writable.
    """

    header: bytes
    buffers: list[memoryview]


class Channel(ABC):
    """An ordered flow of messages in each direction over a link, with its own credit in each.

    A channel whose reader is slow holds at most its window of bytes at the reader, then stops its own sender and
    no other channel. Sends and receives may be cancelled: a cancelled send was sent whole or not at all.
    """

    link: Link
    port: str
    """The port that it was opened to."""
    payload: bytes
    """What the opener passed to `Link.open`."""

    @abstractmethod
    def send_nowait(self, header: bytes, buffers: Sequence[Buffer] = ()) -> None:
        """Send a message of at most LARGE bytes, or raise WouldBlock where credit is short or a send is waiting.

        Buffers may be changed when it returns.
        """

    @abstractmethod
    def lend_nowait(self, header: bytes, buffers: Sequence[Buffer]) -> None:
        """Send a message of any size within the window as `send` does, or raise WouldBlock as `send_nowait` does.

        Its buffers are not to be changed any more: they may still be on their way when this returns, as memory of
        `collective.links.allocate` may that the other end reads in place.
        """

    @abstractmethod
    async def send(self, header: bytes, buffers: Sequence[Buffer] = ()) -> None:
        """Send a message of any size, after those that were sent before; return once its buffers may be changed.

        A message takes its place in the channel's order at the first step of this coroutine. Beyond the window it
        moves on only as the other end receives. Where it is cancelled and not sent, the CancelledError has an attribute
        `withdrawn`.

        Raises:
            LinkClosed, LinkBroken, PortRefused: it may or may not have arrived.
        """

    @abstractmethod
    def post(self, header: bytes, buffers: Sequence[Buffer] = ()) -> None:
        """Send an urgent message of at most LARGE bytes: needs no credit, never waits, copies what it cannot write now.

        Posts keep their own order and overtake what `send` has not yet handed over, a message in the middle
        excepted: the receiver sees whole messages only. A post on a channel that has ended is dropped.
        """

    @abstractmethod
    async def receive(self) -> Message:
        """Wait for the next message.

        Raises:
            LinkClosed: this end closed the channel or its link.
            LinkBroken, PortRefused: the other end's doing, after all that had arrived was received. A channel that
                the other end closed in good order raises LinkBroken with "closed by the other end".
        """

    @abstractmethod
    def subscribe(
        self,
        on_message: Callable[[Message], None],
        on_end: Callable[[Exception], None],
        allocate: Callable[[bytes, Sequence[int]], Sequence[memoryview] | None] | None = None,
    ) -> None:
        """Deliver messages by callback on the loop instead of by `receive`, those that already wait included.

        Each message's credit goes back when `on_message` returns. `on_end` is called once, after the last message,
        with the error that `receive` would raise (never while this end closes the channel itself). `allocate` is
        given the header and buffer sizes of a message above LARGE before its buffers arrive, and may return the
        writable memory that they shall be read into; None means memory as for `receive`.
        """

    @abstractmethod
    def close(self) -> None:
        """End the channel: what was sent is still delivered, then the other end's receive raises. Idempotent.

        Nothing is received any more. The other end's sends raise LinkBroken as soon as it can be told, also where what
        was sent has to wait until it receives.
        """

    @abstractmethod
    def abort(self) -> None:
        """End the channel at once: what has not left is not sent, and a message of which a part has is cut off there.

        When this returns, nothing of what was passed to `send`, or given by `allocate`, is read or written any more. A
        send that waits raises LinkClosed. Idempotent.
        """


class Link(ABC):
    """An ordered, authenticated message pipe between two endpoints. Belongs to one event loop."""

    kind: ClassVar[str]
    """"memory", "shm", "unix" or "tcp"."""
    remote: str
    """The other endpoint's id."""
    credential: str
    """Name of the credential that the dialer proved."""

    @abstractmethod
    def open(self, port: str, payload: bytes = b"", *, window: int = WINDOW) -> Channel:
        """Open a channel to a port of the other end, without waiting for it. `window` is bytes of credit each way.

        A port that the other end does not serve yet keeps the channel waiting there; one that it has stopped
        serving, or that the credential does not open, ends the channel with PortRefused.
        """

    def linger(self, until: Callable[[], bool]) -> None:
        """Take what comes at once, for some microseconds, while `until()` is false and this looks worth while.

        For who has just sent something and can do nothing before the answer: that then needs no turn of the loop.
        Callbacks of channels may run within this call. A kind of link that cannot look without waiting does nothing.
        """
        return

    def lend(self, view: memoryview) -> tuple[int, ...] | None:
        """Let the other end read memory of a `Block` in place, and return what `borrow` takes there; None: it cannot.

        What is returned must go there in a message of this link, or to `take_back`.
        """
        return None

    def take_back(self, lent: tuple[int, ...]) -> None:
        """Undo a `lend` of which the other end will not hear."""
        return

    def borrow(self, lent: tuple[int, ...]) -> memoryview | None:
        """Return a read-only view of what the other end lends; None where the link has ended.

        It goes back when all views of it are gone.
        """
        return None

    @abstractmethod
    def on_close(self, callback: Callable[[Exception], None]) -> Callable[[], None]:
        """Call back once, on the loop, when the link ends: LinkClosed or LinkBroken; soon, if it already has.

        Returns what takes that back: who loses interest before the link ends calls it, and is held no longer.
        """

    @property
    @abstractmethod
    def closed(self) -> bool:
        """Whether the link has ended, by either side."""

    @abstractmethod
    async def aclose(self) -> None:
        """Hand over what was sent, bounded by a second, and end the link. Idempotent."""

    @abstractmethod
    def statistics(self) -> LinkStatistics:
        """Return the counters of this link."""


class Endpoint(ABC):
    """Where links begin and end: one a process and event loop (one an actor under the inproc runtime)."""

    @property
    @abstractmethod
    def address(self) -> Address:
        """How others reach this endpoint; an endpoint that does not listen has only its id in it."""

    @abstractmethod
    def grant(self, credential: Credential, ports: Sequence[str] = ("",)) -> None:
        """Accept links that prove this credential, and let them open ports that start with one of `ports`.

        A later grant under the same name replaces the earlier one.
        """

    @abstractmethod
    def revoke(self, credential: Credential) -> None:
        """Take back a grant: no more links with it are accepted, and those there are open no more ports. Idempotent."""

    @abstractmethod
    def serve(self, port: str, on_channel: Callable[[Channel], None]) -> None:
        """Hand channels opened to `port` to `on_channel`, those that already wait included.

        The callback runs on the loop and must not raise; it may subscribe at once or have a task receive.
        """

    @abstractmethod
    def unserve(self, port: str) -> None:
        """Stop serving a port for good: channels opened to it later are refused. Those open stay open."""

    @abstractmethod
    async def connect(self, address: Address, credential: Credential) -> Link:
        """Return the link to another endpoint, opening it where there is none.

        One link serves both directions and all callers: where one that proved the same credential is open, by
        whichever end, it is returned; two ends that dial each other at the same time end with one link between them.

        Raises:
            LinkBroken: nobody listens there. HandshakeError: it is not who it should be, or refuses the credential.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Close every link and listener, and remove its files. Idempotent."""

    @abstractmethod
    def abort(self) -> None:
        """Close everything at once, without waiting; callable when the loop is ending. Idempotent."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


@dataclass(frozen=True)
class PlaneContext:
    """What a data plane knows of its group.

    :param key: unique to (group, epoch), equal on its members.
    :param tell: post a small message to another rank's data plane.
    :param timeout: the group's timeout in seconds.
    :param interface: the address at which the other members reach this host, for a data plane that listens.
    :param hosts: each member's host, as `Address.host` names it; none where nobody knows.
    """

    group: str
    key: str
    rank: int
    size: int
    tell: Callable[[int, bytes], None]
    timeout: float
    interface: str = "127.0.0.1"
    hosts: tuple[str, ...] = ()


class DataPlane(ABC):
    """What moves and reduces the data of one group in one epoch, after its members agreed.

    Every method but `open` is a plain function that issues an operation and returns its completion. The members call
    the same methods in the same order with fitting arguments: the group saw to that before. Arrays are C-contiguous,
    one-dimensional numpy arrays; the data plane reads `source` and writes `target` until the completion is done, and
    never afterwards, also where it was abandoned. `source` and `target` may be the same memory; in an allgather
    `source` may be its own part of `target`, in a reduce_scatter `target` its own part of `source`; they never overlap
    otherwise, and may be read-only (`source`) or empty. A completion that fails raises BackendError. Contract 5 (the
    loop is not blocked) is the data plane's to keep.
    """

    name: ClassVar[str]

    @property
    def backends(self) -> tuple[str, ...]:
        """The names of what moves this member's data: its own, or those of the data planes that it is made of."""
        return (self.name,)

    @abstractmethod
    async def open(self) -> None:
        """Meet the other members. All of them call it."""

    @abstractmethod
    def hear(self, rank: int, message: bytes) -> None:
        """Take a message that another member's data plane told; may come before `open`."""

    @abstractmethod
    def broadcast(self, array: np.ndarray, root: int) -> Awaitable[None]:
        """Make every member's `array` equal to the root's; uint8 on every member."""

    @abstractmethod
    def allreduce(self, source: np.ndarray, target: np.ndarray, op: ReduceOp) -> Awaitable[None]:
        """Reduce elementwise over members; equal bits on every member. (op, dtype) is in the table of reductions."""

    @abstractmethod
    def reduce(self, source: np.ndarray, target: np.ndarray | None, op: ReduceOp, root: int) -> Awaitable[None]:
        """Reduce to the root alone; `target` is None elsewhere."""

    @abstractmethod
    def reduce_scatter(
        self, source: np.ndarray, target: np.ndarray, op: ReduceOp, counts: Sequence[int]
    ) -> Awaitable[None]:
        """Reduce, then leave with rank r its part: `counts[r]` elements from sum(counts[:r]) on."""

    @abstractmethod
    def allgather(self, source: np.ndarray, target: np.ndarray, counts: Sequence[int]) -> Awaitable[None]:
        """Concatenate every member's `source` of `counts[rank]` bytes in rank order; uint8."""

    @abstractmethod
    def alltoall(self, sources: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> Awaitable[None]:
        """Move `sources[j]` of rank i to `targets[i]` of rank j; uint8, any sizes, the own part included."""

    def empty(self, nbytes: int) -> np.ndarray:
        """Return memory for inputs that this data plane need not copy, of any content; here, plain memory.

        It stays the caller's when the data plane closes.
        """
        return np.empty(nbytes, np.uint8)

    @abstractmethod
    def abandon(self) -> None:
        """Drop what is pending, without waiting: `aclose` in bad times. Idempotent.

        Completions may never be done, and nothing of the caller's is written from now on. What it holds is freed as
        soon as the library below lets go.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Free everything, once nothing is pending. Idempotent."""


class AnnouncingPlane(DataPlane):
    """A data plane through which the members agree as well, since that is faster there than by messages."""

    @abstractmethod
    def exchange(self, card: bytes, head: int, on_misfit: Callable[[], None]) -> asyncio.Future[list[bytes]]:
        """Show a card to all, and return those of all members by rank; an operation in the order of the others.

        The first `head` bytes of all cards should be equal. Where those of this member and of one that had come before
        it are not, `on_misfit` is called on the loop, also while others have not come.
        """
