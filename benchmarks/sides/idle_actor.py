"""The actor of the gangs in `start` and `idle`; a module of its own, since the actors' processes import it."""

from __future__ import annotations

import os

from actors import Actor


class Idle(Actor):
    """Does nothing."""

    async def ready(self) -> int:
        """Answer with the process id."""
        return os.getpid()

    async def meet(self) -> int:
        """Answer with the process id, once the members of the group have met."""
        await self.groups["all"].barrier()
        return os.getpid()
