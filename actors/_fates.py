"""How the processes of actors ended, where this process knows: that of the driver, for actors on its machine."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from collective.errors import LinkError, PeerLost

if TYPE_CHECKING:
    from actors._target import Target

SECONDS: Final = 0.25
"""How long the news of a death waits for how it came about: a process's end is known once its parent has noticed."""

known: dict[str, asyncio.Future[str]] = {}
"""By the actors' uids, while their gang runs: done once the process has ended, with "" where nothing can be known."""


async def explain(error: Exception, target: Target) -> Exception:
    """Add to the loss of an actor how its process ended, where that is known soon; return any other error as it is."""
    fate = known.get(target.uid)
    if fate is None or not isinstance(error, PeerLost) or not isinstance(error.__cause__, LinkError):
        return error
    if fate.get_loop() is asyncio.get_running_loop():
        await asyncio.wait([fate], timeout=SECONDS)
    if not fate.done() or not fate.result():
        return error
    explained = PeerLost(error.role, error.rank, f"{fate.result()} ({error.cause})", doing=error.doing)
    explained.__cause__ = error.__cause__
    return explained
