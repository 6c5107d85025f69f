"""The base class of actors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from actors.errors import NotReady

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from actors.gang_handle import GangHandle
    from collective.group import Group
    from collective.store import TensorStore


@dataclass
class _Place:
    """What the host tells an actor: who it is from the start, whom it knows from `setup` on."""

    role: str
    rank: int
    groups: Mapping[str, Group] | None = None
    gang: GangHandle | None = None
    make_store: Callable[[], TensorStore] | None = None
    store: TensorStore | None = None

    def too_early(self, name: str) -> NotReady:
        return NotReady(f"{self.role}[{self.rank}].{name} is not there in __init__; move what needs it to setup()")


class Actor:
    """Base of actors: each instance lives in its own process, on its own event loop.

    Its public methods (no leading underscore) are what handles call. An `async def` runs as a task on the actor's loop,
    and calls interleave where they await; a plain `def` runs in a worker thread, one at a time in call order; an async
    generator is a stream. Arguments arrive as copies; numpy arrays among them are read-only.

    `rank`, `role` and `store` are there from `__init__` on, `groups` and `gang` from `setup` on.
    """

    __place: _Place | None = None

    @property
    def rank(self) -> int:
        """This actor's rank within its role."""
        return self.__placed("rank").rank

    @property
    def role(self) -> str:
        """The name of this actor's role."""
        return self.__placed("role").role

    @property
    def groups(self) -> Mapping[str, Group]:
        """The groups that this actor is a member of, by name."""
        place = self.__placed("groups")
        if place.groups is None:
            raise place.too_early("groups")
        return place.groups

    @property
    def gang(self) -> GangHandle:
        """Handles of every role of the gang, its own included, by name; and of its groups, as `self.gang.groups`."""
        place = self.__placed("gang")
        if place.gang is None:
            raise place.too_early("gang")
        return place.gang

    @property
    def store(self) -> TensorStore:
        """Where this actor puts tensors for others to read: `ref = await self.store.put(tensor)`."""
        place = self.__placed("store")
        if place.store is None:
            if place.make_store is None:
                raise NotReady(f"{self.role}[{self.rank}].store: no gang made this instance, so it has no store")
            place.store = place.make_store()
        return place.store

    async def setup(self) -> None:
        """Prepare before the first call; the groups are live. A gang has started once every `setup` has returned.

        Calls that come earlier wait for its end, but for those that it waits for itself: calls to this actor, and of
        others' `setup` which it calls in turn.
        """

    async def teardown(self) -> None:
        """Clean up after the last call; the groups are still live, though peers may have left them."""

    def __placed(self, name: str) -> _Place:
        if self.__place is None:
            raise NotReady(f"{type(self).__qualname__}.{name}: no gang made this instance, so it has no {name}")
        return self.__place

    @staticmethod
    def _place_in_role(
        instance: Actor, role: str, rank: int, make_store: Callable[[], TensorStore] | None
    ) -> None:
        instance.__place = _Place(role, rank, make_store=make_store)

    @staticmethod
    def _place_in_gang(instance: Actor, groups: Mapping[str, Group], gang: GangHandle) -> None:
        place = instance.__placed("groups")
        place.groups, place.gang = groups, gang


A = TypeVar("A", bound=Actor)


def create(
    cls: type[A],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    role: str,
    rank: int,
    make_store: Callable[[], TensorStore] | None = None,
) -> A:
    """Make an actor as a host does: `rank`, `role` and `store` are there in its `__init__`.

    :param make_store: is called at the first use of the store, in any thread but not in two at once.
    """
    instance = cls.__new__(cls, *args, **kwargs)
    Actor._place_in_role(instance, role, rank, make_store)
    instance.__init__(*args, **kwargs)  # type: ignore[misc]
    return instance


def connect(instance: Actor, *, groups: Mapping[str, Group], gang: GangHandle) -> None:
    """Give an actor its groups and its gang, before its `setup`."""
    Actor._place_in_gang(instance, groups, gang)
