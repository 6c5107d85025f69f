"""Tensors between ranks: groups whose every operation is awaitable.

What is exported is imported when it is first used: every actor's process imports this package, and one without groups
may need no numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collective.errors import (
        BackendError,
        CollectiveError,
        CollectiveMismatch,
        CollectiveTimeout,
        GroupBroken,
        GroupClosed,
        GroupError,
        HandshakeError,
        LinkBroken,
        LinkClosed,
        LinkError,
        PeerLost,
        PortRefused,
        RefLost,
        StoreError,
        StoreFull,
        WouldBlock,
        WrongThread,
    )
    from collective.group import Batch, Group
    from collective.store import TensorRef, TensorStore
    from collective.types import EntryStatistics, GroupSpec, GroupStatistics, Member, ReduceOp, StoreStatistics
    from collective.work import Work

__all__ = [
    "BackendError",
    "Batch",
    "CollectiveError",
    "CollectiveMismatch",
    "CollectiveTimeout",
    "EntryStatistics",
    "Group",
    "GroupBroken",
    "GroupClosed",
    "GroupError",
    "GroupSpec",
    "GroupStatistics",
    "HandshakeError",
    "LinkBroken",
    "LinkClosed",
    "LinkError",
    "Member",
    "PeerLost",
    "PortRefused",
    "ReduceOp",
    "RefLost",
    "StoreError",
    "StoreFull",
    "StoreStatistics",
    "TensorRef",
    "TensorStore",
    "Work",
    "WouldBlock",
    "WrongThread",
]

_HOMES = {
    "collective.errors": (
        "BackendError CollectiveError CollectiveMismatch CollectiveTimeout GroupBroken GroupClosed "
        "GroupError HandshakeError LinkBroken LinkClosed LinkError PeerLost "
        "PortRefused RefLost StoreError StoreFull WouldBlock WrongThread"
    ),
    "collective.group": "Batch Group",
    "collective.store": "TensorRef TensorStore",
    "collective.types": "EntryStatistics GroupSpec GroupStatistics Member ReduceOp StoreStatistics",
    "collective.work": "Work",
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names.split():
            value = globals()[name] = getattr(importlib.import_module(module), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
