"""A reference to a gang: its actors and its groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from actors._names import Named
from actors._scopes import entered
from actors.handles import Handles

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from actors.groups import GroupHandle
    from collective.scopes import Key


class GangHandle(Mapping[str, Handles[Any]]):
    """What an actor has of its gang, `self.gang`: the Handles of each role by name, and `groups`. Picklable."""

    def __init__(self, roles: Mapping[str, Handles[Any]], groups: Mapping[str, GroupHandle]) -> None:
        self._roles = dict(roles)
        self._groups = dict(groups)
        self._gang = gang = next(handle._target.gang for handles in roles.values() for handle in handles)
        self._by_role = Named(self._roles, lambda name: f"gang {gang!r} has no role {name!r}")
        self._by_group = Named(self._groups, lambda name: f"gang {gang!r} has no group {name!r}")

    @property
    def groups(self) -> Mapping[str, GroupHandle]:
        """The groups by name, to call collectives over references on; also those that this actor is no member of."""
        return self._by_group

    def scope(self, key: Key) -> AbstractContextManager[None]:
        """Make all calls to this gang in a block one scope, as `Gang.scope`."""
        return entered(self._gang, key)

    def __getitem__(self, role: str) -> Handles[Any]:
        return self._by_role[role]

    def __iter__(self) -> Iterator[str]:
        return iter(self._roles)

    def __len__(self) -> int:
        return len(self._roles)

    def __reduce__(self) -> tuple[object, ...]:
        return GangHandle, (self._roles, self._groups)

    def __repr__(self) -> str:
        return f"<GangHandle: {', '.join(map(repr, self._roles.values()))}; groups {', '.join(self._groups) or 'none'}>"
