"""What holders and the store that they read from say to each other.

A holder opens one channel to the store's port `store/<uid>`, with its name as the payload. Everything small is posted,
so that it is in order and waits for nothing; what was fetched is sent. A message to the store holds one or more of
these, one behind the other.

    holder to store:  HOLD(entry) TOKEN       it holds an entry from now on, and a ref has arrived there
                      ARRIVED(entry) TOKEN    another ref of one that it holds has arrived
                      DROP(entry)             it does not hold it any more; one for each HOLD
                      LEASE(entry) seconds    keep it so long, whoever holds it
                      FETCH(request) LENGTH   and a pickle of the entry's number and the keys that select a part
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
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collective.types import Address, Credential

HEAD: Final = struct.Struct("<BQ")
TOKEN: Final = struct.Struct("<32sQ")
"""Which endpoint sent the ref, and the number of its pin there; zeros where none waits to hear of it."""
LENGTH: Final = struct.Struct("<I")
TABLE: Final = struct.Struct("<Q")
SECONDS: Final = struct.Struct("<d")

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
