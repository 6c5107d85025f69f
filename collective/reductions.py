"""The one table of reductions: what each ReduceOp means for each dtype, equal on every backend.

    dtype                SUM      PROD     MIN      MAX      AVG
    bool                 or       and      and      or       -
    (u)int8-64           wraps    wraps    yes      yes      -
    float16, bfloat16    in float32, rounded once; MIN and MAX propagate NaN
    float32, float64     yes      yes      propagate NaN     SUM / members
    complex64/128        yes      yes      -        -        SUM / members

What is missing in it raises TypeError before anything moves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from collective.tensors import numpy_dtype
from collective.types import ReduceOp

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

INTEGERS: Final = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
HALVES: Final = ("float16", "bfloat16")
FLOATS: Final = (*HALVES, "float32", "float64")
COMPLEX: Final = ("complex64", "complex128")
REDUCIBLE: Final = ("bool", *INTEGERS, *FLOATS, *COMPLEX)
"""The names of the dtypes that can be reduced; see `collective.tensors.dtype_name`."""

_HALF_DTYPES: Final = tuple(numpy_dtype(name) for name in HALVES)
_UFUNCS: Final[dict[ReduceOp, Callable[..., Any]]] = {
    ReduceOp.SUM: np.add,  # of bool: or
    ReduceOp.PROD: np.multiply,  # of bool: and
    ReduceOp.MIN: np.minimum,
    ReduceOp.MAX: np.maximum,
    ReduceOp.AVG: np.add,
}
_CHUNK: Final = 1 << 16
"""Elements reduced at a time: an accumulator and one chunk of each member stay in the L2 cache."""


def check(op: ReduceOp, dtype_name: str) -> None:
    """Check that the table has this reduction of this dtype.

    Raises:
        TypeError: it has not, or `op` is no ReduceOp.
    """
    if not isinstance(op, ReduceOp):
        raise TypeError(f"op is {op!r}; pass one of {', '.join(map(str, ReduceOp))}")
    if dtype_name not in REDUCIBLE:
        raise TypeError(
            f"dtype {dtype_name} cannot be reduced; convert the array to one of {', '.join(REDUCIBLE)} "
            "(in native byte order)"
        )
    if op in (ReduceOp.MIN, ReduceOp.MAX) and dtype_name in COMPLEX:
        raise TypeError(
            f"{op.name} of {dtype_name}: complex numbers have no order; reduce real and imaginary part apart"
        )
    if op is ReduceOp.AVG and dtype_name not in (*FLOATS, *COMPLEX):
        raise TypeError(
            f"AVG of {dtype_name} is not defined; reduce with SUM and divide as you need, or convert to float64 first"
        )


def reduce_arrays(arrays: Sequence[np.ndarray], op: ReduceOp, out: np.ndarray) -> None:
    """Reduce elementwise in the order given, and write the result to `out`.

    All are one-dimensional, C-contiguous, equally long and of one dtype, of which `check` approved. `out` may be one of
    `arrays`, or share no memory with them.
    """
    if not len(arrays):
        raise ValueError("a reduction needs at least one array")
    with np.errstate(all="ignore"):  # overflow to inf and invalid to nan are values here, as on every backend
        if out.dtype in _HALF_DTYPES:
            _reduce_chunks(arrays, op, out, accumulate=np.dtype(np.float32))
        elif len(arrays) == 1:
            np.copyto(out, arrays[0])
        elif len(arrays) == 2 and op is not ReduceOp.AVG:
            _UFUNCS[op](arrays[0], arrays[1], out=out)
        else:
            _reduce_chunks(arrays, op, out, accumulate=out.dtype)


def _reduce_chunks(arrays: Sequence[np.ndarray], op: ReduceOp, out: np.ndarray, *, accumulate: np.dtype[Any]) -> None:
    # Chunk by chunk through an accumulator: `out` is written when all members' elements there have been read.
    combine = _UFUNCS[op]
    accumulator = np.empty(min(_CHUNK, out.size), accumulate)
    for start in range(0, out.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        result = accumulator[: out[part].size]
        parts = (array[part].astype(accumulate, copy=False) for array in arrays)
        first, second = next(parts), next(parts, None)
        if second is None:
            np.copyto(result, first)
        else:
            combine(first, second, out=result)
        for later in parts:
            combine(result, later, out=result)
        if op is ReduceOp.AVG:
            np.divide(result, len(arrays), out=result)
        # Rounding a float32 NaN to bfloat16 or float16 keeps it a NaN.
        np.copyto(out[part], result, casting="same_kind")
