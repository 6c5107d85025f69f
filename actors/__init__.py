"""Actors: processes and the calls between them."""

from actors import from_thread
from actors.actor import Actor
from actors.errors import (
    ActorClosed,
    ActorError,
    GangStartError,
    NotPicklable,
    NotReady,
    RemoteCancelled,
    RemoteError,
    RemoteTraceback,
)
from actors.gang import Gang
from actors.handles import Handle, Handles
from actors.role import Role
from actors.streams import Stream, Streams

__all__ = [
    "Actor",
    "ActorClosed",
    "ActorError",
    "Gang",
    "GangStartError",
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
    "from_thread",
]
