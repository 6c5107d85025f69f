"""References to groups: what collectives over references are called on."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from actors._broadcast import broadcast
from actors._interface import Kind, Method
from actors._pickling import dumps
from actors._protocol import RESET_GROUP, TAKE_PART
from actors.errors import NotReady
from collective._integers import integer
from collective.types import Member, ReduceOp
from collective.work import Work

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypeAlias

    from ray import ObjectRef

    from actors._target import Target
    from collective._ref_actions import Action
    from collective.by_reference import Share, Sharing
    from collective.store import TensorRef
    from collective.types import GroupSpec

    Ref: TypeAlias = TensorRef | ObjectRef[Any]

_ROOMS: Final = ("actors", "collective")
_running: set[asyncio.Task[None]] = set()
"""Calls under way, which nobody else may hold."""


class GroupHandle:
    """A picklable reference to a group of a gang: `gang.groups["dp"]`, or `self.gang.groups["dp"]` in its actors.

    Its collectives take refs of what lies in the members' stores, one of each member by rank, and give refs of what
    then lies there: one a member, by rank. The members do it, whatever their own code does meanwhile; no tensor comes
    to the caller. A ref may be a part of a tensor (`ref[10:20]`), or a `ray.ObjectRef` that `TensorRef.object_ref`
    made. `allreduce`, `broadcast` and `repartition` take refs of structures of tensors, too. A member gets the kind of
    array that its ref is of, else the sender's. The refs that are given stay what they are.

    Each call returns a Work at once. Rank 0 takes the calls of all callers one after another, and all members run them
    in that order, each call in a scope of its own: the members' own collectives never pair with these. The results
    need room in the stores: it is waited for in that order as well, for the group's `timeout` at most.

    Cancelling an await leaves the collective in its place, and its Work can be awaited again. Where the caller is gone,
    what was not issued is withdrawn, and what comes of the rest is freed.

    Bad arguments raise ValueError or TypeError, freed refs RefLost, and a thread without an event loop NotReady, at the
    call; where owners have to be asked what is in a structure or an ObjectRef, when it is awaited. No data has moved
    then. Awaiting it also raises:
        RefLost: a tensor is gone. StoreFull: a store had no room in time. Both on no member or on all, before any data
        moves. GroupBroken: some member left a collective unfinished; its `reset()` mends the group. PeerLost: a member
        died or closed the group. CollectiveTimeout: a member did not come in time. ActorClosed: a member has shut down.
    """

    def __init__(self, spec: GroupSpec, targets: Sequence[Target]) -> None:
        self._spec = spec
        self._targets = tuple(targets)

    @property
    def name(self) -> str:
        """The name in its GroupSpec."""
        return self._spec.name

    @property
    def size(self) -> int:
        """How many members the group has."""
        return len(self._targets)

    @property
    def members(self) -> tuple[Member, ...]:
        """The members by rank."""
        return tuple(Member(target.role, target.rank, target.address) for target in self._targets)

    @property
    def backends(self) -> tuple[str, ...]:
        """Names of what moves the data, from the inside out, as in `Group.backends`."""
        from collective.formation import backends_between

        return backends_between(self._spec.backend, self.members)

    def ranks(self, role: str) -> list[int]:
        """Return the group-local ranks of a role's members, in the order of their ranks in the role.

        Raises:
            ValueError: no member has this role.
        """
        found = [rank for rank, target in enumerate(self._targets) if target.role == role]
        if not found:
            roles = ", ".join(self._spec.roles)
            raise ValueError(f"group {self.name!r} has no member of role {role!r}; its roles are {roles}")
        return found

    def allreduce(self, refs: Sequence[Ref], op: ReduceOp = ReduceOp.SUM) -> Work[list[TensorRef]]:
        """Reduce elementwise; every member gets the same bits. Of structures, each tensor by itself."""
        from collective.by_reference import ReduceAll

        return self._start(ReduceAll(op), refs)

    def reduce_scatter(
        self, refs: Sequence[Ref], op: ReduceOp = ReduceOp.SUM, *, splits: Sequence[int] | None = None
    ) -> Work[list[TensorRef]]:
        """Reduce elementwise and give each rank its part along dimension 0.

        :param splits: rows of each rank; by default as torch.chunk cuts, then empty parts.
        """
        from collective.by_reference import ReduceScatters

        return self._start(ReduceScatters.of(op, splits, self.size), refs)

    def allgather(self, refs: Sequence[Ref]) -> Work[list[TensorRef]]:
        """Concatenate the members' tensors along dimension 0, in rank order; the lengths there may differ."""
        from collective.by_reference import GatherAll

        return self._start(GatherAll(), refs)

    def broadcast(self, refs: Ref | Sequence[Ref | None], root: int) -> Work[list[TensorRef]]:
        """Give every member the root's tensor, or structure; the root keeps what it has, and gets a ref of that.

        :param refs: the root's, alone or with None for every other rank.
        """
        from collective.by_reference import Broadcasts

        root = integer(root, "root", f"an int from 0 to {self.size - 1}")
        action = Broadcasts(root)
        if isinstance(refs, list | tuple):
            return self._start(action, refs)
        return self._start(action, [refs if rank == root else None for rank in range(self.size)])

    def repartition(self, refs: Sequence[Ref | None], src: Any, dst: Any) -> Work[list[TensorRef | None]]:
        """Turn a tensor that is laid out as `src` says into one that is laid out as `dst` says, as `Group.repartition`.

        :param refs: of each rank in `src` its part, or a structure of parts; None for the others.
        :param src: its Layout; of a structure, a structure of Layouts like it.
        :param dst: the Layout that it shall have, likewise. Ranks that are not in it get None.
        """
        from collective.by_reference import Relayout

        return self._start(Relayout(src, dst), refs)

    async def reset(self) -> None:
        """Drop what is pending in the group and start a new epoch, on every member; it mends a broken group.

        Raises:
            ExceptionGroup: of what members raised: PeerLost where one is dead, CollectiveTimeout where one did not come
                in time.
        """
        method = Method("", f"groups[{self.name!r}].reset", Kind.ASYNC, "", called=RESET_GROUP)
        leaving = [dumps(((self.name,), {}), "a group's name") for _ in self._targets]
        await broadcast(self._targets, method, leaving)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GroupHandle) and (self._spec, self._targets) == (other._spec, other._targets)

    def __hash__(self) -> int:
        return hash((self.name, self._targets[0].uid))

    def __reduce__(self) -> tuple[object, ...]:
        return GroupHandle, (self._spec, self._targets)

    def __repr__(self) -> str:
        return f"<GroupHandle {self.name!r} of gang {self._targets[0].gang!r}: {', '.join(map(str, self._targets))}>"

    def _start(self, action: Action, refs: Any) -> Work[list[Any]]:
        from collective.by_reference import Request, Sharing

        where = _caller()
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError as error:
            raise NotReady(
                f"{action.name} of {self!r} needs a running event loop: use it under asyncio.run; in a plain method of "
                "an actor, in a function that actors.from_thread.run is given"
            ) from error
        sharing = Sharing(action, self.name, self.members, refs)
        shares = sharing.at_once()
        request = Request(self.name, uuid4().bytes, where, dumps(action, f"an argument of {action.name}")[0])
        work: Work[list[Any]] = Work(f"{action.name} over references at {where}")
        task = loop.create_task(self._carry_out(work, sharing, shares, request))
        _running.add(task)
        task.add_done_callback(_running.discard)
        return work

    async def _carry_out(
        self, work: Work[list[Any]], sharing: Sharing, shares: list[Share] | None, request: Any
    ) -> None:
        method = Method("", f"groups[{self.name!r}].{sharing.action.name}", Kind.ASYNC, "", called=TAKE_PART)
        what = f"a ref given to {method.name}"
        try:
            if shares is None:
                shares = await sharing.asked()
            pickles = [dumps(((request, share), {}), what) for share in shares]
            del shares
            work._succeed(await broadcast(self._targets, method, pickles))
        # Without tracebacks: those have this frame in them, and so the refs, for as long as somebody has the error.
        except ExceptionGroup as failures:
            work._fail(_the_one(failures).with_traceback(None))
        except Exception as error:
            work._fail(error.with_traceback(None))


def _the_one(failures: ExceptionGroup[Exception]) -> Exception:
    """Return the error of the first member that tells one: what the group refuses, it refuses on all alike."""
    error = failures.exceptions[0]
    for note in getattr(failures, "__notes__", ()):
        error.add_note(note)
    return error


def _caller() -> str:
    """Return where in the user's code the operation was called."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__package__") in _ROOMS:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
