"""Who is in a gang, as all of its hosts are told."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from actors.gang_handle import GangHandle
from actors.groups import GroupHandle
from actors.handles import Handle, Handles
from collective.types import Member

if TYPE_CHECKING:
    from collections.abc import Mapping

    from actors._target import Target
    from collective.types import GroupSpec

_known: WeakValueDictionary[bytes, Roster] = WeakValueDictionary()


@dataclass(frozen=True, eq=False)
class Roster:
    """Every actor of a gang, and the groups that they form.

    :param roles: the actors of each role, in rank order.
    """

    roles: Mapping[str, tuple[Target, ...]]
    specs: tuple[GroupSpec, ...]

    @cached_property
    def handles(self) -> GangHandle:
        """Handles of every role, and of every group."""
        handles = {
            role: Handles(role, targets[0].interface, [Handle[Any](target) for target in targets])
            for role, targets in self.roles.items()
        }
        groups = {
            spec.name: GroupHandle(spec, [target for role in spec.roles for target in self.roles[role]])
            for spec in self.specs
        }
        return GangHandle(handles, groups)

    @cached_property
    def members(self) -> Mapping[str, tuple[Member, ...]]:
        """The members of each group, by group-local rank."""
        return {
            spec.name: tuple(Member(t.role, t.rank, t.address) for role in spec.roles for t in self.roles[role])
            for spec in self.specs
        }

    @cached_property
    def _starts(self) -> Mapping[tuple[str, str], int]:
        """The group-local rank of each role's first member, by group and role."""
        starts = {}
        for spec in self.specs:
            start = 0
            for role in spec.roles:
                starts[spec.name, role] = start
                start += len(self.roles[role])
        return starts

    def groups_of(self, role: str, rank: int) -> list[tuple[GroupSpec, int]]:
        """Return the groups that an actor is a member of, each with its rank there."""
        return [(spec, self._starts[spec.name, role] + rank) for spec in self.specs if role in spec.roles]

    def dumps(self) -> bytes:
        """Take it apart."""
        return pickle.dumps((dict(self.roles), self.specs), pickle.HIGHEST_PROTOCOL)

    @staticmethod
    def loads(data: memoryview) -> Roster:
        """Put it together; hosts in one process share what comes of it, or a thousand would hold a million targets."""
        digest = hashlib.sha256(data).digest()
        roster = _known.get(digest)
        if roster is None:
            roster = _known[digest] = Roster(*pickle.loads(data))
        return roster
