"""What a link learns of spinning: whether it is worth while.

That is learned apart for what follows a message sent (an answer may come soon) and a message received (another may).
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Final

_START: Final = 0.7
_PROMISING: Final = 0.4
"""Shares of tries that were won: what is taken for granted at first, and from where on it is tried each time."""
_PROBE: Final = (4, 1024)
"""Where it does not look promising it is tried afresh, twice at least, after so many messages that woke the link soon
after it fell asleep: at first, and at most, where those tries were lost again."""
_SOON: Final = 1e-3
"""Seconds of sleep that suggest that spinning might have won, had both ends done so: with several peers, each wake-up
takes tens of microseconds at both ends."""


class Outlook:
    """What a link has learned of spinning."""

    def __init__(self, *, possible: bool) -> None:
        self.sent = False
        """Whether a message was sent after the last one that was received."""
        self._possible = possible
        self._wins = [_START, _START]
        self._asleep_since = 0.0
        self._soon = 0
        self._probe = _PROBE[0]
        self._trying: int | None = None

    def worth_while(self) -> bool:
        """Return whether to spin now; it is tried then."""
        if not self._possible:
            return False
        if self._trying is None and self._wins[self.sent] < _PROMISING:
            if self._soon < self._probe:
                return False
            self._soon = 0
            self._probe = min(2 * self._probe, _PROBE[1])
            self._wins[self.sent] = _START
        self._trying = int(self.sent)
        return True

    def won(self) -> None:
        """Learn that something came while this was tried."""
        if self._trying is not None:
            self._wins[self._trying] += (1 - self._wins[self._trying]) / 2
            self._probe = _PROBE[0]
            self._trying = None

    def undecided(self) -> None:
        """Learn that something came before this was tried."""
        self._trying = None

    def lost(self) -> None:
        """Learn that nothing came."""
        if self._trying is not None:
            self._wins[self._trying] *= 0.75
            self._trying = None

    def sleeps(self, now: float) -> None:
        """Take note that the link waits asleep from now on."""
        self._asleep_since = now

    def woken(self) -> None:
        """Take note that a message woke the link."""
        if perf_counter() - self._asleep_since < _SOON:
            self._soon += 1


@cache
def several_cpus() -> bool:
    """Return whether a peer can run while this process spins: by affinity, and by the quota of the cgroup."""
    if len(os.sched_getaffinity(0)) < 2:
        return False
    for name in ("cpu.max", "cpu/cpu.cfs_quota_us cpu/cpu.cfs_period_us"):
        try:
            quota, period = " ".join(Path("/sys/fs/cgroup", part).read_text() for part in name.split()).split()
        except OSError:
            continue  # The other version of cgroups, or none.
        return quota in ("max", "-1") or int(quota) >= 2 * int(period)
    return True
