"""What a gang and the hosts of its actors say to each other, over one channel a host.

The host opens it to PORT of the gang's endpoint; the payload of `Link.open` is its Introduction. Then the gang gives
orders and the host reports. Only who holds the gang's member key gets this far, so these are plain pickles.
"""

from __future__ import annotations

import enum
import pickle
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from actors.abc import ProcessId
    from collective.types import Address

PORT = "gang"


class Phase(enum.Enum):
    """What a host does for its actor, in this order; the value is what people are told."""

    LAUNCH = "process"
    CONSTRUCTOR = "constructor"
    GROUPS = "groups"
    SETUP = "setup"
    TEARDOWN = "teardown"
    CLOSE = "close"


@dataclass(frozen=True)
class Introduction:
    """A host has come up, and waits for the order to construct its actor."""

    role: str
    rank: int
    address: Address
    process: ProcessId


@dataclass(frozen=True)
class Order:
    """Do this phase. GROUPS comes with the roster, beside it."""

    phase: Phase


@dataclass(frozen=True)
class Lost:
    """Another actor of the gang is dead."""

    role: str
    rank: int
    cause: str


@dataclass(frozen=True)
class Report:
    """A phase has ended: well, or by an error, as `actors._pickling.dumps_error` took it apart."""

    phase: Phase
    error: Any = None


Note: TypeAlias = Introduction | Order | Lost | Report


def pack(note: Note) -> bytes:
    """Turn a note into the header of a message."""
    return pickle.dumps(note, pickle.HIGHEST_PROTOCOL)


def unpack(header: bytes) -> Any:
    """Return the note that a header carries."""
    return pickle.loads(header)
