"""What a forked child must not keep: the sockets of links. A child that held them would hide its parent's death."""

from __future__ import annotations

import os
from typing import Protocol


class Descriptors(Protocol):
    """Something that holds file descriptors which a child must drop."""

    def drop(self) -> None:
        """Close the descriptors and nothing else: no shutdown, no call to the loop. Both would reach the parent's."""
        ...


_held: dict[int, Descriptors] = {}


def hold(owner: Descriptors) -> None:
    """Have `owner.drop()` called in forked children until `release`."""
    _held[id(owner)] = owner


def release(owner: Descriptors) -> None:
    """Forget an owner that has closed its descriptors. Idempotent."""
    _held.pop(id(owner), None)


def _in_child() -> None:
    # Taken out first: dropping must happen once, and the objects must outlive the loop of any thread that is gone.
    owners = list(_held.values())
    _held.clear()
    for owner in owners:
        owner.drop()


os.register_at_fork(after_in_child=_in_child)
