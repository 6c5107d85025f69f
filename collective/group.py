"""The live group that a member holds."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from collective._core.exchanges import AllToAll, Gather, Scatter
from collective._core.operands import check_out, describe
from collective._core.operations import (
    AllGather,
    AllReduce,
    Barrier,
    Broadcast,
    Operation,
    Reduce,
    ReduceScatter,
    Split,
    check_rank,
)
from collective._core.repartition import Repartition
from collective._integers import integer, shape_from
from collective.errors import GroupClosed, WrongThread
from collective.scopes import current_part, enter, leave, note_made, scope_in
from collective.types import ReduceOp
from collective.work import Work, await_all

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from contextvars import Token
    from types import TracebackType
    from typing import Self

    from collective._core.engine import Engine
    from collective.scopes import Key, Scope
    from collective.tensors import Array
    from collective.types import GroupStatistics, Member

T = TypeVar("T")

_PACKAGE = __name__.rpartition(".")[0]


class Group:
    """A collective group, as one of its members holds it; `rank` is always group-local.

    Every operation is a plain function that takes its place when called and returns a Work at once. Collectives are
    paired by their order in their scope: a broadcast call that reaches every member is one, `scope(key)` makes others,
    and all else is in the default scope, in the order of each member's program. A rank gets back the kind of array that
    it passed (numpy, torch, cupy); who passed nothing gets the sender's kind, or that of `out`. Inputs may be changed
    once the Work is done; a result shares memory with no one, unless it is `out`. Bad arguments raise ValueError or
    TypeError at the call; another call's unfinished collectives in the default scope GroupError.

    Awaiting an operation raises:
        CollectiveMismatch: members called different things at one place. ScopeEnded: the call that it belongs to has
        failed on some member. GroupBroken: some member left a collective of the default scope unfinished; `reset()`
        mends it. PeerLost: a member died. CollectiveTimeout: a member did not come in time. GroupClosed: this member
        closed the group. BackendError: a library below failed.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def name(self) -> str:
        """The name in its GroupSpec; a subgroup's says what it was split from."""
        return self._engine.name

    @property
    def rank(self) -> int:
        """This member's rank in the group."""
        return self._engine.rank

    @property
    def size(self) -> int:
        """How many members the group has."""
        return self._engine.size

    @property
    def epoch(self) -> int:
        """Which incarnation of the group this is; every reset starts a new one."""
        return self._engine.epoch

    @property
    def backend(self) -> str:
        """Name of the data plane in use."""
        return self._engine.backend

    @property
    def backends(self) -> tuple[str, ...]:
        """Names of what moves the data, from the inside out: ("shm", "gloo") on "two-level", elsewhere one name."""
        return self._engine.current.plane.backends

    @property
    def members(self) -> tuple[Member, ...]:
        """The members by rank."""
        return self._engine.members

    def ranks(self, role: str) -> list[int]:
        """Return the group-local ranks of a role's members, in the order of their ranks in the role.

        Raises:
            ValueError: no member has this role.
        """
        members = self._engine.members
        found = sorted((rank for rank, m in enumerate(members) if m.role == role), key=lambda rank: members[rank].rank)
        if not found:
            roles = ", ".join(dict.fromkeys(member.role for member in members))
            raise ValueError(f"group {self.name!r} has no member of role {role!r}; its roles are {roles}")
        return found

    def empty(self, shape: int | Sequence[int], dtype: Any) -> Array:
        """Return a new array of any content, whose collectives skip a copy where the members share a host.

        Otherwise it is an array like any other, before and after the group has closed; after a reset, take a new one. A
        broadcast skips the copy where it is the root's `out` too. After an operation on it has failed, leave it alone
        until `reset()` has returned: a member that does not know yet may still be reading it.

        :param dtype: numpy's or its name, which gives a numpy array; or torch's, which gives a tensor.
        """
        self._enter("empty()")
        return self._engine.empty(shape_from(shape), dtype)

    def statistics(self) -> GroupStatistics:
        """Return what this member's group does and holds now."""
        return self._engine.statistics()

    def scope(self, key: Key | None) -> ScopedGroup:
        """Return this group in a scope of its own: operations in it are paired with those under an equal key alone.

        `with group.scope(key):` puts all that the block, and the tasks that it starts, call in this group into the
        scope; what it returns has all operations too, for generators, where a block would leak into their callers. The
        scope is inside that of the running call, where that reaches every member, and inside that of a block around it.
        Members may call collectives of different scopes in different orders.

        :param key: a str, an int, bytes, or a tuple of these, equal on every member; None is the group's default scope,
            in the order of each member's program.

        Raises:
            TypeError: the key is something else.
        """
        self._enter("scope()")
        scope = self._engine.default_scope if key is None else self._scope().inside(key)
        return ScopedGroup(self._engine, scope)

    def send(self, tensor: Array, dst: int, *, tag: int = 0) -> Work[None]:
        """Send a tensor to a rank, to oneself too; done when the tensor may be changed.

        Ordered per (scope, source, destination, tag), apart from collectives. Up to 64 KiB are buffered; more may wait
        for the receive.
        """
        self._enter("send()")
        spec = describe(tensor)
        return self._engine.send(self._scope(), tensor, spec, check_rank(dst, self.size, "dst"), integer(tag, "tag"))

    def recv(self, src: int, *, tag: int = 0, out: Array | None = None) -> Work[Array]:
        """Receive the next tensor that a rank sent with this tag, in this scope.

        Waits while the source lives and its part of the call goes on that the scope is of, at most for the GroupSpec's
        `recv_timeout`. Cancelling the only await withdraws it; a message that it had matched goes to the next one.

        Awaiting it also raises:
            ScopeEnded: the source's part of the call is over. CollectiveTimeout: `recv_timeout` is over; it is
            withdrawn. BackendError: the send failed. MemoryError: there is no memory for it; the message stays.
        """
        self._enter("recv()")
        if out is not None:
            check_out(out, describe(out, "out"))
        return self._engine.recv(self._scope(), check_rank(src, self.size, "src"), integer(tag, "tag"), out)

    def broadcast(self, tensor: Array | None, root: int, *, out: Array | None = None) -> Work[Array]:
        """Give every member the root's tensor; the others pass None."""
        return self._collective("broadcast", lambda rank, size: Broadcast(rank, size, tensor, root, out))

    def reduce(
        self, tensor: Array, root: int, op: ReduceOp = ReduceOp.SUM, *, out: Array | None = None
    ) -> Work[Array | None]:
        """Reduce elementwise to the root; the others get None."""
        return self._collective("reduce", lambda rank, size: Reduce(rank, size, tensor, root, op, out))

    def allreduce(self, tensor: Array, op: ReduceOp = ReduceOp.SUM, *, out: Array | None = None) -> Work[Array]:
        """Reduce elementwise; every member gets the same bits."""
        return self._collective("allreduce", lambda rank, size: AllReduce(rank, size, tensor, op, out))

    def reduce_scatter(
        self,
        tensor: Array,
        op: ReduceOp = ReduceOp.SUM,
        *,
        splits: Sequence[int] | None = None,
        out: Array | None = None,
    ) -> Work[Array]:
        """Reduce elementwise and give each rank its part along dimension 0.

        :param splits: rows of each rank, equal on every member; by default as torch.chunk cuts, then empty parts.
        :param out: may be this rank's part of the tensor.
        """
        return self._collective("reduce_scatter", lambda rank, size: ReduceScatter(rank, size, tensor, op, splits, out))

    def allgather(self, tensor: Array, *, out: Array | None = None) -> Work[Array]:
        """Concatenate every member's tensor along dimension 0, in rank order; the lengths there may differ.

        A zero-dimensional tensor counts as shape (1,).

        :param out: the tensor may be its own part of this.
        """
        return self._collective("allgather", lambda rank, size: AllGather(rank, size, tensor, out))

    def gather(self, tensor: Array, root: int, *, out: Sequence[Array] | None = None) -> Work[list[Array] | None]:
        """Give the root a list of every member's tensor, in rank order; shapes and dtypes may differ.

        :param out: at the root, an array for each rank's tensor. The root's own may be the tensor itself.
        """
        return self._collective("gather", lambda rank, size: Gather(rank, size, tensor, root, out))

    def scatter(self, tensors: Sequence[Array] | None, root: int, *, out: Array | None = None) -> Work[Array]:
        """Give each rank its own of the root's tensors; the others pass None. Shapes and dtypes may differ."""
        return self._collective("scatter", lambda rank, size: Scatter(rank, size, tensors, root, out))

    def alltoall(self, tensors: Sequence[Array], *, out: Sequence[Array] | None = None) -> Work[list[Array]]:
        """Send `tensors[j]` to each rank j and get a list of what each rank sent here; shapes and dtypes may differ.

        :param out: an array for what comes from each rank. Any of them may be one of the tensors, which is copied then.
        """
        return self._collective("alltoall", lambda rank, size: AllToAll(rank, size, tensors, out))

    def barrier(self) -> Work[None]:
        """Be done when every member has called it."""
        return self._collective("barrier", Barrier)

    def repartition(self, local: Any, src: Any, dst: Any, *, share: bool = False, out: Any = None) -> Work[Any]:
        """Turn a tensor that is laid out as `src` says into one that is laid out as `dst` says.

        Every member calls it with the same layouts. Those in `src` pass their part, the others None; those in `dst` get
        theirs, the others None. Each element that a rank lacks reaches it once; see `collective.plan` for who sends it.

        :param local: this rank's part, or a structure of parts: dicts, lists and tuples, one in the other.
        :param src: its Layout; of a structure, a structure of Layouts like it.
        :param dst: the Layout that it shall have, likewise.
        :param share: the ranks of a host that get the same elements get read-only views of one copy. torch has no
            read-only tensors: there a write copies its page, or each gets a tensor of its own.
        :param out: an array of this rank's part of `dst`, or a structure like `dst` of such arrays or Nones: the result
            is written into them, and they are returned. Memory that is used again spares most of the cost of new. One
            may be what is passed as `local`. Not with `share`. Until the Work is done, and where it fails, they hold
            neither the old nor the new.
        """
        engine = self._engine
        return self._collective(
            "repartition",
            lambda rank, size: Repartition(
                rank, size, local, src=src, dst=dst, flows=engine.current.flows, hosts=engine.hosts, share=share,
                out=out,
            ),
        )

    def split(self, color: int | None, key: int = 0) -> Work[Group | None]:
        """Form a group of the members that passed the same color, ordered by (key, rank); color None gets None.

        The subgroup dies with this group's epoch. Its default scope is the one that this is called in, and others than
        that call may use it, too. A call that fails before it has seen its subgroup closes that.
        """
        operation: Split

        def make(rank: int, size: int) -> Split:
            nonlocal operation
            operation = Split(rank, size, color, key)
            return operation

        scope, part = self._scope(), current_part()
        agreed = self._collective("split", make)
        work = _Forming(agreed.description)
        if part is not None:
            part.note(work, self._engine, scope)
            note_made(work)
        forming = self._engine.spawn(self._form_subgroup(agreed, operation, scope, work))
        forming.add_done_callback(lambda _: self._end_split(agreed, work))
        return work

    def batch(self) -> Batch:
        """Return a context manager that issues the operations called on it together, when it is left.

        `with group.batch() as b: b.send(x, 1); b.recv(1)`, then `await b` gives their results in that order.
        """
        return Batch(self)

    async def reset(self) -> None:
        """Drop what is pending and start a new epoch, together with every other member: all call it.

        Raises:
            PeerLost: a member is dead. CollectiveTimeout: a member did not call it within the group's timeout.
        """
        self._enter("reset()")
        await self._engine.reset()

    async def aclose(self) -> None:
        """Leave the group. What the others have pending with this member raises PeerLost there. Idempotent."""
        await self._engine.aclose()

    def peer_lost(self, member: Member, cause: str) -> None:
        """Tell the group that one of its members died: what is pending raises PeerLost. For a gang's supervision.

        A process that is no member is passed over.
        """
        for rank, known in enumerate(self._engine.members):
            if (known.role, known.rank) == (member.role, member.rank):
                self._engine.lose(rank, cause)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"group {self.name!r} is its member's own and stays in its process; what travels is the reference "
            f"gang.groups[{self.name!r}], in an actor self.gang.groups[{self.name!r}]"
        )

    def __repr__(self) -> str:
        return f"<Group {self.name!r} rank {self.rank} of {self.size} epoch {self.epoch} on {self.backend}>"

    def _enter(self, operation: str) -> None:
        engine = self._engine
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise WrongThread(engine.name, operation) from None
        if loop is not engine.loop:
            raise WrongThread(engine.name, operation)
        if engine.closed:
            raise GroupClosed(engine.name, operation)

    def _collective(self, name: str, make: Callable[[int, int], Operation]) -> Work[Any]:
        self._enter(f"{name}()")
        engine, scope = self._engine, self._scope()
        where = _caller()
        try:
            operation = make(engine.rank, engine.size)
        except (TypeError, ValueError) as error:
            engine.announce_failed(scope, f"{name}()", error, where)
            raise
        return engine.submit(scope, operation, where)

    def _scope(self) -> Scope:
        """Return the scope of what is called on this now."""
        return scope_in(self._engine)

    async def _form_subgroup(self, agreed: Work[Any], operation: Split, scope: Scope, work: _Forming) -> None:
        engine = self._engine
        try:
            await agreed
            if operation.color is None:
                work._succeed(None)
                return
            subgroup = engine.subgroup(operation.ranks, operation.color, operation.seq, scope)
            await subgroup.open()
            engine.adopt(subgroup)
            if work.unwanted:
                await subgroup.aclose()
                raise GroupClosed(subgroup.name, "split()")
            work._succeed(Group(subgroup))
        except Exception as error:  # the Work's to raise
            work._fail(error)

    def _end_split(self, agreed: Work[Any], work: _Forming) -> None:
        """Fail a split whose forming was cancelled with the epoch."""
        if not work.done():
            error = agreed.exception() if agreed.done() else None
            work._fail(error or self._engine.fault() or GroupClosed(self.name, "split()"))


