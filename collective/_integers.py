"""Whole numbers that callers pass: ranks, tags, indices, lengths."""

from __future__ import annotations

import operator
from typing import Any


def integer(value: Any, what: str, wanted: str = "an int") -> int:
    """Return an argument as an int: one of Python's, numpy's, or whatever else is an index.

    :param what: names it in the error, and `wanted` says what belongs there.

    Raises:
        TypeError: it is none. A bool is none, of whatever library: what it would mean differs between them.
    """
    if type(value) is int:  # quickly, as for most
        return value
    if not isinstance(value, bool) and str(getattr(value, "dtype", "")) not in ("bool", "torch.bool"):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{what} is {value!r}; {wanted}")


def integers(values: Any, what: str, wanted: str = "a sequence of ints") -> tuple[int, ...]:
    """Return an argument as a tuple of ints.

    Raises:
        TypeError: it is no sequence of integers, see `integer`.
    """
    if not isinstance(values, str | bytes):
        try:
            return tuple([integer(value, what) for value in values])
        except TypeError:
            pass
    raise TypeError(f"{what} is {values!r}; {wanted}")


def shape_from(given: Any) -> tuple[int, ...]:
    """Return a shape that a caller gives as a sequence of lengths, or as the only one.

    Raises:
        TypeError: it is none. ValueError: a length is negative.
    """
    wanted = "an int or a sequence of ints"
    alone = not hasattr(given, "__iter__") or getattr(given, "ndim", 1) == 0
    shape = (integer(given, "shape", wanted),) if alone else integers(given, "shape", wanted)
    if any(length < 0 for length in shape):
        raise ValueError(f"shape is {list(shape)}; a length is negative")
    return shape
