"""What a mailbox holds: messages that have come, receives and sends that are not done, and how one lands."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from collective import tensors
from collective._core.operands import describe
from collective._gate import Guarded
from collective._links.borrowing import private
from collective.scopes import DEFAULT
from collective.work import Withdrawable, Work

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from collective._core.budget import Budget
    from collective._core.operands import Spec
    from collective.scopes import Call, Scope

Line: TypeAlias = "int | tuple[bytes, int]"

NOTHING = np.empty(0, np.uint8)


@dataclass(slots=True, eq=False)
class Arrival:
    """A message that has come, or was offered."""

    src: int
    line: Line
    spec: Spec
    coming: np.ndarray = field(default_factory=lambda: NOTHING)
    """Where its bytes come."""
    data: np.ndarray | None = None
    """Its bytes, once they have come."""
    shared: memoryview | None = None
    """The same, where they lie in the sender's memory."""
    ticket: int | None = None
    """What to pull it by."""
    budget: Budget | None = None
    """On which its sender counts it, until a recv has taken it."""
    taker: Recv | None = None
    """The recv that has matched it."""
    failure: str = ""
    """Why its bytes will not come, as its sender says."""
    number: int = 0
    """Which of all that came it is."""


class Unfinished(Guarded):
    """A recv or send that is not done; its Work is what the caller has."""

    def __init__(self, description: str) -> None:
        self.description = description
        self.ended = False
        self.error: Exception | None = None
        """What it failed by."""

    @property
    def work(self) -> Work[Any] | None:
        """The caller's Work; None where the caller has dropped it."""
        raise NotImplementedError

    def succeed(self, result: Any) -> None:
        """Give its result to the caller."""
        if not self.ended:
            self.ended = True
            if (work := self.work) is not None:
                work._succeed(result)

    def fail(self, error: Exception) -> None:
        """End it with an error, after which nothing of the caller's is read or written."""
        if not self.ended:
            self.ended, self.error = True, error
            if (work := self.work) is not None:
                work._fail(error)
            else:
                self.stop()


class Recv(Unfinished):
    """A recv. Its Work belongs to the caller alone: once that is dropped, nobody wants the message."""

    def __init__(
        self, src: int, tag: int, out: Any, *, scope: Scope, call: Call | None, withdraw: Callable[[Recv], bool]
    ) -> None:
        super().__init__(f"recv(src={src}, tag={tag})")
        self.src = src
        self.line = line_of(scope, tag)
        self.out = out
        self.scope = scope
        self.call = call
        self.arrival: Arrival | None = None
        self.timer: asyncio.TimerHandle | None = None
        self._withdraw = withdraw
        self._work: weakref.ref[Work[Any]]

    def begin(self) -> Work[Any]:
        """Return its Work."""
        work: Work[Any] = Withdrawable(self.description, stop=self.stop, withdraw=lambda: self._withdraw(self))
        self._work = weakref.ref(work)
        return work

    @property
    def work(self) -> Work[Any] | None:
        return self._work()


class Offer(Unfinished):
    """A send that waits to be pulled."""

    def __init__(
        self, dst: int, tag: int, tensor: Any, *, spec: Spec, scope: Scope, call: Call | None
    ) -> None:
        super().__init__(f"send({spec}, dst={dst}, tag={tag})")
        self.dst = dst
        self.tensor = tensor
        self.spec = spec
        self.scope = scope
        self.call = call
        self._work: Work[None] = Work(self.description, stop=self.stop)

    @property
    def work(self) -> Work[None]:
        return self._work


def line_of(scope: Scope, tag: int) -> Line:
    """Return what a message is paired by beside its source and destination: in the default scope the tag alone."""
    return tag if scope is DEFAULT else (scope.bytes, tag)


def misfit(recv: Recv, spec: Spec) -> Exception | None:
    """Return the error of a recv whose `out` cannot take such a message."""
    if recv.out is None:
        return None
    out = describe(recv.out, "out")
    if out.dtype != spec.dtype:
        return TypeError(f"{recv.description}: out has dtype {out.dtype}, the message {spec.dtype}")
    if out.shape != tuple(spec.shape):
        return ValueError(f"{recv.description}: out has shape {out.shape}, the message {tuple(spec.shape)}")
    return None


def deliver(arrival: Arrival, out: Any, fill: Callable[[Any, np.ndarray], None] = tensors.fill) -> Any:
    """Return what the receiver gets of a message whose bytes have come; may run on a thread.

    :param fill: writes into `out`.
    """
    assert arrival.data is not None
    spec = arrival.spec
    data = arrival.data
    if out is None and arrival.shared is not None:  # not copied: a write copies its page, for this member alone
        data = np.frombuffer(private(arrival.shared), np.uint8)
    array = tensors.from_bytes(data, spec.shape, tensors.numpy_dtype(spec.dtype))
    if out is None:
        return tensors.from_host(array, spec.kind, spec.device, dtype=spec.dtype)
    fill(out, array)
    return out
