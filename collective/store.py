"""Tensors by reference: each actor has a store, and what it puts there can be read from anywhere by a small ref."""

from __future__ import annotations

import asyncio
import os
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np

from collective import tensors
from collective._core.offload import LONG, offload_through
from collective._gate import Gate
from collective._integers import shape_from
from collective._links.mapping import PAGE, round_up
from collective._store import trees
from collective._store.blocks import Blocks, describe_full
from collective._store.drafts import Draft, lay_out
from collective._store.holding import holder_of
from collective._store.refs import TensorRef
from collective._store.room import Room
from collective._store.serving import Books, Entry
from collective._store.sources import UNTOLD
from collective._store.wire import Where
from collective.abc import LARGE
from collective.errors import RefLost
from collective.types import Credential, StoreStatistics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from collective._store.blocks import Memory
    from collective._store.drafts import Blank
    from collective._store.trees import Tree
    from collective.abc import Endpoint
    from collective.tensors import Array

__all__ = ["TensorRef", "TensorStore", "default_limit"]


class TensorStore:
    """Keeps tensors of this process for whoever has a ref of them. Made on its endpoint's loop, and used there.

    :param owner: names it in errors and in `repr` of refs.
    :param limit: bytes that it may hold; `put` waits where there is no room.
    """

    def __init__(self, endpoint: Endpoint, *, owner: str, limit: int) -> None:
        uid = uuid4().hex
        self._where = Where(uid, owner, endpoint.address, Credential(f"store/{uid}", os.urandom(32)))
        self._room = Room(limit)
        self._blocks = Blocks(self._room, asyncio.get_running_loop())
        self._books = Books(holder_of(endpoint), self._where, self._blocks, self._free)
        self._endpoint = endpoint
        self._closed = False
        endpoint.grant(self._where.credential, (self._where.port,))
        endpoint.serve(self._where.port, self._books.serve)

    async def put(self, tree: Any) -> TensorRef:
        """Keep a snapshot of a tensor, or of nested dicts, lists and tuples of tensors, and return a ref of it.

        It is copied once, off the loop where that takes long; the originals may be changed when this returns. An array
        from `empty`, or a part of one that lies in order, is not copied: nobody may write to it from now on. numpy's
        are made read-only, until entry and readers are gone. Where the store is full this waits until others let go,
        in order of the calls.

        Raises:
            StoreFull: a deadline of `asyncio.timeout` ended the wait. Says who holds what; it is a TimeoutError.
            ValueError: the store will never have that much room.
            TypeError: something in it is no tensor, or is a key or a named tuple that cannot be pickled.
        """
        self._check_open()
        if type(tree) is np.ndarray and tree.nbytes <= LARGE and (ref := self._put_small(tree)) is not None:
            return ref
        tree = trees.take_apart(tree)
        found = [self._blocks.find(array) for array in tree.arrays]
        plan = trees.plan(tree, [place is not None for place in found])
        wanted = sum(round_up(nbytes) for nbytes in plan.sizes if nbytes is not None)
        self._check_limit(wanted)
        stored = iter([place[0] for place in found if place is not None])
        kept = [None if nbytes is not None else next(stored) for nbytes in plan.sizes]
        if wanted:
            await self._take(wanted)
        memories = self._allocate(plan.sizes, kept, wanted)
        parts = [memory.view for memory in memories]
        for leaf, array, place in zip(plan.leaves, tree.arrays, found, strict=True):
            if place is not None:
                parts[leaf.part] = parts[leaf.part][place[1] : place[1] + array.nbytes]
        await _copy(tree, plan, parts)
        return self._enter(trees.Spec(tree.form, plan.leaves), memories, parts)

    def empty(self, shape: int | Sequence[int], dtype: Any) -> Array:
        """Return a new array in the store, of torch where `dtype` is torch's: `put` does not copy it.

        Its elements may have any values. It takes room until it and all that was made from it are gone.

        Raises:
            StoreFull: there is no room now.
        """
        self._check_open()
        shape = shape_from(shape)
        kind, name = tensors.kind_and_dtype(dtype)
        nbytes = max(int(np.prod(shape, dtype=np.int64)) * tensors.numpy_dtype(name).itemsize, 1)
        self._settle()
        if not self._room.take_now(round_up(nbytes)):
            raise describe_full(self._where.owner, round_up(nbytes), self._room, list(self.statistics().entries))
        return self._blocks.empty(shape, kind, name)

    async def from_object_ref(self, found: Any) -> TensorRef:
        """Return the ref of a `ray.ObjectRef` that `TensorRef.object_ref` made.

        Raises:
            TypeError: it is another.
            RefLost: the entry is gone.
        """
        return await from_object_ref(found)

    def statistics(self) -> StoreStatistics:
        """Return what it holds, by whom and how long."""
        self._settle()
        return StoreStatistics(
            owner=self._where.owner,
            limit=self._room.limit,
            used=self._room.used,
            waiting=self._room.waiting,
            entries=tuple(self._books.statistics(str)),
        )

    def close(self) -> None:
        """Forget all entries: refs of them are lost. What readers look at stays good. Idempotent."""
        if not self._closed:
            self._closed = True
            self._endpoint.unserve(self._where.port)
            self._endpoint.revoke(self._where.credential)
            self._books.close()
            self._room.close(RefLost("a put", self._where.owner, "its store was closed"))
            self._blocks.close()

    def __repr__(self) -> str:
        return f"<TensorStore of {self._where.owner}, {self._room.used} of {self._room.limit} bytes>"

    def _put_small(self, array: np.ndarray) -> TensorRef | None:
        """Put what is small, where that takes no more than to copy it."""
        try:
            dtype = tensors.dtype_name(array)
        except TypeError:
            return None  # which `trees` explains
        nbytes = max(array.nbytes, 1)
        if self._blocks.find(array) is not None or not self._room.take_now(round_up(nbytes)):
            return None
        memory = self._blocks.small(nbytes)
        leaf = trees.Leaf(0, 0, array.shape, dtype, "numpy")
        if array.nbytes:
            np.copyto(leaf.view(memory.view), array, casting="no")
        return self._enter(trees.Spec(trees.ALONE, (leaf,)), (memory,), (memory.view,))

    def _check_open(self) -> None:
        if self._closed:
            raise RefLost("a put", self._where.owner, "its store was closed")

    def _check_limit(self, wanted: int) -> None:
        if wanted > self._room.limit:
            raise ValueError(
                f"{self!r}: {wanted} bytes can never be put into {self._room.limit}; raise Role(store_bytes=...)"
            )

    def _enter(self, spec: trees.Spec, memories: Sequence[Memory], parts: Sequence[memoryview]) -> TensorRef:
        """Make an entry of memory that was written."""
        self._check_open()
        for memory in memories:
            self._blocks.use(memory)
        parts = [memory.shown(part) for memory, part in zip(memories, parts, strict=True)]
        entry = self._books.add(spec, memories, parts)
        hold = self._books.own.hold(entry.key, UNTOLD)
        return TensorRef(self._where, entry.key, spec.summary, hold=hold)

    async def _draft(self, form: Any, blanks: Sequence[Blank]) -> Draft:
        """Return memory for tensors that stand in the places of a form, to be written and then put without a copy.

        Waits for room as `put` does, and raises what that raises.
        """
        self._check_open()
        spec, sizes = lay_out(form, blanks)
        wanted = sum(map(round_up, sizes))
        self._check_limit(wanted)
        if wanted:
            await self._take(wanted)
            self._check_open()
        return Draft(spec, self._allocate(sizes, [None] * len(sizes), wanted), self._enter)

    def _look(self, ref: TensorRef) -> tuple[trees.Spec, list[np.ndarray]]:
        """Return what one of its own refs refers to, in place: arrays in the order of their places.

        They are good as long as the ref is kept. Nobody may write to them, though numpy would let him.

        Raises:
            ValueError: it is a ref of another store. RefLost: the entry is gone.
        """
        where, entry, _, keys = ref._record()
        if where.uid != self._where.uid:
            raise ValueError(f"{ref!r} is of another store than {self!r}")
        data, found = self._books.own.find(entry, keys, repr(ref))
        spec = trees.Spec.loads(data)
        if isinstance(found, np.ndarray):
            return spec, [found]
        return spec, [leaf.view(found[leaf.part]) for leaf in spec.leaves]

    def _settle(self) -> None:
        """Free what was let go of, so that the same warm memory is used again."""
        self._books.own.settle()
        self._blocks.settle()

    async def _take(self, wanted: int) -> None:
        self._settle()
        await self._room.take(
            wanted,
            lambda: describe_full(self._where.owner, wanted, self._room, list(self.statistics().entries)),
        )

    def _allocate(
        self, sizes: Sequence[int | None], kept: Sequence[Memory | None], wanted: int
    ) -> list[Memory]:
        memories = []
        left = wanted
        try:
            for nbytes, memory in zip(sizes, kept, strict=True):
                if nbytes is not None:
                    left -= round_up(nbytes)
                    memory = self._blocks.allocate(nbytes) if nbytes > LARGE else self._blocks.small(nbytes)
                assert memory is not None
                memories.append(memory)
        except MemoryError:
            self._room.give_back(left)
            raise
        return memories

    def _free(self, entry: Entry) -> None:
        for memory in entry.memories:
            self._blocks.leave(memory)
        entry.memories, entry.parts = (), []
        self._blocks.settle()


