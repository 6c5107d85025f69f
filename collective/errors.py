"""The error tree of this room.

    CollectiveError
     |- LinkError (ConnectionError)
     |   |- LinkClosed              this end closed it
     |   |- LinkBroken              the other end, or what lies between, broke it
     |   |   `- WrongLoop           the other end is on another event loop of this process
     |   |- HandshakeError          the other end could not prove who it is, or speaks another version
     |   `- PortRefused             the other end serves no such port to us
     |- OutOfResources (OSError)    a process has no descriptors, memory or threads left
     |- WouldBlock                  a *_nowait call found no credit
     |- GroupError
     |   |- GroupClosed             used after aclose()
     |   |- WrongThread             called from another thread or event loop than the group's
     |   |- GroupBroken             pending or later work on a broken group; reset() mends it
     |   |- ScopeEnded              a call of several members ended, on one of them, before its collective was agreed
     |   |- CollectiveMismatch      members called different things at one place
     |   |- CollectiveTimeout (TimeoutError)   a member did not announce in time
     |   |- PeerLost (ConnectionError)         a member died
     |   `- RowStreamError
     |       |- RowsMismatch        members differ about a stream's columns, or about the stream itself
     |       |- RowsLeftOver        a stream with tail="error" ended within a round
     |       |- ProducerFailed      a producer ended a stream by an error
     |       |- ConsumerLeft        a consumer left a stream before its end
     |       `- StreamClosed        a stream was used after this member closed it
     |- StoreError
     |   |- RefLost (ConnectionError)          what a TensorRef refers to is gone
     |   `- StoreFull (TimeoutError)           a store had no room in time
     `- BackendError                a library below failed, or is not usable here

Bad arguments are ValueError or TypeError, as everywhere in Python.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence


class CollectiveError(Exception):
    """Base of every error that this package defines. They survive pickling with their attributes."""

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


class LinkError(CollectiveError, ConnectionError):
    """Base of the errors of links and channels."""


class LinkClosed(LinkError):
    """This end closed the link or the channel."""


class LinkBroken(LinkError):
    """The other end died or closed, or the wire between broke."""


class WrongLoop(LinkBroken):
    """The other end is in this process, on another event loop, and can be reached from there alone."""


class HandshakeError(LinkError):
    """The other end could not prove who it is, or speaks another version."""


class PortRefused(LinkError):
    """The other end does not serve this port, or not to this credential."""


class OutOfResources(CollectiveError, OSError):
    """A process has no file descriptors, no memory or no threads left for what it was asked to do.

    Nobody is lost, and nothing has ended but the call that raised this: it passes when there are some again.

    :ivar resource: "file descriptors", "memory" or "threads".
    :ivar who: whose process.
    :ivar doing: what they were wanted for.
    """

    def __init__(self, resource: str, who: str, doing: str) -> None:
        super().__init__(f"{who} has no {resource} left to {doing}; {_REMEDIES[resource]}, then try again")
        self.resource = resource
        self.who = who
        self.doing = doing

    @property
    def errno(self) -> int:  # type: ignore[override]  # OSError's own does not survive pickling.
        """What the system says in such a case: EMFILE, ENOMEM or EAGAIN."""
        return {"file descriptors": errno.EMFILE, "memory": errno.ENOMEM}.get(self.resource, errno.EAGAIN)

    @staticmethod
    def of(error: BaseException, who: str, doing: str) -> OutOfResources | None:
        """Return what an error of the system means, where it means this."""
        resource = None
        if isinstance(error, OSError):
            resource = _SHORTAGES.get(error.errno or 0)
        elif isinstance(error, MemoryError):
            resource = "memory"
        elif isinstance(error, RuntimeError) and "can't start new thread" in str(error):
            resource = "threads"
        return None if resource is None else OutOfResources(resource, who, doing)


_SHORTAGES: Final = {
    errno.EMFILE: "file descriptors",
    errno.ENFILE: "file descriptors",
    errno.ENOMEM: "memory",
    errno.ENOBUFS: "memory",
}
_REMEDIES: Final = {
    "file descriptors": "raise its limit (`ulimit -n`) or have it hold fewer",
    "memory": "free some, or raise its limit (`ulimit -v`, vm.max_map_count, the container's)",
    "threads": "raise its limit (`ulimit -u`, the container's pids.max) or have it hold fewer",
}


class WouldBlock(CollectiveError):
    """A `*_nowait` call found no credit."""


class BackendError(CollectiveError):
    """A library below a backend failed, or cannot be used here."""


class GroupError(CollectiveError):
    """Base of the errors of groups; itself where another call has unfinished collectives in the default scope or in
    one of `gang.scope`, or where a member has called too many."""


class GroupClosed(GroupError):
    """The group was used after `aclose()`."""

    def __init__(self, group: str, operation: str) -> None:
        super().__init__(f"{operation} on group {group!r}, which this member has closed")
        self.group = group
        self.operation = operation


class WrongThread(GroupError):
    """The group was used outside the event loop that it belongs to."""

    def __init__(self, group: str, operation: str) -> None:
        super().__init__(
            f"{operation} on group {group!r} outside its event loop; from a plain method use "
            "actors.from_thread.run(...), which runs an async function on the actor's loop"
        )
        self.group = group
        self.operation = operation


class GroupBroken(GroupError):
    """Work on a group that some member left in the middle of a collective.

    Until all members call `await group.reset()`, every operation raises this.
    """

    def __init__(self, group: str, reason: str, remedy: str = "call `await group.reset()` on every member") -> None:
        super().__init__(f"group {group!r} is broken: {reason}; {remedy} to go on")
        self.group = group
        self.reason = reason


class ScopeEnded(GroupError):
    """What an operation was paired by is over: a call failed on one of the members that it reached, or ended there.

    The group goes on, and so do its other calls.

    :ivar scope: the scope's name.
    :ivar rank: the member that ended it.
    :ivar operation: what it had not finished there, if anything, and `line` where in its code that was called.
    """

    def __init__(
        self, group: str, scope: str, rank: int, operation: str, line: str, cause: str, *, who: str = ""
    ) -> None:
        left = f" left {operation} at {line} unfinished:" if operation else ":"
        super().__init__(
            f"{scope} has ended in group {group!r}: {who or f'rank {rank}'}{left} {cause}; the group goes on: "
            "make the call again"
        )
        self.group = group
        self.scope = scope
        self.rank = rank
        self.operation = operation
        self.line = line
        self.cause = cause


class CollectiveMismatch(GroupError):
    """Members of a group called different things at one place of its order, or of a scope's."""

    def __init__(
        self, group: str, place: int, calls: Sequence[tuple[Sequence[int], str]], *, scope: str = ""
    ) -> None:
        said = "; ".join(f"{_spans(ranks)} called {what}" for ranks, what in calls)
        where = f"in {scope}" if scope else f"at place {place}"
        super().__init__(
            f"members of group {group!r} disagree {where}: {said}; make every member call the same operations in the "
            f"same order{'' if scope else ', then `await group.reset()`'}"
        )
        self.group = group
        self.scope = scope
        self.place = place
        self.calls = tuple((tuple(ranks), what) for ranks, what in calls)


