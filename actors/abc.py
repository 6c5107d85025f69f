"""The contracts of this room: where the actors of a gang live."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence

    from collective.abc import Endpoint
    from collective.types import Address, Credential


@dataclass(frozen=True)
class Launch:
    """What one actor's host is told before anything else.

    :param uid: unique to this incarnation of the actor; its calls are taken at port `calls/<uid>`.
    :param home: the endpoint of whoever started the gang, to which the host reports.
    :param member: opens every port of every member of the gang.
    :param calls: opens this actor's calls, and nothing else.
    :param threads: worker threads for plain methods.
    :param backends: what data planes its groups will be on, to be loaded early.
    :param store_bytes: what its store may hold; None for the default.
    """

    gang: str
    role: str
    rank: int
    uid: str
    home: Address
    member: Credential
    calls: Credential
    threads: int
    backends: tuple[str, ...] = ()
    store_bytes: int | None = None

    def __str__(self) -> str:
        return f"{self.role}[{self.rank}]"


@dataclass(frozen=True)
class ProcessId:
    """A process as it knows itself: its pid, and the `space` (kernel boot, pid namespace) where it counts."""

    pid: int
    space: str


class Process(ABC):
    """What one actor and its host run in."""

    native: Callable[[], Any] | None
    """Returns the runtime's own handle of the actor; picklable. None where the runtime has no such thing."""
    ended: asyncio.Future[Exception]
    """Done when the runtime knows that it has ended: why, as far as known."""

    @property
    def fate(self) -> asyncio.Future[str] | None:
        """Done once it has ended, with how it ended, for people, or ""; None where nobody can know."""
        return None

    @abstractmethod
    def identify(self, process: ProcessId) -> None:
        """Take what the host says of the process that it runs in."""

    @abstractmethod
    async def kill(self) -> None:
        """End it abruptly, as if it had crashed; return when that is under way. Idempotent."""


class Runtime(ABC):
    """Starts and ends the processes of one gang, and tells of their death.

    Made for one gang, with `roles: Sequence[Role]`, `placement: Placement` and `name: str`, before anything moves: what
    does not pickle raises NotPicklable there. Used by one task at a time, in the order of the methods below.
    """

    name: ClassVar[str]

    @abstractmethod
    async def open(self, *, start_timeout: float) -> Endpoint:
        """Reserve room for every actor, within `start_timeout` seconds, and return an endpoint that they can reach.

        A call that fails, or is cancelled, may leave something behind, until `aclose`.

        Raises:
            GangInfeasible: there can never be room. GangTimeout: there was none in time.
        """

    @abstractmethod
    async def launch(self, launches: Sequence[Launch]) -> Sequence[Process]:
        """Start all actors at once, without waiting for them to come up."""

    @abstractmethod
    async def aclose(self) -> None:
        """Kill what still runs; return when every process is gone and the room is given back.

        Works after any of the above, in any state. Bounded by a second and a half, where Ray answers. Idempotent.

        Raises:
            ExceptionGroup: what failed on the way. Everything else was done all the same.
        """
