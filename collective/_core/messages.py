"""What a mailbox holds: messages that have come, receives and sends that are not done, and how one lands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from collective import tensors
from collective._core.operands import describe
from collective._links.borrowing import private
from collective.scopes import DEFAULT

if TYPE_CHECKING:
    from collective._core.budget import Budget
    from collective._core.operands import Spec
    from collective.scopes import Call, Scope
    from collective.work import Work

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


@dataclass(slots=True, eq=False)
class Recv:
    """A recv that is not done."""

    work: Work[Any]
    src: int
    line: Line
    out: Any
    scope: Scope
    call: Call | None
    arrival: Arrival | None = None


@dataclass(slots=True, eq=False)
class Offer:
    """A send that waits to be pulled."""

    work: Work[None]
    dst: int
    tensor: Any
    spec: Spec
    scope: Scope
    call: Call | None


def line_of(scope: Scope, tag: int) -> Line:
    """Return what a message is paired by beside its source and destination: in the default scope the tag alone."""
    return tag if scope is DEFAULT else (scope.bytes, tag)


def misfit(recv: Recv, spec: Spec) -> Exception | None:
    """Return the error of a recv whose `out` cannot take such a message."""
    if recv.out is None:
        return None
    out = describe(recv.out, "out")
    if out.dtype != spec.dtype:
        return TypeError(f"{recv.work.description}: out has dtype {out.dtype}, the message {spec.dtype}")
    if out.shape != tuple(spec.shape):
        return ValueError(f"{recv.work.description}: out has shape {out.shape}, the message {tuple(spec.shape)}")
    return None


def deliver(arrival: Arrival, out: Any) -> Any:
    """Return what the receiver gets of a message whose bytes have come; may run on a thread."""
    assert arrival.data is not None
    spec = arrival.spec
    data = arrival.data
    if out is None and arrival.shared is not None:  # not copied: a write copies its page, for this member alone
        data = np.frombuffer(private(arrival.shared), np.uint8)
    array = tensors.from_bytes(data, spec.shape, tensors.numpy_dtype(spec.dtype))
    if out is None:
        return tensors.from_host(array, spec.kind, spec.device, dtype=spec.dtype)
    tensors.fill(out, array)
    return out
