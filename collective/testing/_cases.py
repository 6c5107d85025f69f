"""Checks, and the cases that they run as: each check for each group size and each mix of array kinds."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, TypeAlias

from collective.testing._world import TIMEOUT, World, turns, until, world

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from types import ModuleType

Body: TypeAlias = Callable[[World], Awaitable[None]]

MIXES = {"numpy": ("numpy",), "torch": ("torch",), "mixed": ("numpy", "torch")}
"""Which kinds of array the ranks of a group take in turn."""


@dataclass(frozen=True)
class Check:
    """One promise of the contracts, as a function that asserts it on a world.

    :param sizes: the group sizes for which it means something.
    :param mixes: the mixes of array kinds for which it means something else; keys of MIXES.
    :param timeout: the group's, in seconds.
    :param roles: how the members divide into roles, for the one size of such a check.
    """

    body: Body
    sizes: tuple[int, ...]
    mixes: tuple[str, ...]
    timeout: float
    roles: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        return self.body.__name__


def check(
    *,
    sizes: Iterable[int] = (1, 2, 3, 4),
    mixes: Iterable[str] = ("numpy",),
    timeout: float = TIMEOUT,
    roles: Iterable[tuple[str, int]] = (),
) -> Callable[[Body], Check]:
    """Make a check of a function."""

    def decorate(body: Body) -> Check:
        return Check(body, tuple(sizes), tuple(mixes), timeout, tuple(roles))

    return decorate


def checks_of(modules: Iterable[ModuleType]) -> list[Check]:
    """Return the checks that modules define."""
    return [value for module in modules for value in vars(module).values() if isinstance(value, Check)]


@dataclass(frozen=True)
class Case:
    """A check on one backend, with one group size and one mix of array kinds. `str(case)` is a short id.

    :param hosts: the hosts on which the ranks pretend to be, in turn.
    :param link: the kind of link that joins them.
    """

    check: Check
    backend: str
    size: int
    mix: str
    hosts: tuple[str, ...] = ("",)
    link: str = "memory"

    def __str__(self) -> str:
        return f"{self.check.name}-{self.backend}-{self.size}-{self.mix}"

    def run(self, runner: Callable[[Any], None] = asyncio.run, *, deadline: float = 60.0) -> None:
        """Run the case on a new event loop; return if it passes.

        :param runner: runs a coroutine on a new loop: `asyncio.run`, `uvloop.run`, ...
        :param deadline: seconds after which the case counts as hanging.

        Raises:
            AssertionError: it fails. ExceptionGroup or any other error: the operations raised what they should not.
        """
        runner(self._run(deadline))

    async def _run(self, deadline: float) -> None:
        before = asyncio.all_tasks()
        async with asyncio.timeout(deadline):
            kinds = tuple(islice(cycle(MIXES[self.mix]), self.size))
            async with world(
                self.backend,
                self.size,
                kinds=kinds,
                timeout=self.check.timeout,
                roles=dict(self.check.roles) or None,
                hosts=self.hosts,
                link=self.link,
            ) as opened:
                await self.check.body(opened)
            await turns()
            assert not opened.unseen, f"the loop's exception handler got {opened.unseen}"
            async with asyncio.timeout(5):
                await until(lambda: asyncio.all_tasks() <= before)


def cases(
    checks: Sequence[Check],
    backend: str,
    sizes: Sequence[int] = (1, 2, 3, 4),
    *,
    hosts: Sequence[str] = ("",),
    link: str = "memory",
) -> list[Case]:
    """Return the cases of these checks on a backend, whose ranks pretend to be on these hosts in turn."""
    return [
        Case(check, backend, size, mix, tuple(hosts), link)
        for check in checks
        for size in sizes
        if size in check.sizes
        for mix in check.mixes
        if len(MIXES[mix]) <= size
    ]
