"""Copies of buffers that their owners may change before they have left.

What is sent later than it was given is copied first: once, into the arena, where every receiver reads it in place. What
nobody else can change is not.
"""

from __future__ import annotations

import weakref
from itertools import count
from sys import getrefcount
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from collective._links.arena import arena
from collective._links.borrowing import Borrowed
from collective.abc import LARGE

if TYPE_CHECKING:
    from collections.abc import Container

_numbers: Final = count(1)
_under_way: Final[dict[int, int]] = {}
"""Bytes of each copy that somebody has still to send."""


class _Copy(np.ndarray):
    """Memory of a copy outside the arena; who looks at any of it keeps it alive."""


def snapshot(buffers: list[Any], lent: Container[int] = (), *, must: bool = False, shared: bool = True) -> bool:
    """Replace each flat buffer whose owner could change it by a copy, in the list; return whether all is done.

    It is not where copies of more than the arena's limit would be under way then, unless it `must`.

    :param lent: places of buffers whose owners have promised not to change them.
    :param shared: whether some receiver can read the arena.
    """
    places = [
        place for place, view in enumerate(buffers) if type(view) is not bytes and _changes(view, lent=place in lent)
    ]
    total = sum(len(buffers[place]) for place in places)
    if total > LARGE and not must and sum(list(_under_way.values())) + total > arena().limit:
        return False
    small = [place for place in places if len(buffers[place]) <= LARGE]
    for place in places:
        if len(buffers[place]) > LARGE:
            buffers[place] = _copied([buffers[place]], shared=shared)
    if small:  # They travel as data, and need no memory of their own.
        memory = _copied([buffers[place] for place in small], shared=False)
        for place in small:
            buffers[place], memory = memory[: len(buffers[place])], memory[len(buffers[place]) :]
    return True


def _copied(views: list[memoryview], *, shared: bool) -> memoryview:
    """Return one copy of all of them, which counts as under way until nobody refers to it."""
    size = sum(map(len, views))
    if size <= LARGE:
        return memoryview(b"".join(views))
    memory = _memory(size, shared=shared)
    np.concatenate([np.frombuffer(view, np.uint8) for view in views], out=np.frombuffer(memory, np.uint8))
    number = next(_numbers)
    _under_way[number] = size
    weakref.finalize(memory.obj, _under_way.pop, number).atexit = False
    return memory


def _memory(nbytes: int, *, shared: bool) -> memoryview:
    if shared:
        try:
            return arena().allocate(nbytes).memory
        except MemoryError:  # Receivers hold what the arena may have, for as long as they like.
            pass
    return np.empty(nbytes, np.uint8).view(_Copy).data


def _changes(view: memoryview, *, lent: bool) -> bool:
    """Whether somebody could change what a buffer shows, and has not promised otherwise.

    Nobody can who does not refer to its memory, nor to what that memory is borrowed from. Memory of blocks is not
    changed before all receivers have let go, by their owners' word; those of a store have given it once it is put.
    """
    if _holders(view) <= _ALONE:
        return False
    found = arena().find(view)
    if found is None:
        return not lent
    block, _ = found
    arena().release(block)
    return block.watch is not None and not view.readonly


def _holders(view: memoryview) -> float:
    """Return how many refer to an owner of a buffer's memory: 0 where nobody can change it, infinity if unknown."""
    most = 0
    owner: Any = view.obj
    while True:
        if type(owner) is bytes or isinstance(owner, Borrowed):
            return 0
        most = max(most, getrefcount(owner) + weakref.getweakrefcount(owner))
        if type(owner) is memoryview:
            owner = owner.obj
        elif not isinstance(owner, np.ndarray):
            return float("inf")
        elif owner.base is None:
            return most if owner.flags.owndata else float("inf")
        else:
            owner = owner.base


_ALONE: Final = _holders(np.empty(1, np.uint8).data)
"""What `_holders` counts where there is the buffer alone: versions of Python differ in what they count on the stack."""
