"""Memory of a store that is written in place before it becomes an entry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from collective import tensors
from collective._store import trees

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from collective._store.blocks import Memory
    from collective._store.refs import TensorRef


class Blank(NamedTuple):
    """A tensor that is yet to be written."""

    shape: tuple[int, ...]
    dtype: str
    kind: str


def lay_out(form: Any, blanks: Sequence[Blank]) -> tuple[trees.Spec, list[int]]:
    """Return where tensors go that stand in the places of a form, and the sizes of the parts to allocate."""
    arrays = tuple(np.broadcast_to(np.empty((), tensors.numpy_dtype(each.dtype)), each.shape) for each in blanks)
    plan = trees.plan(trees.Tree(form, arrays, arrays), [False] * len(arrays))
    leaves = tuple(leaf._replace(kind=each.kind) for leaf, each in zip(plan.leaves, blanks, strict=True))
    return trees.Spec(form, leaves), [size for size in plan.sizes if size is not None]


class Draft:
    """An entry in the making. Its memory goes back when it is dropped.

    :param enter: makes the entry.
    :ivar arrays: the tensors to write, in the order of their places; not any more once `put` was called.
    """

    def __init__(
        self,
        spec: trees.Spec,
        memories: Sequence[Memory],
        enter: Callable[[trees.Spec, Sequence[Memory], list[memoryview]], TensorRef],
    ) -> None:
        self._spec = spec
        self._memories = memories
        self._parts = [memory.view for memory in memories]
        self._enter = enter
        self.arrays = [leaf.view(self._parts[leaf.part]) for leaf in spec.leaves]

    def put(self) -> TensorRef:
        """Return a ref of what was written. Called once.

        Raises:
            RefLost: the store was closed.
        """
        self.arrays = []
        return self._enter(self._spec, self._memories, self._parts)
