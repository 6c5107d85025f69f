"""Stores as an endpoint that holds entries of them sees them: what that has of each, and how it lets go."""

from __future__ import annotations

import asyncio
import threading
import weakref
from abc import ABC, abstractmethod
from collections import deque
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

from collective._store import wire
from collective._store.wire import NOBODY, TOKEN

if TYPE_CHECKING:
    from collections.abc import Sequence

    from collective._store.holding import Holder
    from collective._store.wire import Where

UNTOLD = TOKEN.pack(NOBODY, 0)
"""The token of a ref whose sender does not wait: one from a lease."""


class Found(NamedTuple):
    """What an entry consists of, or a part of it: its Spec, taken apart, and its memory."""

    spec: bytes | memoryview
    parts: Sequence[memoryview]


class Tables:
    """What is handed over within this process, since links between its endpoints copy: by table and request."""

    def __init__(self) -> None:
        self._tables: dict[int, dict[int, Found]] = {}
        self._numbers = count(1)

    def open(self) -> tuple[int, dict[int, Found]]:
        """Return a new table and its number."""
        number = next(self._numbers)
        table = self._tables[number] = {}
        return number, table

    def close(self, number: int) -> None:
        """Forget a table."""
        del self._tables[number]

    def take(self, number: int, request: int) -> Found | None:
        """Take what was handed over; None where the table is gone."""
        return self._tables.get(number, {}).pop(request, None)


tables = Tables()


class Hold:
    """One entry that this endpoint holds.

    :ivar entry: its key.
    """

    __slots__ = ("__weakref__", "entry", "source")

    def __init__(self, source: Source, entry: bytes) -> None:
        self.source = source
        self.entry = entry


class _Watch(weakref.ref[Hold]):
    """Sees a Hold go. A finalizer of `weakref` takes ten times as long to make."""

    __slots__ = ("entry", "light")

    entry: bytes
    light: bool
    """Whether it is so small that the owner may learn of its end in a moment."""


class Source(ABC):
    """A store, as one endpoint that holds entries of it sees it: each by its key. Belongs to the endpoint's loop."""

    def __init__(self, holder: Holder, where: Where) -> None:
        self.holder = holder
        self.where = where
        self.loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._holds: dict[bytes, _Watch] = {}
        self._let_go: deque[_Watch] = deque()
        self._scheduled = False

    def hold(self, entry: bytes, token: bytes, *, at_ease: bool = False, light: bool = False) -> Hold:
        """Hold an entry of which a ref has come; `token` is of who sent it.

        :param at_ease: its elements came along, from the owner, which may learn of the arrival in a moment.
        :param light: it is so small that the owner may learn in a moment too that it is not held any more.
        """
        watch = self._holds.get(entry)
        hold = watch() if watch is not None else None
        kind = wire.ARRIVED
        if hold is None:
            kind, hold = wire.HOLD, Hold(self, entry)
            watch = self._holds[entry] = _Watch(hold, self._see_go)
            watch.entry, watch.light = entry, light
        self._register(kind, entry, token, at_ease=at_ease)
        return hold

    @abstractmethod
    def lease(self, entry: bytes, seconds: float) -> None:
        """Have the owner keep an entry."""

    @property
    def lost(self) -> bool:
        """Whether the store cannot be reached any more."""
        return False

    def content(self, entry: bytes) -> tuple[bytes | None, Sequence[memoryview]] | None:
        """Return what the owner sends along with a ref: a Spec, taken apart (None: a tensor's), and its memory."""
        return None

    @abstractmethod
    async def fetch(self, entry: bytes, keys: tuple[Any, ...] | None, ref: str) -> Found:
        """Return an entry, or the part of its only tensor that `keys` select one after another, or (None) no part.

        Raises:
            RefLost: it is gone; `ref` names it.
        """

    @abstractmethod
    def _register(self, kind: int, entry: bytes, token: bytes, *, at_ease: bool) -> None:
        """Tell the store that a ref has come."""

    @abstractmethod
    def _drop(self, entry: bytes, *, at_ease: bool) -> None:
        """Tell the store that an entry is held no more."""

    def _see_go(self, watch: weakref.ref[Hold]) -> None:
        """Hold an entry no longer. In any thread, in the middle of anything."""
        assert isinstance(watch, _Watch)
        self._let_go.append(watch)
        if self._scheduled:
            return
        self._scheduled = True
        try:
            if threading.get_ident() == self._thread:
                self.loop.call_soon(self.settle)
            else:
                self.loop.call_soon_threadsafe(self.settle)
        except RuntimeError:
            self._let_go.clear()  # The loop is closed, and with it what held the entry.

    def settle(self) -> None:
        """Tell the store what was let go of."""
        self._scheduled = False
        while self._let_go:
            watch = self._let_go.popleft()
            if self._holds.get(watch.entry) is watch:
                del self._holds[watch.entry]
            self._drop(watch.entry, at_ease=watch.light)
