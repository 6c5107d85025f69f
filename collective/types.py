"""Values that the whole room shares. Imports nothing of it."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


class ReduceOp(enum.Enum):
    """How a reduction combines elements; `collective.reductions` is the table of what each means for each dtype."""

    SUM = "sum"
    PROD = "prod"
    MIN = "min"
    MAX = "max"
    AVG = "avg"


@dataclass(frozen=True)
class GroupSpec:
    """A collective group, declared together with the gang.

    Its ranks are the members of `roles`, role after role in that order, each by its rank in the role.

    :param name: unique in the gang; a member finds the group as `self.groups[name]`.
    :param backend: "auto", "shm" (members on one host), "two-level" (shared memory inside hosts, Gloo between them; of
        which only one is left where all members share a host, or none do), "gloo" or "memory" (members in one process).
    :param timeout: seconds that a collective may wait, from the first member's announcement, for the last one's.
    :param recv_timeout: seconds that a `recv` may wait for its message; None: for ever.
    """

    name: str
    roles: tuple[str, ...]
    backend: str = "auto"
    timeout: float = 300.0
    recv_timeout: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.roles, str):
            raise TypeError(f"GroupSpec({self.name!r}): roles is a tuple of role names, not one string {self.roles!r}")
        object.__setattr__(self, "roles", tuple(self.roles))
        if not self.name or not self.roles:
            raise ValueError(f"GroupSpec({self.name!r}, roles={self.roles!r}): needs a name and at least one role")
        if len(set(self.roles)) != len(self.roles):
            raise ValueError(f"GroupSpec({self.name!r}): roles {self.roles!r} name one role twice")
        if not self.timeout > 0:
            raise ValueError(f"GroupSpec({self.name!r}): timeout is {self.timeout!r}; it must be positive, in seconds")
        if self.recv_timeout is not None and not self.recv_timeout > 0:
            raise ValueError(
                f"GroupSpec({self.name!r}): recv_timeout is {self.recv_timeout!r}; positive, in seconds, or None"
            )


@dataclass(frozen=True)
class Address:
    """How to reach an endpoint. Says nothing secret.

    :param endpoint: the endpoint's unique id.
    :param host: equal for endpoints of one host; shared memory and unix sockets are tried only between these.
    :param unix: path of its unix socket, or None.
    :param tcp: (host, port), or None.
    :param shm: path of the unix socket over which shared memory is agreed on, or None.
    """

    endpoint: str
    host: str = ""
    unix: str | None = None
    tcp: tuple[str, int] | None = None
    shm: str | None = None


@dataclass(frozen=True)
class Credential:
    """A shared key and its public name; possessing the key opens the ports that the listener has granted it."""

    name: str
    key: bytes = field(repr=False)


@dataclass(frozen=True)
class Member:
    """One member of a group: which actor it is and how to reach it. `rank` is its rank within its role."""

    role: str
    rank: int
    address: Address

    def __str__(self) -> str:
        return f"{self.role}[{self.rank}]"


@dataclass(frozen=True)
class LinkStatistics:
    """Counters of one link since it opened.

    :param bytes_lent: bytes of this process's shared memory that the other end holds now.
    :param bytes_borrowed: bytes of the other end's shared memory that this end holds now.
    """

    kind: str
    bytes_sent: int
    bytes_received: int
    messages_sent: int
    messages_received: int
    channels: int
    bytes_lent: int = 0
    bytes_borrowed: int = 0


@dataclass(frozen=True)
class ArenaStatistics:
    """The shared memory that a process has for others of its host to read in place; see `collective.links.allocate`.

    :param limit: bytes that it may map.
    :param mapped: bytes that it maps. Those that were never written take no memory.
    :param used: bytes of these that somebody uses: receivers, messages on their way, and owners.
    :param owned: bytes of the blocks that this process allocated and has not let go of.
    :param segments: memory files.
    """

    limit: int
    mapped: int
    used: int
    owned: int
    segments: int


@dataclass(frozen=True)
class GroupStatistics:
    """What one member's group does and holds now.

    :param epoch: the group's incarnation, from 0.
    :param collectives: how many this member has called in this epoch.
    :param pending_collectives: collectives that are not done.
    :param pending_messages: sends and receives that are not done.
    :param buffered_bytes: bytes received that no recv has asked for.
    """

    epoch: int
    collectives: int
    pending_collectives: int
    pending_messages: int
    buffered_bytes: int


@dataclass(frozen=True)
class EntryStatistics:
    """One entry of a tensor store.

    :param what: the tensor's dtype and shape, or how many tensors.
    :param nbytes: bytes of its memory; what entries share counts in each.
    :param seconds: how long it has been there.
    :param holders: who has refs of it, by name; the owner itself is among them.
    :param leased: seconds that a lease keeps it yet.
    """

    number: int
    what: str
    nbytes: int
    seconds: float
    holders: tuple[str, ...]
    leased: float

    def __str__(self) -> str:
        by = ", ".join(self.holders) or "nobody"
        lease = f", leased for {self.leased:.1f} s more" if self.leased else ""
        return f"{self.what} ({self.nbytes} bytes) for {self.seconds:.1f} s by {by}{lease}"


@dataclass(frozen=True)
class StoreStatistics:
    """What a tensor store holds now, by whom and how long.

    :param limit: bytes that it may hold.
    :param used: bytes in use: of entries, of arrays from `empty`, and of freed entries that readers still look at. What
        entries share counts once.
    :param waiting: puts that wait for room.
    """

    owner: str
    limit: int
    used: int
    waiting: int
    entries: tuple[EntryStatistics, ...]


@dataclass(frozen=True)
class RowState:
    """How far a row stream has come: what `RowStream(..., resume=state)` goes on from.

    :param positions: by producer, how many of its rows belong to rounds that were done.
    :param origins: by producer, the row from which its turns in the order are counted.
    """

    positions: tuple[int, ...]
    origins: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.positions) != len(self.origins) or any(
            not 0 <= origin <= at for at, origin in zip(self.positions, self.origins, strict=False)
        ):
            raise ValueError(f"RowState(positions={self.positions}, origins={self.origins}) is no state of a stream")

    @property
    def rows(self) -> int:
        """How many rows were done in all."""
        return sum(self.positions)
