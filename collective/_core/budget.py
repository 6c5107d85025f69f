"""How many bytes of messages a sender may have at a receiver that no recv has taken yet."""

from __future__ import annotations

from collections import defaultdict
from typing import Final

_REPORTS: Final = 4
"""A receiver tells what was taken when it has come to this part of the limit."""


class Budget:
    """One member's side of it, as a sender to and a receiver from each other rank."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._sent: defaultdict[int, int] = defaultdict(int)
        self._taken: defaultdict[int, int] = defaultdict(int)

    def spend(self, rank: int, nbytes: int) -> bool:
        """Count a message to a rank, or return False where it is beyond the limit."""
        if self._sent[rank] + nbytes > self._limit:
            return False
        self._sent[rank] += nbytes
        return True

    def regain(self, rank: int, nbytes: int) -> None:
        """Take note that a receiver has taken so many bytes."""
        self._sent[rank] -= nbytes

    def take(self, rank: int, nbytes: int) -> int:
        """Count what a recv has taken of a sender's messages; return what to tell that sender now, or 0."""
        taken = self._taken[rank] + nbytes
        told = taken >= self._limit // _REPORTS
        self._taken[rank] = 0 if told else taken
        return taken if told else 0
