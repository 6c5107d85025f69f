"""The shared memory that a store's entries lie in."""

from __future__ import annotations

import contextlib
import threading
import weakref
from bisect import bisect_right
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from collective import tensors
from collective._links.arena import arena
from collective._links.mapping import round_up
from collective.errors import StoreFull

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from collective._links.arena import Block
    from collective._store.room import Room
    from collective.tensors import Array


_READ = -1
"""What is told for uses where the owner's own reader has let go."""


class Memory:
    """Bytes of a store: a block of the arena, or what is small enough to be copied to others, by itself.

    They are the store's until nobody uses them: not the owner, and no receiver.

    :ivar block: the block; None where there is none.
    :ivar entries: how many entries lie in it.
    :ivar readers: how many arrays the owner itself has got by refs.
    :ivar array: the array that `TensorStore.empty` returned, while somebody has it.
    """

    __slots__ = ("__weakref__", "address", "array", "block", "entries", "nbytes", "readers", "view")

    def __init__(self, view: memoryview, block: Block | None = None) -> None:
        self.block = block
        self.view = view
        self.nbytes = view.nbytes
        self.address = 0 if block is None else _address(np.frombuffer(view, np.uint8))
        self.entries = 0
        self.readers = 0
        self.array: weakref.ref[np.ndarray] | None = None

    def shown(self, part: memoryview) -> memoryview:
        """Return a part of it as readers may have it: those of blocks map private pages of what can be written."""
        return part if self.block is not None else part.toreadonly()


class _Small(np.ndarray):
    """Memory that is no block. Its end is told, in whichever thread that is."""

    _blocks: Blocks | None = None

    def __del__(self) -> None:
        if self._blocks is not None:
            self._blocks._watch(round_up(self.nbytes), _nothing, 0)


def _nothing() -> None:
    """Stand in for a Memory that nobody looks for."""


