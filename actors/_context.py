"""Which actor the running code belongs to."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

    from collective.abc import Endpoint


@dataclass(frozen=True, eq=False)
class ActorContext:
    """An actor as its own code sees it: handles used in it dial from its endpoint, on its loop."""

    role: str
    rank: int
    gang: str
    endpoint: Endpoint
    loop: asyncio.AbstractEventLoop

    def __str__(self) -> str:
        return f"{self.role}[{self.rank}]"


current: ContextVar[ActorContext | None] = ContextVar("gangline_actor", default=None)
"""Set by the host for `__init__`, `setup` and `teardown`, by the dispatcher for calls; tasks inherit it."""
