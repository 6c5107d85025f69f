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
        ConsumerLeft,
        GroupBroken,
        GroupClosed,
        GroupError,
        HandshakeError,
        LinkBroken,
        LinkClosed,
        LinkError,
        OutOfResources,
        PeerLost,
        PortRefused,
        ProducerFailed,
        RefLost,
        RowsLeftOver,
        RowsMismatch,
        RowStreamError,
        ScopeEnded,
        StoreError,
        StoreFull,
        StreamClosed,
        WouldBlock,
        WrongThread,
    )
    from collective.group import Batch, Group, ScopedGroup
    from collective.layouts import Layout, Partial, Replicate, Shard
    from collective.planning import Plan, plan
    from collective.rows import RowBatch, RowStream
    from collective.store import TensorRef, TensorStore
    from collective.types import (
        EntryStatistics,
        GroupSpec,
        GroupStatistics,
        Member,
        ReduceOp,
        RowState,
        StoreStatistics,
    )
    from collective.work import Work

__all__ = [
    "BackendError",
    "Batch",
    "CollectiveError",
    "CollectiveMismatch",
    "CollectiveTimeout",
    "ConsumerLeft",
    "EntryStatistics",
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
    "OutOfResources",
    "Partial",
    "PeerLost",
    "Plan",
    "PortRefused",
    "ProducerFailed",
    "ReduceOp",
    "RefLost",
    "Replicate",
    "RowBatch",
    "RowState",
    "RowStream",
    "RowStreamError",
    "RowsLeftOver",
    "RowsMismatch",
    "ScopeEnded",
    "ScopedGroup",
    "Shard",
    "StoreError",
    "StoreFull",
    "StoreStatistics",
    "StreamClosed",
    "TensorRef",
    "TensorStore",
    "Work",
    "WouldBlock",
    "WrongThread",
    "plan",
]

_HOMES = {
    "collective.errors": (
        "BackendError CollectiveError CollectiveMismatch CollectiveTimeout ConsumerLeft GroupBroken GroupClosed "
        "GroupError HandshakeError LinkBroken LinkClosed LinkError OutOfResources PeerLost "
        "PortRefused ProducerFailed RefLost RowStreamError RowsLeftOver RowsMismatch ScopeEnded StoreError StoreFull "
        "StreamClosed WouldBlock WrongThread"
    ),
    "collective.group": "Batch Group ScopedGroup",
    "collective.layouts": "Layout Partial Replicate Shard",
    "collective.planning": "Plan plan",
    "collective.rows": "RowBatch RowStream",
    "collective.store": "TensorRef TensorStore",
    "collective.types": "EntryStatistics GroupSpec GroupStatistics Member ReduceOp RowState StoreStatistics",
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
