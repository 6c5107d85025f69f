"""Points of a group's life that every member must have reached before any goes on: forming it, and each reset."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from collective._core import tree

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable


class Rounds:
    """One member's part in the rounds of a group. A round is named by (phase, number) and joined once.

    :param post: post a message to another rank.
    """

    def __init__(
        self, rank: int, size: int, *, loop: asyncio.AbstractEventLoop, post: Callable[[int, tuple[Any, ...]], None]
    ) -> None:
        self._rank = rank
        self._size = size
        self._loop = loop
        self._post = post
        self._waiting: dict[tuple[str, int], asyncio.Future[None]] = {}
        self._heard: dict[tuple[str, int], set[int]] = {}
        self._gone: set[tuple[str, int]] = set()

    async def join(self, phase: str, number: int) -> None:
        """Say that this member has come, and wait until all have."""
        name = (phase, number)
        self._gone = {(known, at) for known, at in self._gone if at >= number}
        if name in self._gone:
            return  # this member had come before, gave up waiting, and then all came
        future = self._waiting[name] = self._loop.create_future()
        try:
            self._merge(name, {self._rank})
            await future
        finally:
            del self._waiting[name]

    def hear(self, message: tuple[Any, ...]) -> None:
        """Take a ("round", ...) message."""
        _, name, ranks = message
        if ranks is None:
            self._go(name)
        else:
            self._merge(name, ranks)

    def missing(self, phase: str, number: int) -> list[int]:
        """Return who has not come, as far as this member knows: the root knows all."""
        return [] if self._rank else sorted(set(range(self._size)) - self._heard.get((phase, number), set()))

    def fail(self, error: Callable[[], Exception]) -> None:
        """Raise an error in whoever waits."""
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(error())

    def _merge(self, name: tuple[str, int], ranks: set[int]) -> None:
        heard = self._heard.setdefault(name, set())
        heard |= ranks
        if len(heard) < tree.subtree_size(self._rank, self._size):
            return
        del self._heard[name]
        if self._rank:
            self._post(tree.parent(self._rank), ("round", name, heard))
        else:
            self._go(name)

    def _go(self, name: tuple[str, int]) -> None:
        for child in tree.children(self._rank, self._size):
            self._post(child, ("round", name, None))
        self._gone.add(name)
        future = self._waiting.get(name)
        if future is not None and not future.done():
            future.set_result(None)
