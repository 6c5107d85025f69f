"""The poller: what looks at the rings of a loop's shared-memory links, so that most messages need no system call.

A link is awake or asleep. An awake one is looked at in every turn of the loop; its peer need not wake it. When none has
anything new, the poller spins for a moment on those for which that is worth while, a few microseconds in each turn so
that the loop goes on meanwhile; then it lets them sleep, and their eventfds wake the loop's own selector. So a
loop whose links are quiet uses no CPU.
"""

from __future__ import annotations

import os
from time import perf_counter
from typing import TYPE_CHECKING, Final, Protocol

from collective._links.ring import fence

if TYPE_CHECKING:
    import asyncio

    from collective._links.outlook import Outlook

BUDGET: Final = 50e-6
"""Seconds that waiting for peers may spin."""
_SLICE: Final = 8e-6
"""Seconds of that within one turn of the loop: what anything else that becomes ready meanwhile has to wait."""
_PREEMPTED: Final = 20e-6
"""Seconds between two looks that tell that something else needed this CPU: perhaps the very peer waited for."""


class Pollable(Protocol):
    """A link, as the poller sees it."""

    awake: bool
    outlook: Outlook

    def poll(self) -> bool:
        """Read and write what can be. Return whether that was anything. May end links."""
        ...

    def stirred(self) -> bool:
        """Return whether `poll` would find something."""
        ...

    def say_asleep(self) -> None:
        """Tell the peer to wake this end; the poller then fences and looks once more."""
        ...

    def say_awake(self) -> None:
        """Tell the peer that this end need not be woken."""
        ...


class Poller:
    """Serves the links of one loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._awake: list[Pollable] = []
        self._scheduled = False
        self._since = 0.0
        """When it began to spin; 0 where it does not."""
        self._looked = 0.0
        """When it last looked while it spun."""
        self.links = 0

    def wake(self, link: Pollable) -> None:
        """Look at a link in every turn of the loop from now on, until it is quiet."""
        if not link.awake:
            link.awake = True
            link.say_awake()
            self._awake.append(link)
            self._since = 0.0
        self._schedule()

    def expect(self, link: Pollable) -> None:
        """Take note that a sleeping link has sent: an answer may come soon."""
        if link.outlook.worth_while():
            self.wake(link)

    def served(self, link: Pollable) -> None:
        """Take note that a sleeping link was woken and polled: another message may come soon."""
        if link.outlook.worth_while():
            self.wake(link)
            return
        link.say_asleep()
        fence()
        if link.stirred():
            self.wake(link)

    def forget(self, link: Pollable) -> None:
        """Look at a link no more."""
        if link.awake:
            link.awake = False
            self._awake.remove(link)

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._scheduled = False
        try:
            if self._poll_all():
                self._since = 0.0
            elif not self._spin():
                self._sleep()
        finally:  # A link that fails is not to keep the others waiting.
            if self._awake:
                self._schedule()

    def _poll_all(self) -> bool:
        found = False
        for link in tuple(self._awake):
            if link.awake and link.poll():
                found = True
                if self._since:
                    self._judge(link, perf_counter())
                else:
                    link.outlook.undecided()
        return found

    def _spin(self) -> bool:
        """Look for a moment whether something comes, and take it. Return whether to stay awake."""
        now = perf_counter()
        if not self._since:
            for link in tuple(self._awake):
                if not link.outlook.worth_while():
                    self._send_to_sleep([link])
            self._since = now
        links = self._awake
        if not links:
            return False
        over = self._since + BUDGET
        stop = min(now + _SLICE, over)
        while now < stop:
            self._looked = now
            for link in links:
                if link.stirred():
                    self._judge(link, perf_counter())
                    self._since = 0.0
                    link.poll()
                    return True
            now = perf_counter()
            if now - self._looked > _PREEMPTED:
                for link in links:
                    link.outlook.lost(preempted=True)
                return False
        self._looked = now
        return now < over

    def _judge(self, link: Pollable, now: float) -> None:
        """Learn from something that came while this spun."""
        if now - self._looked > _PREEMPTED:
            link.outlook.lost(preempted=True)
        else:
            link.outlook.won()

    def _sleep(self) -> None:
        self._since = 0.0
        for link in self._awake:
            link.outlook.lost()
        self._send_to_sleep(list(self._awake))

    def _send_to_sleep(self, links: list[Pollable]) -> None:
        for link in links:
            link.say_asleep()
        fence()
        for link in links:
            if link.stirred():
                link.say_awake()
            else:
                link.awake = False
                self._awake.remove(link)


_pollers: dict[asyncio.AbstractEventLoop, Poller] = {}
os.register_at_fork(after_in_child=_pollers.clear)


def join(loop: asyncio.AbstractEventLoop) -> Poller:
    """Return the poller of a loop, for one more link."""
    poller = _pollers.get(loop)
    if poller is None:
        poller = _pollers[loop] = Poller(loop)
    poller.links += 1
    return poller


def leave(loop: asyncio.AbstractEventLoop, poller: Poller, link: Pollable) -> None:
    """Take a link away; the poller goes with the last one."""
    poller.forget(link)
    poller.links -= 1
    if not poller.links and _pollers.get(loop) is poller:
        del _pollers[loop]
