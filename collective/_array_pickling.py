"""How numpy arrays are pickled: by their bytes, beside the pickle, also those that numpy writes into it."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable


def reducer(kind: type) -> Callable[[Any], Any] | None:
    """Return how arrays of a class are reduced; None where it is no class of arrays, or says so itself."""
    if kind is np.ma.MaskedArray:
        return _reduce_masked
    if not issubclass(kind, np.ndarray):
        return None
    methods = ("__reduce__", "__reduce_ex__", "__setstate__")
    if all(getattr(kind, name) is getattr(np.ndarray, name) for name in methods):
        return reduce_array
    return None


def reduce_array(array: np.ndarray) -> Any:
    """Reduce an array to its bytes, C-contiguous unless it is F-contiguous; leave references to objects to numpy."""
    dtype = array.dtype
    if dtype.hasobject or not dtype.itemsize:
        return array.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    kind = None if type(array) is np.ndarray else type(array)
    plain = array.view(np.ndarray)
    order = "F" if plain.flags.fnc else "C"
    if not plain.flags.forc:
        plain = plain.copy()
    # Flat bytes, since there are dtypes for which a buffer has no format: datetime64, bfloat16, overlapping fields.
    content: Any = (plain.T if order == "F" else plain).reshape(-1).view(np.uint8)
    return _rebuild_array, (pickle.PickleBuffer(content), dtype, array.shape, order, kind)


def _rebuild_array(
    content: Any, dtype: np.dtype[Any], shape: tuple[int, ...], order: Any, kind: type[np.ndarray] | None
) -> np.ndarray:
    # Not np.ndarray(buffer=...), which holds what a memoryview is of and not the view, or what that is of in its turn.
    array = np.frombuffer(content, dtype).reshape(shape, order=order)
    return array if kind is None else array.view(kind)


def _reduce_masked(array: Any) -> Any:
    mask = np.ma.getmask(array)
    arguments = (array.data, None if mask is np.ma.nomask else mask, array._fill_value, array.hardmask)
    return (_rebuild_masked, arguments) if not array.dtype.hasobject else array.__reduce_ex__(pickle.HIGHEST_PROTOCOL)


def _rebuild_masked(
    data: np.ndarray, mask: np.ndarray | None, fill_value: Any, hard: bool
) -> np.ma.MaskedArray[Any, Any]:
    return np.ma.MaskedArray(data, np.ma.nomask if mask is None else mask, fill_value=fill_value, hard_mask=hard)