class CollectiveTimeout(GroupError, TimeoutError):
    """A collective was not announced by every member within the group's timeout, or a message not sent within
    its `recv_timeout`.

    :ivar missing: who had not come, and `pending` what these waited for, in which scopes.
    :ivar scope: the scope's name, where that alone has ended; else "".
    """

    def __init__(
        self,
        group: str,
        operation: str,
        timeout: float,
        missing: Sequence[str],
        *,
        scope: str = "",
        pending: Sequence[str] = (),
        lone: bool = False,
    ) -> None:
        others = f" ({'; '.join(pending)})" if pending else ""
        if lone:
            remedy = "raise GroupSpec(recv_timeout=...) if that is normal; what still comes goes to the next recv"
        else:
            reset = "" if scope else ", then `await group.reset()` on every member"
            remedy = f"raise GroupSpec(timeout=...) if that is normal{reset}"
        super().__init__(
            f"{operation} on group {group!r}{f' in {scope}' if scope else ''} waited {timeout:g} s for "
            f"{', '.join(missing) or 'a member'}{others}; {remedy}"
        )
        self.group = group
        self.operation = operation
        self.timeout = timeout
        self.missing = tuple(missing)
        self.scope = scope
        self.pending = tuple(pending)


class PeerLost(GroupError, ConnectionError):
    """A member, or the actor that was called, died."""

    def __init__(self, role: str, rank: int, cause: str, *, doing: str = "") -> None:
        super().__init__(f"{role}[{rank}] was lost{f' during {doing}' if doing else ''}: {cause}")
        self.role = role
        self.rank = rank
        self.cause = cause
        self.doing = doing


