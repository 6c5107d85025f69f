"""References to what a store holds."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from collective import freight, tensors
from collective._core.offload import LONG, in_thread, offload_through
from collective._gate import Gate
from collective._integers import integer
from collective._links import borrowing, loops
from collective._store.holding import holder_of
from collective._store.sources import UNTOLD
from collective._store.trees import ALONE, Leaf, Spec, Summary, flatten
from collective._store.wire import LONGEST, Where
from collective.errors import RefLost

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from collective._store.holding import Pin
    from collective._store.sources import Hold, Source
    from collective.abc import Endpoint, Link


class TensorRef(freight.Ref):
    """A reference to what an actor put into its store. Small; goes into arguments and results of calls.

    `await ref` gives the tensor, or the structure of tensors: on the owner's host the owner's memory itself, in arrays
    of numpy that are read-only and tensors of torch whose changes nobody else sees (up to 64 KiB a copy, which is
    quicker); elsewhere a copy. What it gives stays good when the ref and its owner are gone. `ref[10:20]` refers to
    that part of a tensor, and moves no other.

    The entry lives while somebody has a ref of it: let refs go, and the memory is free. Belongs to the event loop that
    it came to; may be dropped in any thread.
    """

    __slots__ = (
        "__weakref__",
        "_content",
        "_entry",
        "_expires",
        "_hold",
        "_keeper",
        "_keys",
        "_shape",
        "_summary",
        "_where",
    )

    def __init__(
        self,
        where: Where,
        entry: bytes,
        summary: Summary,
        *,
        keys: tuple[Any, ...] = (),
        hold: Hold | None = None,
        expires: float | None = None,
        keeper: Any = None,
        content: tuple[bytes | None, Sequence[memoryview]] | None = None,
    ) -> None:
        if not _ray_knows and "ray" in sys.modules:
            _tell_ray()
        self._where = where
        self._entry = entry
        """The entry's key."""
        self._summary = summary
        self._keys = keys
        self._hold: Hold | None = hold
        self._expires = expires
        self._keeper = keeper
        self._content = content
        """What it refers to, but for the keys, where that came along with it: as `Source.content` has it."""
        self._shape = summary.shape if not keys or summary.shape is None else _select(summary.shape, keys)

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape. Raises: TypeError: it is a structure of tensors."""
        return self._tensor("shape")

    @property
    def dtype(self) -> str:
        """The name of the tensor's dtype. Raises: TypeError: it is a structure of tensors."""
        self._tensor("dtype")
        return self._summary.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of what it refers to."""
        if self._shape is None:
            return self._summary.nbytes
        return int(np.prod(self._shape, dtype=np.int64)) * tensors.numpy_dtype(self._summary.dtype).itemsize

    @property
    def owner(self) -> str:
        """The actor in whose store it is, with the name of its gang."""
        return self._where.owner

    def __await__(self) -> Generator[Any, None, Any]:
        return self._get().__await__()

    async def into(self, out: Any) -> Any:
        """Copy what it refers to into `out`, an array of the same shape and dtype or a structure of such; return it.

        Raises:
            ValueError: `out` does not fit; nothing was changed.
            RefLost: the entry is gone.
        """
        if self._shape is not None:
            _check_target(out, self._shape, self._summary.dtype, "")
        spec, parts = await self._fetch()
        targets = flatten(out, spec.form)
        for index, target in targets:
            leaf = spec.leaves[index]
            _check_target(target, leaf.shape, leaf.dtype, f" for {leaf}")
        sources = [spec.leaves[index].view(parts[spec.leaves[index].part]) for index, _ in targets]
        pairs = [(target, source) for (_, target), source in zip(targets, sources, strict=True)]
        if sum(source.nbytes for source in sources) > LONG:
            await offload_through(partial(_fill, pairs))
        else:
            _fill(pairs, Gate())
        return out

    def __getitem__(self, key: Any) -> TensorRef:
        """Refer to a part of the tensor, selected as in numpy by numbers, slices and `...`.

        Raises:
            TypeError: it is a structure of tensors, or the key another. IndexError: out of range.
        """
        shape = self._tensor("a part")
        key = key if isinstance(key, tuple) else (key,)
        key = tuple(map(_key, key))
        _select(shape, (key,))
        return TensorRef(
            self._where,
            self._entry,
            self._summary,
            keys=(*self._keys, key),
            hold=self._held(),
            expires=self._expires,
            keeper=self._keeper,
            content=self._content,
        )

    def __iter__(self) -> Any:
        raise TypeError(f"{self!r} is no sequence; await it first")

    def lease(self, seconds: float) -> TensorRef:
        """Return a ref that may be pickled by anything and kept anywhere: the owner keeps the entry that long.

        Unpickled, it is a ref as others are from the first use on, where that comes in time.

        Raises:
            ValueError: `seconds` is not positive, or more than thirty years.
        """
        if not 0 < seconds <= LONGEST:
            raise ValueError(f"{self!r}.lease: seconds is {seconds!r}; it must be positive, and at most {LONGEST:g}")
        hold = self._held()
        hold.source.lease(self._entry, seconds)
        return TensorRef(
            self._where, self._entry, self._summary, keys=self._keys, hold=hold, expires=time.time() + seconds
        )

    async def object_ref(self) -> Any:
        """Return a `ray.ObjectRef` of it, which is the tensor wherever Ray takes one: `ray.get`, `await`, arguments of
        tasks and of actors' methods. The entry is kept until Ray counts nobody who has it, or this event loop ends.

        Where the entry is gone nevertheless, Ray raises RefLost, and TimeoutError where its owner does not answer.

        Raises:
            RefLost: the entry is gone.
            RuntimeError: Ray does not run here. ImportError: it is too old, and has no transports of tensors.
        """
        if "ray" not in sys.modules:
            raise RuntimeError(f"{self!r}.object_ref(): Ray does not run here; call ray.init first")
        from collective._store import _ray_refs

        return await _ray_refs.object_ref(self)

    def free(self) -> None:
        """Let go at once, instead of when the last reference to this object goes: awaiting it raises RefLost then."""
        self._hold = self._keeper = self._content = None
        self._expires = -1.0

    def __copy__(self) -> TensorRef:
        return self

    def __deepcopy__(self, memo: object) -> TensorRef:
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TensorRef) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash((self._where.uid, self._entry))

    def __reduce__(self) -> tuple[object, ...]:
        if freight.is_leaving():
            self._held()
        elif self._expires is not None and 0 <= self._expires < math.inf:
            return _from_lease, (self._where, self._entry, self._summary, self._keys, self._expires)
        return freight.reduce_ref(self)

    def __repr__(self) -> str:
        what = f"{self._summary.dtype}{list(self._shape)}" if self._shape is not None else str(self._summary)
        return f"<TensorRef {what} of {self._where.owner}>"

    def _identity(self) -> tuple[object, ...]:
        return self._where.uid, self._entry, repr(self._keys)

    def _tensor(self, what: str) -> tuple[int, ...]:
        if self._shape is None:
            raise TypeError(f"{self!r} refers to a structure of tensors, which has no {what}; await it first")
        return self._shape

    def _held(self) -> Hold:
        """Return the hold; that of an unpickled lease is taken at its first use."""
        hold = self._hold
        if hold is None:
            if self._expires is None or self._expires < 0:
                raise RefLost(repr(self), self._where.owner, "free() was called on this ref")
            source = holder_of(loops.loop_endpoint()).source(self._where)
            hold = self._hold = source.hold(self._entry, UNTOLD)
        return hold

    def _ship(self, on_end: Callable[[Pin], None], luggage: freight.Luggage) -> tuple[Pin, tuple[Any, ...]]:
        """Count it for a frame; return what the frame says of it, and who understands that."""
        hold = self._held()
        pin, token = hold.source.holder.pin(hold, on_end)
        if pin.live:
            pin.keeper = self._keeper
        _, entry, summary, keys = self._record()
        content = None
        # From its owner alone: whoever else sends it may die before the owner has heard, and then it shall be lost.
        if pin.live and not keys and (found := hold.source.content(entry)) is not None:
            data, memory = found
            parts = luggage.pack(memory)
            if parts is not None:
                content = data, parts
        return pin, (arrive, (self._where.packed, entry, summary, keys, token, content))

    def _again(self) -> TensorRef:
        """Return another ref of the same, which `free()` of this one leaves alone."""
        return TensorRef(self._where, self._entry, self._summary, keys=self._keys, hold=self._held())

    def _record(self) -> tuple[Where, bytes, tuple[Any, ...], tuple[Any, ...]]:
        """Return what says which entry it is, and which part of that."""
        return self._where, self._entry, tuple(self._summary), self._keys

    async def _confirm(self) -> Spec:
        """Return what it consists of, once the owner has counted it. Raises: RefLost."""
        found = await self._source().fetch(self._entry, None, repr(self))
        return Spec.loads(found.spec)

    def _source(self) -> Source:
        hold = self._held()
        source = hold.source
        if source.loop is not asyncio.get_running_loop():
            raise RuntimeError(
                f"{self!r} belongs to another event loop; await it there, or take ref.lease(seconds) along"
            )
        return source

    async def _fetch(self) -> tuple[Spec, Sequence[memoryview]]:
        source = self._source()
        if self._content is not None and not source.lost:
            data, parts = self._content
            # Not before: what a structure is made of may be missing here.
            spec = _alone(self._summary) if data is None else Spec.loads(data)
            if not self._keys:
                return spec, parts
            if (found := _cut(spec, parts, self._keys)) is not None:
                return found
        asked = await source.fetch(self._entry, self._keys, repr(self))
        return Spec.loads(asked.spec), asked.parts

    async def _get(self) -> Any:
        spec, parts = await self._fetch()
        for leaf in spec.leaves:
            if not tensors.loaded(leaf.kind):
                await in_thread(partial(tensors.load, leaf.kind), name=f"importing {leaf.kind}")
        return spec.assemble(parts, borrowing.private)


def _cut(
    spec: Spec, parts: Sequence[memoryview], keys: tuple[Any, ...]
) -> tuple[Spec, Sequence[memoryview]] | None:
    """Return what keys select of a tensor that is here; None where its owner can do that better.

    That is where elements do not lie in order, for a copy would keep no more than those; and where a tensor of torch is
    to have private pages.
    """
    leaf = spec.leaves[0]
    part = select(leaf.view(parts[0]), keys)
    if not part.flags.c_contiguous or leaf.kind != "numpy":
        return None
    return Spec(ALONE, (leaf._replace(offset=0, shape=part.shape),)), [part.reshape(-1).view(np.uint8).data]


_ray_knows = False


def _tell_ray() -> None:
    """Let Ray's serializer know of refs as soon as both Ray and refs are there."""
    global _ray_knows
    try:
        from collective._store import _ray_refs
    except ImportError:  # A Ray without transports of tensors: object_ref() raises this.
        _ray_knows = True
        return
    _ray_knows = _ray_refs.register()


