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
        WouldBlock,
        WrongThread,
    )
    from collective.group import Batch, Group
    from collective.layouts import Layout, Partial, Replicate, Shard
    from collective.planning import Plan, plan
    from collective.types import GroupSpec, GroupStatistics, Member, ReduceOp
    from collective.work import Work

__all__ = [
    "BackendError",
    "Batch",
    "CollectiveError",
    "CollectiveMismatch",
    "CollectiveTimeout",
    "Group",
    "GroupBroken",
    "GroupClosed",
    "GroupError",
    "GroupSpec",
    "GroupStatistics",
    "HandshakeError",
    "Layout",
    "LinkBroken",
    "LinkClosed",
    "LinkError",
    "Member",
    "Partial",
    "PeerLost",
    "Plan",
    "PortRefused",
    "ReduceOp",
    "Replicate",
    "Shard",
    "Work",
    "WouldBlock",
    "WrongThread",
    "plan",
]

_HOMES = {
    "collective.errors": (
        "BackendError CollectiveError CollectiveMismatch CollectiveTimeout GroupBroken GroupClosed "
        "GroupError HandshakeError LinkBroken LinkClosed LinkError PeerLost "
        "PortRefused WouldBlock WrongThread"
    ),
    "collective.group": "Batch Group",
    "collective.layouts": "Layout Partial Replicate Shard",
    "collective.planning": "Plan plan",
    "collective.types": "GroupSpec GroupStatistics Member ReduceOp",
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
