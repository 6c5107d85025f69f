"""What holders and the store that they read from say to each other.

A holder opens one channel to the store's port `store/<uid>`, with its name as the payload. Everything small is posted,
so that it is in order and waits for nothing; what was fetched is sent. A message to the store holds one or more of
these, one behind the other. An entry goes by its key, which whoever has a ref of it knows and nobody can guess: it
opens that entry and nothing else. So holders are trusted with no more than that, and nothing of theirs is unpickled.

    holder to store:  HOLD(entry) TOKEN       it holds an entry from now on, and a ref has arrived there
                      ARRIVED(entry) TOKEN    another ref of one that it holds has arrived
                      DROP(entry)             it does not hold it any more; one for each HOLD
                      LEASE(entry) seconds    keep it so long, whoever holds it
                      FETCH(entry) WANTED     and the keys that select a part of it, as `pack_keys` has them
    store to holder:  TAKEN(pin)              the ref that this holder had sent elsewhere has arrived there
                      REPLY(request)          buffers: the Spec, and the parts
                      HERE(request) TABLE     the same, where both are in one process: it is in that table
                      GONE(request) text      there is no such entry
"""

from __future__ import annotations

import pickle
import struct
from dataclasses import dataclass
from functools import cached_property, lru_cache
from operator import index
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from collective.types import Address, Credential

KEY: Final = 16
"""Bytes of an entry's key."""
HEAD: Final = struct.Struct("<BQ")
ENTRY: Final = struct.Struct(f"<B{KEY}s")
TOKEN: Final = struct.Struct("<32sQ")
"""Which endpoint sent the ref, and the number of its pin there; zeros where none waits to hear of it."""
TABLE: Final = struct.Struct("<Q")
SECONDS: Final = struct.Struct("<d")
WANTED: Final = struct.Struct("<QBI")
"""The request's number, whether elements are wanted (else only what it is), and how many bytes of keys follow."""
_NUMBER: Final = struct.Struct("<q")
_END, _INDEX, _DOTS, _SLICE = range(4)
_GIVEN = (4, 8, 16)
"""Flags of a slice: which of its three numbers are there."""
_FARTHEST = (1 << 63) - 1

LONGEST: Final = 1e9
"""Most seconds of a lease: thirty years, which timers can still count."""

HOLD: Final = 1
ARRIVED: Final = 2
DROP: Final = 3
LEASE: Final = 4
FETCH: Final = 5
TAKEN: Final = 6
REPLY: Final = 7
GONE: Final = 8
HERE: Final = 9

NOBODY: Final = bytes(32)


@dataclass(frozen=True)
class Where:
    """Where a store is, and what opens it.

    :param owner: names it to people.
    """

    uid: str
    owner: str
    address: Address
    credential: Credential

    @property
    def port(self) -> str:
        """The port at which it is served."""
        return f"store/{self.uid}"

    @cached_property
    def packed(self) -> bytes:
        """This, pickled: once, since each ref takes it along."""
        return pickle.dumps((self.uid, self.owner, self.address, self.credential), pickle.HIGHEST_PROTOCOL)

    @staticmethod
    @lru_cache(1024)
    def unpack(packed: bytes) -> Where:
        """Return what was packed."""
        return Where(*pickle.loads(packed))

    def __reduce__(self) -> tuple[object, ...]:
        return Where.unpack, (self.packed,)


class Malformed(Exception):
    """A holder said what this protocol does not allow."""


def pack_keys(keys: tuple[Any, ...]) -> bytes:
    """Pack keys, each a tuple of whole numbers, slices and `...`: what each part is, and its numbers."""
    packed = bytearray()
    for key in keys:
        for part in key:
            if part is ...:
                packed.append(_DOTS)
            elif isinstance(part, slice):
                ends = zip(_GIVEN, (part.start, part.stop, part.step), strict=True)
                given = {flag: end for flag, end in ends if end is not None}
                packed.append(_SLICE + sum(given))
                packed += b"".join(_NUMBER.pack(_near(end)) for end in given.values())
            else:
                packed.append(_INDEX)
                packed += _NUMBER.pack(part)
        packed.append(_END)
    return bytes(packed)


def unpack_keys(packed: memoryview) -> tuple[Any, ...]:
    """Return the keys. Raises: Malformed, struct.error: they are none."""
    keys: list[tuple[Any, ...]] = []
    key: list[Any] = []
    at = 0

    def number() -> int:
        nonlocal at
        at += _NUMBER.size
        found: int = _NUMBER.unpack_from(packed, at - _NUMBER.size)[0]
        return found

    while at < len(packed):
        what = packed[at]
        at += 1
        if what == _END:
            keys.append(tuple(key))
            key = []
        elif what == _DOTS:
            key.append(...)
        elif what == _INDEX:
            key.append(number())
        elif what & 3 == _SLICE and what <= _SLICE + sum(_GIVEN):
            key.append(slice(*(number() if what & flag else None for flag in _GIVEN)))
        else:
            raise Malformed(f"a part of a key that is {what}")
    if key:
        raise Malformed("a key without its end")
    return tuple(keys)


def parse(said: memoryview) -> Iterator[tuple[Any, ...]]:
    """Yield what a holder has said, one thing after the other: its kind, the entry's key, and what goes with that.

    HOLD and ARRIVED go with a TOKEN, LEASE with seconds, FETCH with the request's number and the keys, or None.

    Raises:
        Malformed: it is nothing that a holder says.
    """
    at = 0
    try:
        while at < len(said):
            kind, entry = ENTRY.unpack_from(said, at)
            at += ENTRY.size
            if kind in (HOLD, ARRIVED):
                yield kind, entry, TOKEN.unpack_from(said, at)
                at += TOKEN.size
            elif kind == DROP:
                yield kind, entry
            elif kind == LEASE:
                (seconds,) = SECONDS.unpack_from(said, at)
                if not 0 < seconds <= LONGEST:
                    raise Malformed(f"a lease of {seconds} seconds")
                yield kind, entry, seconds
                at += SECONDS.size
            elif kind == FETCH:
                request, elements, size = WANTED.unpack_from(said, at)
                at += WANTED.size
                if at + size > len(said):
                    raise Malformed(f"keys of {size} bytes in a message that ends before")
                keys = unpack_keys(said[at : at + size])
                yield kind, entry, request, keys if elements else None
                at += size
            else:
                raise Malformed(f"a message of kind {kind}")
    except struct.error as error:
        raise Malformed(f"a message that ends too early: {error}") from error


def _near(end: Any) -> int:
    """Return a slice's number, or what means the same where it does not fit."""
    return max(-_FARTHEST, min(index(end), _FARTHEST))