def arrive(record: tuple[Any, ...], endpoint: Endpoint, link: Link | None) -> TensorRef:
    """Take what a frame that came by a link says of a ref."""
    packed, entry, summary, keys, token, content = record
    where = Where.unpack(packed)
    summary = Summary(*summary)
    found, light = _unpack(content, link) if content is not None else (None, False)
    hold = holder_of(endpoint).source(where).hold(entry, token, at_ease=found is not None, light=light)
    return TensorRef(where, entry, summary, keys=keys, hold=hold, content=found)


def _unpack(
    content: tuple[bytes | None, Sequence[bytes | tuple[int, ...]]], link: Link | None
) -> tuple[tuple[bytes | None, Sequence[memoryview]] | None, bool]:
    """Return what came along with a ref, and whether it lies in the frame itself."""
    data, packed = content
    parts = []
    light = True
    for each in packed:
        if isinstance(each, bytes):
            parts.append(memoryview(each))
            continue
        light = False
        view = link.borrow(each) if link is not None else None
        if view is None:
            return None, False
        parts.append(view)
    return (data, parts), light


def _alone(summary: Summary) -> Spec:
    """Return how to read a tensor that is all of its memory."""
    assert summary.shape is not None
    return Spec(ALONE, (Leaf(0, 0, summary.shape, summary.dtype, summary.kind),))