class StoreError(CollectiveError):
    """Base of the errors of tensor stores and their refs."""


class RefLost(StoreError, ConnectionError):
    """What a TensorRef refers to is gone: its owner died or shut down, or nobody had held it for a while."""

    def __init__(self, ref: str, owner: str, cause: str) -> None:
        super().__init__(f"{ref} of {owner} is lost: {cause}")
        self.ref = ref
        self.owner = owner
        self.cause = cause


class StoreFull(StoreError, TimeoutError):
    """A store had no room, within the caller's deadline where there was one."""

    def __init__(self, owner: str, wanted: int, limit: int, used: int, held: Sequence[str]) -> None:
        what = "; ".join(held) or "nothing: arrays of freed entries are still in use"
        super().__init__(
            f"the store of {owner} has no room for {wanted} bytes: {used} of {limit} are in use, held are {what}; "
            "let refs and arrays of it go, or raise Role(store_bytes=...)"
        )
        self.owner = owner
        self.wanted = wanted
        self.limit = limit
        self.used = used
        self.held = tuple(held)


class RowStreamError(GroupError):
    """Base of the errors of row streams."""


class RowsMismatch(RowStreamError):
    """Members of a row stream differ about its rows' columns, or about what they passed to RowStream."""

    def __init__(self, group: str, said: Sequence[tuple[str, str]]) -> None:
        each = "; ".join(f"{who} has {what}" for who, what in said)
        super().__init__(
            f"members of a row stream of group {group!r} disagree: {each}; have every producer put rows of the same "
            "columns, and every member make the same streams with the same arguments in the same order"
        )
        self.group = group
        self.said = tuple(said)


class RowsLeftOver(RowStreamError):
    """A row stream with tail="error" ended with rows that do not fill a round."""

    def __init__(self, group: str, rows: int, consumers: int, batch_size: int, counts: Sequence[int]) -> None:
        super().__init__(
            f"a row stream of group {group!r} ended with {rows} rows left that do not fill a round of {consumers} "
            f"consumers x {batch_size} rows; its producers had come to rows {', '.join(map(str, counts))}; pass "
            'tail="drop" or tail="pad" if that is normal'
        )
        self.group = group
        self.rows = rows
        self.consumers = consumers
        self.batch_size = batch_size
        self.counts = tuple(counts)


class ProducerFailed(RowStreamError):
    """A producer ended a row stream by an error, which is the cause of this one or is caused by it."""

    def __init__(self, group: str, role: str, rank: int, text: str) -> None:
        super().__init__(f"{role}[{rank}] ended the row stream of group {group!r} by an error: {text}")
        self.group = group
        self.role = role
        self.rank = rank
        self.text = text


class ConsumerLeft(RowStreamError):
    """A consumer left a row stream before its end, so that it ends for all; rows that are put now go nowhere."""

    def __init__(self, group: str, role: str, rank: int) -> None:
        super().__init__(
            f"{role}[{rank}] left the row stream of group {group!r}, which ends at the same round for all; stop "
            "putting rows, and make another stream on every member to go on"
        )
        self.group = group
        self.role = role
        self.rank = rank


class StreamClosed(RowStreamError):
    """A row stream was used after this member had closed it."""

    def __init__(self, group: str, operation: str) -> None:
        super().__init__(f"{operation} on a row stream of group {group!r}, which this member has closed")
        self.group = group
        self.operation = operation


def _rebuild(cls: type[CollectiveError], args: tuple[object, ...], state: dict[str, object]) -> CollectiveError:
    error = cls.__new__(cls, *args)
    error.args = args  # OSError, a base of some, leaves that to __init__
    error.__dict__.update(state)
    return error


def _spans(ranks: Sequence[int]) -> str:
    """Write sorted ranks briefly: "rank 0", "ranks 1-3, 7"."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
