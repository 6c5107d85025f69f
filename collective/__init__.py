"""Tensors between ranks: groups whose every operation is awaitable."""

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
    "LinkBroken",
    "LinkClosed",
    "LinkError",
    "Member",
    "PeerLost",
    "PortRefused",
    "ReduceOp",
    "Work",
    "WouldBlock",
    "WrongThread",
]
