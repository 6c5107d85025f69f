"""What the operations must compute, in plain numpy and without the code under test."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from collective.testing._arrays import COMPLEX, DTYPES, FLOATS
from collective.types import ReduceOp

if TYPE_CHECKING:
    from collections.abc import Sequence

_HALVES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


def reducible(op: ReduceOp, dtype: str) -> bool:
    """Return whether the table of reductions has this case."""
    if op is ReduceOp.AVG:
        return dtype in (*FLOATS, *COMPLEX)
    return dtype not in COMPLEX or op in (ReduceOp.SUM, ReduceOp.PROD)


REDUCTIONS = tuple((op, dtype) for op in ReduceOp for dtype in DTYPES if reducible(op, dtype))
"""The whole table of reductions."""


def exact(op: ReduceOp, dtype: str) -> bool:
    """Return whether a reduction of `sample` values has one right answer, whatever the order.

    An average may be a sum divided or multiplied by a reciprocal; the halves hide that by their rounding.
    """
    return op is not ReduceOp.AVG or dtype in ("float16", "bfloat16")


def reduced(parts: Sequence[np.ndarray], op: ReduceOp) -> np.ndarray:
    """Reduce arrays of one shape elementwise: halves in float32, rounded once."""
    dtype = parts[0].dtype
    stack = np.stack(parts).astype(np.float32 if dtype in _HALVES else dtype)
    with np.errstate(all="ignore"):
        return np.asarray(_reduce(stack, op)).astype(dtype)


def _reduce(stack: np.ndarray, op: ReduceOp) -> np.ndarray:
    boolean = stack.dtype == np.bool_
    if op is ReduceOp.SUM:
        return np.asarray(stack.any(0) if boolean else np.add.reduce(stack, 0, stack.dtype))
    if op is ReduceOp.PROD:
        return np.asarray(stack.all(0) if boolean else np.multiply.reduce(stack, 0, stack.dtype))
    if op is ReduceOp.MIN:
        return np.asarray(np.minimum.reduce(stack, 0))
    if op is ReduceOp.MAX:
        return np.asarray(np.maximum.reduce(stack, 0))
    return np.asarray(np.add.reduce(stack, 0, stack.dtype) / len(stack))


def chunks(rows: int, size: int) -> list[int]:
    """Return how many rows each rank gets by default: as torch.chunk cuts, with none for those that it leaves out."""
    step = -(-rows // size)
    return [max(0, min(step, rows - rank * step)) for rank in range(size)]


def cut(array: np.ndarray, splits: Sequence[int]) -> list[np.ndarray]:
    """Cut an array along dimension 0."""
    edges = [0, *np.cumsum(splits).tolist()]
    return [array[begin:end] for begin, end in pairwise(edges)]


def concatenated(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Concatenate along dimension 0; a zero-dimensional array counts as shape (1,)."""
    return np.concatenate([part.reshape(1) if part.ndim == 0 else part for part in parts])