class _Forming(Work[Group | None]):
    """The Work of a split. Where its call fails before it has seen the group, that closes: nobody else would do it."""

    __slots__ = ("_seen", "unwanted")

    def __init__(self, description: str) -> None:
        super().__init__(description)
        self._seen = False
        self.unwanted = False

    def result(self) -> Group | None:
        group = super().result()
        self._seen = True
        return group

    @property
    def finished(self) -> bool:
        """Whether nobody needs to close the group, but who has seen it."""
        return self._seen

    def abandon(self, reason: str) -> None:
        """Close the group, or have it closed once it is formed."""
        self.unwanted = True
        if self.done() and self.exception() is None and (group := self.result()) is not None:
            group._engine.spawn(group.aclose())


class ScopedGroup(Group):
    """A group whose operations are all in one scope. See `Group.scope`."""

    def __init__(self, engine: Engine, scope: Scope) -> None:
        super().__init__(engine)
        self._fixed = scope
        self._entered: list[Token[Any]] = []

    def __enter__(self) -> Self:
        self._entered.append(enter(self._engine, self._fixed))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        leave(self._entered.pop())

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]} in {self._fixed.name}>"

    def _scope(self) -> Scope:
        return self._fixed


class Batch:
    """Operations that are issued together. See `Group.batch`."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._calls: list[Callable[[], Work[Any]]] = []
        self._works: list[Work[Any]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._works = [call() for call in self._calls]
        self._calls = []

    def send(self, tensor: Array, dst: int, *, tag: int = 0) -> None:
        """As Group.send."""
        spec, dst, tag = describe(tensor), check_rank(dst, self._group.size, "dst"), integer(tag, "tag")
        self._defer(lambda: self._group._engine.send(self._group._scope(), tensor, spec, dst, tag), "send")

    def recv(self, src: int, *, tag: int = 0, out: Array | None = None) -> None:
        """As Group.recv."""
        if out is not None:
            check_out(out, describe(out, "out"))
        src, tag = check_rank(src, self._group.size, "src"), integer(tag, "tag")
        self._defer(lambda: self._group._engine.recv(self._group._scope(), src, tag, out), "recv")

    def __await__(self) -> Generator[Any, None, list[Any]]:
        if self._works is None:
            raise RuntimeError(f"a batch of group {self._group.name!r} is awaited after its with block was left")
        return await_all(self._works)

    def _defer(self, call: Callable[[], Work[Any]], name: str) -> None:
        self._group._enter(f"batch.{name}()")
        if self._works is not None:
            raise RuntimeError(f"batch.{name}() on group {self._group.name!r} after its with block was left")
        self._calls.append(call)


def _caller() -> str:
    """Return where in the user's code the operation was called."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__package__") == _PACKAGE:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