class Blocks:
    """The blocks of one store, within its room."""

    def __init__(self, room: Room, loop: asyncio.AbstractEventLoop) -> None:
        self._room = room
        self._loop = loop
        self._empties: weakref.WeakValueDictionary[int, Memory] = weakref.WeakValueDictionary()
        self._news: deque[tuple[int, Callable[[], Memory | None], int]] = deque()
        self._scheduled = False
        self._thread = threading.get_ident()
        self._counting = threading.Lock()
        arena().join(self)  # so that it keeps its pages warm

    def segment_gone(self, number: int) -> None:
        """Nothing to do: no store has shown a segment to anybody."""

    def close(self) -> None:
        """Do without warm pages from now on. Idempotent."""
        arena().leave(self, [], -1, dead=True)

    def small(self, nbytes: int) -> Memory:
        """Return memory that is no block; room as for `allocate`."""
        owned = np.empty(nbytes, np.uint8).view(_Small)
        owned._blocks = self
        return Memory(owned.data)

    def allocate(self, nbytes: int) -> Memory:
        """Return memory of which all pages have been taken from the room; they go back by themselves.

        Raises:
            MemoryError: the system has none.
        """
        owner: list[weakref.ref[Memory]] = []
        watch = partial(self._watch, round_up(nbytes), lambda: owner[0]() if owner else None)
        try:
            block = arena().allocate(nbytes, beyond=True, watch=watch)
        except MemoryError:
            self._room.give_back(round_up(nbytes))
            raise MemoryError(f"the system has no {nbytes} bytes of shared memory for a store") from None
        memory = Memory(block.memory, block)
        owner.append(weakref.ref(memory))
        return memory

    def empty(self, shape: tuple[int, ...], kind: str, dtype: str) -> Array:
        """Return an array over a new block, which is recognised when it is put. Room as for `allocate`."""
        host = tensors.numpy_dtype(dtype)
        count = int(np.prod(shape, dtype=np.int64))
        memory = self.allocate(max(count * host.itemsize, 1))
        # The array holds the memory by its bytes, and the Memory by this subclass of memoryview's owner.
        keeper = np.frombuffer(memory.view, np.uint8).view(_Kept)
        keeper.memory = memory
        array = tensors.from_bytes(np.frombuffer(keeper.data, np.uint8, count * host.itemsize), shape, host)
        self._empties[memory.address] = memory
        if kind == "numpy":
            memory.array = weakref.ref(array)
            return array
        return tensors.from_host(array, kind, dtype=dtype)

    def find(self, array: np.ndarray) -> tuple[Memory, int] | None:
        """Return which block from `empty` all of an array lies in, in order, and where there."""
        if not self._empties or not array.flags.c_contiguous or not array.nbytes:
            return None
        address = _address(array)
        starts = sorted(self._empties)
        at = bisect_right(starts, address) - 1
        memory = self._empties.get(starts[at]) if at >= 0 else None
        if memory is None or address + array.nbytes > memory.address + memory.nbytes:
            return None
        return memory, address - memory.address

    def use(self, memory: Memory) -> None:
        """An entry lies in it from now on, and it is not to be written."""
        memory.entries += 1
        self._mark(memory, writeable=False)

    def leave(self, memory: Memory) -> None:
        """An entry that lay in it is gone."""
        memory.entries -= 1
        self._make_writable(memory)

    def read(self, memory: Memory, part: memoryview) -> memoryview:
        """Return a part of a block for the owner's own use; the block is not to be written before that is gone.

        In any thread.
        """
        if memory.array is None:
            return part
        shown = np.frombuffer(part, np.uint8).view(_Kept)
        with self._counting:
            memory.readers += 1
        weakref.finalize(shown, self._has_read, memory).atexit = False
        return shown.data

    def settle(self) -> None:
        """Take note of what has become free."""
        arena().settle()
        self._take_news()

    def _has_read(self, memory: Memory) -> None:
        """A reader has let go; in any thread."""
        self._watch(0, lambda: memory, _READ)

    def _make_writable(self, memory: Memory) -> None:
        if not memory.entries and not memory.readers and memory.block is not None and memory.block.uses == 1:
            self._mark(memory, writeable=True)

    def _mark(self, memory: Memory, *, writeable: bool) -> None:
        array = memory.array() if memory.array is not None else None
        if array is not None:
            array.flags.writeable = writeable

    def _watch(self, nbytes: int, memory: Callable[[], Memory | None], uses: int) -> None:
        """Hear that a block has one user left, or none: in any thread, in the middle of anything."""
        self._news.append((nbytes if not uses else 0, memory, uses))
        if self._scheduled:
            return
        self._scheduled = True
        with contextlib.suppress(RuntimeError):  # The loop is closed, and nobody waits for room.
            if threading.get_ident() == self._thread:
                self._loop.call_soon(self._take_news)
            else:
                self._loop.call_soon_threadsafe(self._take_news)

    def _take_news(self) -> None:
        self._scheduled = False
        while self._news:
            nbytes, find, uses = self._news.popleft()
            if nbytes:
                self._room.give_back(nbytes)
            memory = find()
            if uses == _READ and memory is not None:
                with self._counting:
                    memory.readers -= 1
            if uses and memory is not None:
                self._make_writable(memory)


class _Kept(np.ndarray):
    """Memory of a block, as those have it whose letting go matters."""

    memory: Memory


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def describe_full(owner: str, wanted: int, room: Room, entries: list[Any]) -> StoreFull:
    """Return the error that says who holds what, the largest first."""
    largest = sorted(entries, key=lambda entry: -entry.nbytes)
    held = [str(entry) for entry in largest[:_MOST_TOLD]]
    if len(largest) > _MOST_TOLD:
        held.append(f"{len(largest) - _MOST_TOLD} more")
    return StoreFull(owner, wanted, room.limit, room.used, held)


_MOST_TOLD = 8
