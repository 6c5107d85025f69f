"""The actor that `benchmarks.start` starts; a module of its own, since the actors' processes import it."""

from __future__ import annotations

import os

from actors import Actor


class Idle(Actor):
    """Does nothing."""

    async def ready(self) -> int:
        """Answer with the process id."""
        return os.getpid()