def select(array: np.ndarray, keys: tuple[Any, ...]) -> np.ndarray:
    """Apply keys one after another; never a scalar."""
    for key in keys:
        array = array[(*key, ...)] if ... not in key else array[key]
    return array


def _select(shape: tuple[int, ...], keys: tuple[Any, ...]) -> tuple[int, ...]:
    """Return the shape of what keys select."""
    return select(np.broadcast_to(np.empty((), np.uint8), shape), keys).shape


def _key(part: Any) -> Any:
    """Return a part of a key in Python's own types."""
    wanted = "a ref is cut by whole numbers, slices of them and ...; await it for anything else"
    if part is ...:
        return part
    if isinstance(part, slice):
        ends = (part.start, part.stop, part.step)
        return slice(*(None if end is None else integer(end, "an end of a slice", wanted) for end in ends))
    return integer(part, "the index", wanted)


def _check_target(out: Any, shape: tuple[int, ...], dtype: str, what: str) -> None:
    if tensors.shape_of(out) != shape or tensors.dtype_name(out) != dtype:
        got = f"{tensors.dtype_name(out)}{list(tensors.shape_of(out))}"
        raise ValueError(f"into: out{what} is {got}, and the tensor {dtype}{list(shape)}")
    if not tensors.is_writable(out):
        raise ValueError(f"into: out{what} cannot be written to")


def _fill(pairs: list[tuple[Any, np.ndarray]], gate: Gate) -> None:
    for target, source in pairs:
        gate.fill(target, source)


def _from_lease(where: Where, entry: bytes, summary: Summary, keys: tuple[Any, ...], expires: float) -> TensorRef:
    return TensorRef(where, entry, summary, keys=keys, expires=expires)
