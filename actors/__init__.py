"""Actors: processes and the calls between them.

What is exported is imported when it is first used: every actor's process imports this package, and needs little of it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actors import from_thread
    from actors.actor import Actor
    from actors.errors import (
        ActorClosed,
        ActorError,
        CallDeadlock,
        GangStartError,
        NotPicklable,
        NotReady,
        RemoteCancelled,
        RemoteError,
        RemoteTraceback,
    )
    from actors.gang import Gang
    from actors.gang_handle import GangHandle
    from actors.groups import GroupHandle
    from actors.handles import Handle, Handles, lend
    from actors.role import Role
    from actors.streams import Stream, Streams
    from collective.store import TensorRef, TensorStore

__all__ = [
    "Actor",
    "ActorClosed",
    "ActorError",
    "CallDeadlock",
    "Gang",
    "GangHandle",
    "GangStartError",
    "GroupHandle",
    "Handle",
    "Handles",
    "NotPicklable",
    "NotReady",
    "RemoteCancelled",
    "RemoteError",
    "RemoteTraceback",
    "Role",
    "Stream",
    "Streams",
    "TensorRef",
    "TensorStore",
    "from_thread",
    "lend",
]

_HOMES = {
    "actors.actor": "Actor",
    "actors.errors": (
        "ActorClosed ActorError CallDeadlock GangStartError NotPicklable NotReady RemoteCancelled RemoteError "
        "RemoteTraceback"
    ),
    "actors.gang": "Gang",
    "actors.gang_handle": "GangHandle",
    "actors.groups": "GroupHandle",
    "actors.handles": "Handle Handles lend",
    "actors.role": "Role",
    "actors.streams": "Stream Streams",
    "collective.store": "TensorRef TensorStore",
}


def __getattr__(name: str) -> Any:
    if name == "from_thread":
        return importlib.import_module("actors.from_thread")
    for module, names in _HOMES.items():
        if name in names.split():
            value = globals()[name] = getattr(importlib.import_module(module), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
