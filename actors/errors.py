"""The error tree of calls and gangs.

    ActorError
     |- GangStartError               a gang did not start; nothing of it is left
     |- ActorClosed (ConnectionError)  the actor shut down in good order; the call did not end
     |- CallDeadlock (RuntimeError)  the call waited, by way of others, for itself
     |- NotReady (RuntimeError)      used before the actor, or a stream, was ready for it
     |- NotPicklable (TypeError)     an argument or a result cannot travel
     |- RemoteCancelled              the method was cancelled on its own side, not by its caller
     `- RemoteError                  the method raised what cannot travel as itself
    RemoteTraceback                  the __cause__ of an exception that came from another process

An exception that a method raised arrives as its own type. An actor that died is `collective.errors.PeerLost`.
A name that the actor lacks is AttributeError, and arguments that do not fit are TypeError, both at the call.
"""

from __future__ import annotations


class ActorError(Exception):
    """Base of every error that this package defines."""

    def __reduce__(self) -> tuple[object, ...]:
        # The classes below compose their message, so args are not what __init__ takes.
        return _rebuild, (type(self), self.args, self.__dict__)


class ActorClosed(ActorError, ConnectionError):
    """The actor shut down in good order before the call, or before it ended: also with its gang."""

    def __init__(self, role: str, rank: int, doing: str) -> None:
        super().__init__(f"{role}[{rank}] has shut down; {doing}() did not run to its end")
        self.role = role
        self.rank = rank
        self.doing = doing


class CallDeadlock(ActorError, RuntimeError):
    """Plain methods waited for each other in a circle, each for a thread that another held; this call opened it."""

    def __init__(self, call: str, circle: str) -> None:
        super().__init__(
            f"{call}() can never start: {circle}. Each waits for the next; declare one of these methods with "
            "async def, do not wait for it there, or give the role more threads: Role(threads=)"
        )
        self.call = call


class GangStartError(ActorError):
    """A gang did not start, and nothing of it is left; the cause, where there is one, is what the actor raised.

    :ivar phase: "process", "constructor", "groups" or "setup": what the actor was at.
    """

    def __init__(self, gang: str, role: str, rank: int, phase: str, problem: str) -> None:
        super().__init__(f"gang {gang!r} did not start: {role}[{rank}] failed in its {phase}: {problem}")
        self.gang = gang
        self.role = role
        self.rank = rank
        self.phase = phase
        self.problem = problem


class NotReady(ActorError, RuntimeError):
    """Something was used before it was ready."""


class NotPicklable(ActorError, TypeError):
    """An argument or a result cannot be taken apart here, or put together there."""

    def __init__(self, what: str, problem: str) -> None:
        super().__init__(f"{what} cannot travel between actors: {problem}")
        self.what = what
        self.problem = problem


class RemoteCancelled(ActorError):
    """The method ended by a CancelledError that its caller did not ask for."""

    def __init__(self, where: str) -> None:
        super().__init__(f"{where} was cancelled on its own side, not by its caller")
        self.where = where


class RemoteError(ActorError):
    """The method raised something that cannot travel, or that would end the caller's process (SystemExit)."""

    def __init__(self, where: str, kind: str, text: str) -> None:
        super().__init__(f"{where} raised {kind}: {text}")
        self.where = where
        self.kind = kind
        self.text = text


class RemoteTraceback(Exception):
    """Where in the other process an exception came from, as text."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"\n\n{self.text.rstrip()}\n"


def _rebuild(kind: type[ActorError], args: tuple[object, ...], state: dict[str, object]) -> ActorError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error
