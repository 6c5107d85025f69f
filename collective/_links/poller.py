"""The poller: what looks at the rings of a loop's shared-memory links, so that most messages need no system call.

A link is awake or asleep. An awake one is looked at in every turn of the loop; its peer need not wake it. When none has
anything new, the poller spins for a moment on those for which that is worth while, a few microseconds in each turn so
that the loop goes on meanwhile, and gives way between looks; then it lets them sleep, and a byte on their socket wakes
the loop's own selector. So a loop whose links are quiet uses no CPU.

Giving way serves peers that share a CPU with this process, and costs a time slice where the CPU is shared with somebody
who computes: whoever sleeps is woken before such, and whoever gave way is not. Then nothing spins for a while.
"""

from __future__ import annotations

import os
from os import sched_yield
from time import perf_counter
from typing import TYPE_CHECKING, Final, Protocol

from collective._links.ring import fence

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from collective._links.outlook import Outlook

BUDGET: Final = 100e-6
"""Seconds of this process's own time that waiting for peers may spin, though never at a stretch.

As long as an end usually takes with a message. Between two that each take 50 us, one of 50e-6 fell asleep in most
turns, which costs both some 50 us: medians of 15 rows, for 50e-6 / 100e-6 / 150e-6, on 2 CPUs: an array of 4 KiB and
back 159 / 52 / 51 us, one of 1 MiB 320 / 132 / 132, an actor that computes for 60 us 169 / 93 / 103.
"""
_SLICE: Final = 8e-6
"""Seconds of that within one turn of the loop: what anything else that becomes ready meanwhile has to wait."""
_LINGER: Final = 40e-6
"""Seconds that somebody lingers on one link."""
_STARVED: Final = 1e-3
"""Seconds for which those who linger, one after the other, may keep the loop from its next turn."""
_TURN: Final = 1e-3
"""Seconds after which a turn leaves what other links have to the next one."""
_LOOK: Final = 4e-6
"""Seconds that one look is counted at most: what is beyond went to others who needed this CPU."""
_CROWDED: Final = 1e-3
"""Seconds that giving way takes where it was to somebody who computes; peers and the kernel are done sooner."""
_REST: Final = (1e-3, 0.1)
"""Seconds without spinning after that: at first, and at most, doubled where it happens again soon."""
_SOON: Final = 10
"""Within so many times the last rest is soon."""


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
        self._left = 0.0
        """What is left of the budget of this spinning."""
        self._rest = 0.0
        """How long the last rest from spinning is."""
        self._resting_until = 0.0
        self._turned = 0.0
        """When the loop last came here."""
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
        now = perf_counter()
        if now >= self._resting_until and link.outlook.worth_while():
            self.wake(link)
        else:
            link.outlook.sleeps(now)

    def served(self, link: Pollable) -> None:
        """Take note that a sleeping link was woken and polled: another message may come soon."""
        now = perf_counter()
        if now >= self._resting_until and link.outlook.worth_while():
            self.wake(link)
            return
        link.outlook.sleeps(now)
        link.say_asleep()
        fence()
        if link.stirred():
            self.wake(link)

    def linger(self, link: Pollable, until: Callable[[], bool]) -> None:
        """Look at a link that is awake at once, instead of in the next turns of the loop; for `Link.linger`."""
        began = looked = perf_counter()
        if began < self._resting_until or began - self._turned > _STARVED or not link.outlook.worth_lingering():
            return
        end = began + _LINGER
        while looked < end:
            if link.stirred():
                link.poll()
                if until() or not link.awake:
                    link.outlook.lingered(won=True)
                    return
            sched_yield()
            now = perf_counter()
            if now - looked > _CROWDED:
                self._begin_rest(now)
            looked = now
        link.outlook.lingered(won=False)

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
        self._turned = perf_counter()
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
        links = tuple(self._awake)
        for number, link in enumerate(links, 1):
            if link.awake and link.poll():
                found = True
                if self._since:
                    link.outlook.won()
                else:
                    link.outlook.undecided()
                if number < len(links) and perf_counter() - self._turned > _TURN:
                    self._begin_with([other for other in links[number:] if other.awake])
                    break
        return found

    def _begin_with(self, links: list[Pollable]) -> None:
        """Look at these first in the next turn: each moves much, and together they would keep the loop."""
        self._awake[:] = links + [link for link in self._awake if link not in links]

    def _spin(self) -> bool:
        """Look for a moment whether something comes, and take it. Return whether to stay awake.

        Between two looks it gives way to whoever else needs this CPU: perhaps the very peer that is waited for.
        """
        now = perf_counter()
        if not self._since:
            resting = now < self._resting_until
            hopeless = [link for link in self._awake if resting or not link.outlook.worth_while()]
            if hopeless:
                self._send_to_sleep(hopeless, now)
            self._since = self._looked = now
            self._left = BUDGET
        links = self._awake
        if not links:
            return False
        looked, left, stop = self._looked, self._left, now + _SLICE
        while now < stop:
            for link in links:
                if link.stirred():
                    link.outlook.won()
                    self._since = 0.0
                    link.poll()
                    return True
            left -= min(now - looked, _LOOK)
            if left < 0:
                return False
            looked = now
            sched_yield()
            now = perf_counter()
        self._looked, self._left = looked, left
        if now - looked > _CROWDED:
            self._begin_rest(now)
            return False
        return True

    def _begin_rest(self, now: float) -> None:
        """Spin no more for a while: this CPU is needed. Who sleeps is woken before those who compute."""
        if now - self._resting_until < _SOON * self._rest:
            self._rest = min(2 * self._rest, _REST[1])
        else:
            self._rest = _REST[0]
        self._resting_until = now + self._rest

    def _sleep(self) -> None:
        self._since = 0.0
        for link in self._awake:
            link.outlook.lost()
        self._send_to_sleep(list(self._awake), perf_counter())

    def _send_to_sleep(self, links: list[Pollable], now: float) -> None:
        for link in links:
            link.outlook.sleeps(now)
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
