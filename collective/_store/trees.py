"""Nested structures of tensors, as the memory that holds their elements and a description of how to read it."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from collective import _by_value, tensors
from collective.abc import LARGE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from collective.tensors import Array

_ALIGNMENT: Final = 64
_PLAIN: Final = frozenset({str, int, float, bool, bytes, type(None)})
"""Keys of dicts that need no check."""


class Leaf(NamedTuple):
    """One tensor: which part of the memory it is in, and where."""

    part: int
    offset: int
    shape: tuple[int, ...]
    dtype: str
    kind: str

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return prod(self.shape) * tensors.numpy_dtype(self.dtype).itemsize

    def view(self, part: Any) -> np.ndarray:
        """Return its elements in the memory of its part."""
        return view(part, self.offset, self.shape, self.dtype)

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


class Summary(NamedTuple):
    """What every ref knows of its entry: the tensor, or (`shape` is None) how many of them there are in a structure."""

    shape: tuple[int, ...] | None
    dtype: str
    kind: str
    leaves: int
    nbytes: int

    def __str__(self) -> str:
        if self.shape is None:
            return f"{self.leaves} tensors of {self.nbytes} bytes"
        return f"{self.dtype}{list(self.shape)}"


@dataclass(frozen=True)
class Tree:
    """A structure that has been taken apart.

    :param form: the structure, with a `Place` for each tensor.
    :param leaves: the tensors, those of one memory once.
    :param arrays: their elements, in host memory.
    """

    form: Any
    leaves: tuple[Array, ...]
    arrays: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Place:
    """Where a tensor stood, by its place among the leaves."""

    index: int


ALONE: Final = Place(0)
"""The form of a tensor by itself."""


@dataclass(frozen=True)
class Spec:
    """How to put a structure together again from parts of memory."""

    form: Any
    leaves: tuple[Leaf, ...]

    @property
    def summary(self) -> Summary:
        """Return what refs say of it."""
        if isinstance(self.form, Place):
            leaf = self.leaves[0]
            return Summary(leaf.shape, leaf.dtype, leaf.kind, 1, leaf.nbytes)
        nbytes = sum(leaf.nbytes for leaf in self.leaves)
        return Summary(None, "", "", len(self.leaves), nbytes)

    @property
    def is_plain(self) -> bool:
        """Whether it is of a tensor alone, at the start of its part: its summary says all then."""
        return isinstance(self.form, Place) and not self.leaves[0].offset and len(self.leaves) == 1

    def dumps(self) -> bytes:
        """Take it apart."""
        # Plain tuples, and nothing for a tensor alone: what is of a class takes pickle ten times as long.
        form = None if isinstance(self.form, Place) else self.form
        return _by_value.dumps((form, [tuple(leaf) for leaf in self.leaves]))

    @staticmethod
    def loads(data: bytes | memoryview) -> Spec:
        """Put it together."""
        form, leaves = pickle.loads(data)
        return Spec(ALONE if form is None else form, tuple(Leaf(*leaf) for leaf in leaves))

    def assemble(self, parts: Sequence[memoryview], private: Callable[[memoryview], memoryview]) -> Any:
        """Return the structure over these parts: arrays of numpy read-only, tensors over private memory.

        :param private: makes memory to write of a part.
        """
        if isinstance(self.form, Place) and self.leaves[0].kind == "numpy":
            return _read_only(self.leaves[0], parts)
        own: dict[int, memoryview] = {}
        made: list[Any] = []
        for leaf in self.leaves:
            if leaf.kind == "numpy":
                made.append(_read_only(leaf, parts))
                continue
            if leaf.part not in own:
                own[leaf.part] = private(parts[leaf.part])
            made.append(tensors.from_host(leaf.view(own[leaf.part]), leaf.kind, dtype=leaf.dtype))
        return rebuild(self.form, made)


def _read_only(leaf: Leaf, parts: Sequence[memoryview]) -> np.ndarray:
    array = leaf.view(parts[leaf.part].toreadonly())
    array.flags.writeable = False  # also where there are no bytes
    return array


def view(part: Any, offset: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Return an array of a part of memory."""
    kind = tensors.numpy_dtype(dtype)
    count = prod(shape)
    if not count or not kind.itemsize:
        return np.empty(shape, kind)
    array = np.frombuffer(part, kind, count, offset)
    return array if len(shape) == 1 else array.reshape(shape)


def take_apart(tree: Any) -> Tree:
    """Take a structure of dicts, lists, tuples and tensors apart.

    Raises:
        TypeError: something else is in it; says where.
    """
    walk = _Walk()
    form = walk.visit(tree, "")
    return Tree(form, tuple(walk.leaves), tuple(tensors.to_host(leaf) for leaf in walk.leaves))


