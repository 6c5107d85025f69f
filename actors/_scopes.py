"""The scopes of calls: who makes them, and how they travel beside a request (RFC 0002, Scopes).

A call that goes to several actors of a role at once has a scope of its own, by which what its parts do in a group that
it reaches as a whole is paired. Inside `gang.scope(key)` all calls of a caller share one.
"""

from __future__ import annotations

import os
import struct
import time
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final

from collective import scopes
from collective.scopes import Call

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

    from actors._target import Target
    from collective.scopes import Key

_HEAD: Final = struct.Struct("<16sIH")
"""The call's id; how many ranks of the callee's role it reaches, or flags; the length of its name, where it has one."""
_LISTED: Final = 1 << 31
"""The ranks follow, four bytes each; else they are the first so many."""
_ALL: Final = (1 << 32) - 1
"""It reaches whom its caller says."""

_inside: ContextVar[tuple[tuple[str, Call], ...]] = ContextVar("gangline_gang_scopes", default=())
_open: dict[tuple[str, bytes], list[Call]] = {}
"""Scopes of gangs that blocks of this process are in, by gang and key; equal keys at a time are one scope."""


def call_to(targets: Sequence[Target]) -> Call | None:
    """Return the call that goes to several actors of one role."""
    if not targets:
        return None
    entered = entered_for(targets[0])
    if entered is not None:
        return entered
    ranks = [target.rank for target in targets]
    count = len(ranks)
    reached = range(count) if ranks == list(range(count)) else frozenset(ranks)
    return Call(_new_id(), "", (targets[0].role, reached))


def entered_for(target: Target) -> Call | None:
    """Return the scope that the running code has entered for calls to a gang."""
    for gang, call in reversed(_inside.get()):
        if gang == target.gang:
            return call
    return None


def entered(gang: str, key: Key) -> AbstractContextManager[None]:
    """Return what makes all calls to a gang, of a block and the tasks that it starts, one scope.

    Raises:
        TypeError: the key is no str, int, bytes or tuple of these.
    """
    return _entered(gang, scopes.DEFAULT.inside(key).leaf, f"gang.scope({key!r})")


@contextmanager
def _entered(gang: str, leaf: bytes, name: str) -> Iterator[None]:
    spelt = gang, leaf
    calls = _open.setdefault(spelt, [])
    calls.append(calls[0] if calls else Call(_new_id(), name, None))
    token = _inside.set((*_inside.get(), (gang, calls[0])))
    try:
        yield
    finally:
        _inside.reset(token)
        calls.pop()
        if not calls:
            del _open[spelt]


def pack(call: Call) -> bytes:
    """Return what goes between the name of a method and the arguments."""
    if call.reach is None:
        name = call.name.encode()
        return _HEAD.pack(call.id, _ALL, len(name)) + name
    _, ranks = call.reach
    if isinstance(ranks, range):
        return _HEAD.pack(call.id, len(ranks), 0)
    return _HEAD.pack(call.id, len(ranks) | _LISTED, 0) + struct.pack(f"<{len(ranks)}I", *sorted(ranks))


def unpack(header: bytes, start: int, role: str, method: str) -> tuple[Call, int]:
    """Take a call's scope out of a request, and return where the arguments start.

    Raises:
        struct.error: it is cut off.
    """
    id, count, length = _HEAD.unpack_from(header, start)
    start += _HEAD.size
    if count == _ALL:
        return Call(id, header[start : start + length].decode(errors="replace"), None), start + length
    name = f"call {id[-4:].hex()} of {role}.{method}"
    if not count & _LISTED:
        return Call(id, name, (role, range(count))), start
    count &= ~_LISTED
    ranks = struct.unpack_from(f"<{count}I", header, start)
    return Call(id, name, (role, frozenset(ranks))), start + 4 * count


def _new_id() -> bytes:
    """Name a call: the earlier one has the smaller id, as far as clocks tell."""
    return time.time_ns().to_bytes(8, "big") + os.urandom(8)
