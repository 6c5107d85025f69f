"""How Arrow arrays are pickled: without the rest of what they are slices of. Imported once pyarrow is loaded."""

from __future__ import annotations

import contextlib
import pickle
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from collections.abc import Callable

_SLACK: Final = 1 << 10
"""Bytes that an array's buffers may be larger than its elements without that being worth a copy."""


def reducer(kind: type) -> Callable[[Any], Any] | None:
    """Return how Arrow arrays of a class are reduced, of which tables and batches consist; None for other classes."""
    return _reduce_array if issubclass(kind, pa.Array) else None


def _reduce_array(array: Any) -> Any:
    return _compact(array).__reduce_ex__(pickle.HIGHEST_PROTOCOL)


def _compact(array: Any) -> Any:
    """Copy an array out of larger buffers, which pyarrow pickles whole (apache/arrow#26685)."""
    if not _is_part(array):
        return array
    array = pa.concat_arrays([array])
    with contextlib.suppress(pa.ArrowNotImplementedError):  # It leaves what views refer to, and dense unions' children.
        plain = _without_views(array.type)
        if plain != array.type:
            return array.cast(plain).cast(array.type)
        if _is_part(array):
            return array.take(pa.array(np.arange(len(array))))
    return array


def _is_part(array: Any) -> bool:
    used = array.nbytes
    # Views refer to buffers that count as used, whatever part of them is.
    slack = 0 if _without_views(array.type) != array.type else used // 8
    return bool(array.get_total_buffer_size() > used + slack + _SLACK)


def _without_views(kind: Any) -> Any:
    """Return the type with strings and bytes of their own in the place of views."""
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_binary_view(kind):
        return pa.large_binary()
    if pa.types.is_list(kind):
        return pa.list_(_field_without_views(kind.value_field))
    if pa.types.is_large_list(kind):
        return pa.large_list(_field_without_views(kind.value_field))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_field_without_views(kind.value_field), kind.list_size)
    if pa.types.is_struct(kind):
        return pa.struct([_field_without_views(each) for each in kind])
    return kind


def _field_without_views(field: Any) -> Any:
    return field.with_type(_without_views(field.type))