class _Walk:
    """Takes a structure apart. No closure that calls itself: such a cycle would keep the tensors alive for a while."""

    def __init__(self) -> None:
        self.leaves: list[Array] = []
        self._seen: dict[int, list[int]] = {}
        self._travel: set[object] = set()
        """Keys, and classes of named tuples, that are known to."""

    def visit(self, node: Any, path: str) -> Any:
        """Return the form of a part of the structure."""
        if isinstance(node, dict):
            for key in node:
                if type(key) not in _PLAIN:
                    self._check_travels(key, f"the key {key!r}", path)
            return {key: self.visit(value, f"{path}[{key!r}]") for key, value in node.items()}
        if isinstance(node, list | tuple):
            if hasattr(node, "_fields"):
                self._check_travels(type(node), f"the class {type(node).__qualname__}", path)
            items = [self.visit(value, f"{path}[{index}]") for index, value in enumerate(node)]
            if isinstance(node, list):
                return items
            return type(node)(*items) if hasattr(node, "_fields") else tuple(items)
        try:
            kind = tensors.kind_of(node)
            tensors.dtype_name(node)
        except TypeError as error:
            raise TypeError(f"put: tree{path}: {error}") from None
        address = id(node) if kind == "numpy" and isinstance(node, np.generic) else _address(node, kind)
        leaves, known = self.leaves, self._seen.setdefault(address, [])
        for index in known:
            if node is leaves[index] or (kind == tensors.kind_of(leaves[index]) and _same(node, leaves[index])):
                return Place(index)
        known.append(len(leaves))
        leaves.append(node)
        return Place(len(leaves) - 1)

    def _check_travels(self, part: Any, what: str, path: str) -> None:
        """Check what readers need of a structure beside its tensors. Raises: TypeError."""
        if (type(part), part) in self._travel:
            return
        try:
            _by_value.dumps(part)
        except Exception as error:  # whatever a __reduce__ raises
            raise TypeError(f"put: tree{path}: {what} cannot be pickled: {error}") from error
        self._travel.add((type(part), part))


def rebuild(form: Any, leaves: Sequence[Any]) -> Any:
    """Put leaves into the places of a form."""
    if isinstance(form, Place):
        return leaves[form.index]
    if isinstance(form, dict):
        return {key: rebuild(value, leaves) for key, value in form.items()}
    items = [rebuild(value, leaves) for value in form]
    if isinstance(form, list):
        return items
    return type(form)(*items) if hasattr(form, "_fields") else tuple(items)


def flatten(tree: Any, form: Any, path: str = "") -> list[tuple[int, Any]]:
    """Return what stands in the places of a form in another structure of the same form, with the places' numbers.

    Raises:
        ValueError: it has another form; says where.
    """
    if isinstance(form, Place):
        return [(form.index, tree)]
    if isinstance(form, dict):
        if not isinstance(tree, dict) or tree.keys() != form.keys():
            raise ValueError(f"into: out{path} is no dict with the keys {list(form)}")
        return [pair for key in form for pair in flatten(tree[key], form[key], f"{path}[{key!r}]")]
    if not isinstance(tree, list | tuple) or len(tree) != len(form):
        raise ValueError(f"into: out{path} is no {type(form).__name__} of {len(form)}")
    return [pair for at, each in enumerate(form) for pair in flatten(tree[at], each, f"{path}[{at}]")]


@dataclass(frozen=True)
class Plan:
    """Where a tree's elements go: the leaves, and the sizes of the parts to allocate.

    :param sizes: None for a part that is in the store already.
    """

    leaves: tuple[Leaf, ...]
    sizes: tuple[int | None, ...]


def plan(tree: Tree, stored: Sequence[bool]) -> Plan:
    """Give each large leaf a part of its own, and the small ones one together.

    :param stored: whether each leaf lies in a block of the store.
    """
    leaves: list[Leaf] = []
    sizes: list[int | None] = []
    small, end = -1, 0
    for leaf, array, there in zip(tree.leaves, tree.arrays, stored, strict=True):
        what = (tensors.shape_of(leaf), tensors.dtype_name(leaf), tensors.kind_of(leaf))
        if there or array.nbytes > LARGE:
            leaves.append(Leaf(len(sizes), 0, *what))
            sizes.append(None if there else array.nbytes)
            continue
        if small < 0:
            small = len(sizes)
            sizes.append(0)
        leaves.append(Leaf(small, end, *what))
        end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    if small >= 0:
        sizes[small] = max(end, 1)
    return Plan(tuple(leaves), tuple(sizes))


def _address(node: Array, kind: str) -> int:
    if kind == "torch":
        return int(node.data_ptr())
    return int(node.data.ptr if kind == "cupy" else node.__array_interface__["data"][0])


def _same(a: Array, b: Array) -> bool:
    return not (isinstance(a, np.generic) or isinstance(b, np.generic)) and tensors.same_memory(a, b)
