"""Collectives over references: what a caller does, and what each member.

The caller has one ref of each member, and knows by it what the tensor is. It checks all that can be checked, works out
what each member will get, and tells each its Share. A member reads its own store's tensor in place, takes memory of
its store for the result, runs operations of its group on them (`collective._core.lanes` has who orders that), and
returns a ref of the result. No tensor comes to the caller.
"""

from __future__ import annotations

import asyncio
import pickle
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from collective._ref_actions import (
    Action,
    Broadcasts,
    Content,
    GatherAll,
    Local,
    ReduceAll,
    ReduceScatters,
    Relayout,
)
from collective._store.drafts import Blank, Draft
from collective._store.refs import TensorRef
from collective._store.trees import Place
from collective.store import from_object_ref

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from collective._core.engine import Engine
    from collective._core.operations import Operation
    from collective.group import Group
    from collective.store import TensorStore
    from collective.types import Member

__all__ = [
    "Action", "Broadcasts", "GatherAll", "ReduceAll", "ReduceScatters", "Relayout", "Request", "Share", "Sharing",
    "take_part",
]  # fmt: skip


class Share(NamedTuple):
    """What one member takes part with.

    :ivar ref: of its own store, or None.
    :ivar result: what it will get; None for nothing, or for what `ref` has already.
    """

    ref: TensorRef | None
    result: Content | None


class Request(NamedTuple):
    """What all members are told of one call.

    :ivar call: names it, on all of them.
    :ivar where: in whose code it was called.
    :ivar action: the Action, pickled.
    """

    group: str
    call: bytes
    where: str
    action: bytes


class Sharing:
    """The caller's side of one call: from refs to shares.

    :param refs: one a member, by rank; None where a member gives nothing.

    Raises:
        TypeError, ValueError: they are no refs, not as many as members, or not of the members' own stores.
        RefLost: one was freed.
    """

    def __init__(self, action: Action, group: str, members: Sequence[Member], refs: Any) -> None:
        self.action = action
        self._members = members
        self._group = group
        if isinstance(refs, TensorRef) or not hasattr(refs, "__iter__"):
            raise TypeError(f"{action.name}: refs is {_said(refs)}; a sequence of one TensorRef for each member")
        self._refs = list(refs)
        if len(self._refs) != len(members):
            raise ValueError(
                f"{action.name}: {len(self._refs)} refs for the {len(members)} members of group {group!r}; pass one "
                "for each, by rank"
            )
        for rank, ref in enumerate(self._refs):
            if isinstance(ref, TensorRef):
                self._check(rank, ref)
            elif ref is not None and not _is_object_ref(ref):
                raise TypeError(f"{action.name}: refs[{rank}] is {_said(ref)}; a TensorRef, or its ray.ObjectRef")

    def at_once(self) -> list[Share] | None:
        """Return what each member takes part with; None where that has to be asked for."""
        if any(ref is not None and (not isinstance(ref, TensorRef) or _is_structure(ref)) for ref in self._refs):
            return None
        return self._shares([None if ref is None else _content(ref) for ref in self._refs])

    async def asked(self) -> list[Share]:
        """Turn ObjectRefs into what they stand for and ask owners what is in structures; then as `at_once`."""
        for rank, ref in enumerate(self._refs):
            if ref is not None and not isinstance(ref, TensorRef):
                self._refs[rank] = await from_object_ref(ref)
                self._check(rank, self._refs[rank])
        return self._shares(await asyncio.gather(*map(_ask, self._refs)))

    def _shares(self, given: Sequence[Content | None]) -> list[Share]:
        action = self.action
        if not action.takes_structures:
            for rank, each in enumerate(given):
                if each is not None and not isinstance(each.form, Place):
                    raise TypeError(f"{action.name}: refs[{rank}] is of {each}; it takes a tensor of each member")
        return [Share(*each) for each in zip(self._refs, action.results(given), strict=True)]

    def _check(self, rank: int, ref: TensorRef) -> None:
        """Raise where a ref is not of a member's own store, or not good any more."""
        owner = ref._record()[0].address.endpoint
        if owner != self._members[rank].address.endpoint:
            ranks = [at for at, member in enumerate(self._members) if member.address.endpoint == owner]
            whose = f"the store of rank {ranks[0]}" if ranks else f"no member of group {self._group!r}"
            raise ValueError(
                f"{self.action.name}: refs[{rank}] is {ref!r}, of {whose}; rank {rank} is {self._members[rank]}, and "
                "each member gives a ref of its own store"
            )
        ref._held()


async def take_part(
    group: Group, store: Callable[[], TensorStore], request: Request, share: Share
) -> TensorRef | None:
    """Do a member's part of a call; every member is told to, at about the same time. Returns its result.

    Cancelled before it is issued, on all members, nothing happens; else the collective goes on and its result is freed.

    Raises:
        StoreFull: the store had no room for the result within the group's timeout. RefLost: the tensor is gone.
        What operations of a group raise.
    """
    action: Action = pickle.loads(request.action)
    draft: Draft | None = None

    async def prepare(engine: Engine) -> list[Operation]:
        nonlocal draft
        source = target = Local(None, ())
        if share.ref is not None:
            spec, arrays = store()._look(share.ref)
            source = Local(spec.form, arrays)
        if share.result is not None:
            async with asyncio.timeout(engine.timeout):
                draft = await store()._draft(share.result.form, share.result.tensors)
            target = Local(share.result.form, draft.arrays)
        return action.operations(engine, source, target)

    await group._engine.current.lane.run(request.call, f"{action.name} over references", request.where, prepare)
    if action.keeps(group.rank):
        return share.ref
    return None if draft is None else draft.put()


def _content(ref: TensorRef) -> Content:
    return Content(Place(0), (Blank(ref.shape, ref.dtype, ref._record()[2][2]),))


async def _ask(ref: TensorRef | None) -> Content | None:
    if ref is None or not _is_structure(ref):
        return None if ref is None else _content(ref)
    spec = await ref._confirm()
    return Content(spec.form, tuple(Blank(leaf.shape, leaf.dtype, leaf.kind) for leaf in spec.leaves))


def _is_structure(ref: TensorRef) -> bool:
    return ref._record()[2][0] is None


def _is_object_ref(found: object) -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and isinstance(found, ray.ObjectRef)


def _said(value: object) -> str:
    return repr(value) if isinstance(value, TensorRef) else f"a {type(value).__name__}"