async def from_object_ref(found: Any) -> TensorRef:
    """See `TensorStore.from_object_ref`, which needs no store."""
    from collective._store import _ray_refs

    return await _ray_refs.from_object_ref(found)


async def _copy(tree: Tree, plan: trees.Plan, parts: Sequence[memoryview]) -> None:
    """Copy what is not in the store, in two threads where there is much."""
    copies: list[tuple[np.ndarray, np.ndarray]] = []
    for leaf, array in zip(plan.leaves, tree.arrays, strict=True):
        if plan.sizes[leaf.part] is not None and array.nbytes:
            copies.append((leaf.view(parts[leaf.part]), array))
    if sum(target.nbytes for target, _ in copies) <= LONG:
        _copy_all(copies, Gate())
        return
    pieces = [piece for copy in copies for piece in _cut(*copy)]
    half = sum(target.nbytes for target, _ in pieces) // 2
    first: list[tuple[np.ndarray, np.ndarray]] = []
    while pieces and sum(target.nbytes for target, _ in first) < half:
        first.append(pieces.pop(0))
    await asyncio.gather(*(offload_through(partial(_copy_all, each)) for each in (first, pieces) if each))


def _cut(target: np.ndarray, source: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Cut one long copy in two, where its elements lie in order."""
    if target.nbytes <= LONG or not source.flags.c_contiguous:
        return [(target, source)]
    to, of = target.reshape(-1).view(np.uint8), source.reshape(-1).view(np.uint8)
    middle = to.nbytes // 2 // PAGE * PAGE
    return [(to[:middle], of[:middle]), (to[middle:], of[middle:])]


def _copy_all(copies: Sequence[tuple[np.ndarray, np.ndarray]], gate: Gate) -> None:
    for target, source in copies:
        gate.fill(target, source)


def default_limit() -> int:
    """Return how many bytes a store may hold where nobody says: a quarter of the memory."""
    return os.sysconf("SC_PHYS_PAGES") * PAGE // 4

