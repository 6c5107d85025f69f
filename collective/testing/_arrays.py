"""Arrays of every kind, dtype, shape and form, made, read and compared without the code under test."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

Array: TypeAlias = Any
"""A numpy array or a torch tensor."""

INTEGERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
HALVES = ("float16", "bfloat16")
FLOATS = (*HALVES, "float32", "float64")
COMPLEX = ("complex64", "complex128")
DTYPES = ("bool", *INTEGERS, *FLOATS, *COMPLEX)
"""The dtypes of the table of reductions."""

FORMS = ("contiguous", "strided", "reversed", "transposed", "read-only")
"""How the elements of an input lie in memory."""

_VALUES = np.array([-2, -1, 0.5, 1, 2, 3])
"""Sums and products of a few of these are exact in every floating dtype that accumulates them, in any order."""


def dtype_of(name: str) -> np.dtype[Any]:
    """Return numpy's dtype of that name; its bfloat16 is ml_dtypes'."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def sample(shape: Sequence[int], dtype: str, seed: int) -> np.ndarray:
    """Return reproducible values: the whole range of integers, and floats that reduce exactly."""
    rng = np.random.default_rng([seed, *shape, DTYPES.index(dtype)])
    if dtype == "bool":
        return np.asarray(rng.random(shape) < 0.5)
    if dtype in INTEGERS:
        limits = np.iinfo(dtype)
        return np.asarray(rng.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True))
    values = rng.choice(_VALUES, shape)
    if dtype in COMPLEX:
        values = values + 1j * rng.choice(_VALUES, shape)
    return np.asarray(values).astype(dtype_of(dtype))


def make(kind: str, values: np.ndarray, form: str = "contiguous") -> Array:
    """Return a new array of a kind, "numpy" or "torch", that holds `values` and lies in memory as `form` says.

    torch has neither negative strides nor read-only tensors; there "reversed" is strided, and "read-only" is a leaf
    that requires grad (or, where it cannot, a lazily conjugated or a plain tensor).
    """
    if kind == "torch":
        return _make_torch(values, form)
    array = _lay_out(values, form)
    if form == "read-only":
        array.flags.writeable = False
    return array


def _lay_out(values: np.ndarray, form: str) -> np.ndarray:
    if form == "transposed":
        return np.array(values.T, order="C").T
    if form in ("strided", "reversed") and values.ndim:
        room = np.zeros((*values.shape[:-1], 2 * values.shape[-1]), values.dtype)
        array = room[..., ::2] if form == "strided" else room[..., ::2][::-1]
    else:
        array = np.empty(values.shape, values.dtype)
    array[...] = values
    return array


def _make_torch(values: np.ndarray, form: str) -> Array:
    import torch

    def convert(array: np.ndarray) -> torch.Tensor:
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    if form == "read-only" and values.dtype.kind == "c":
        return convert(np.array(values.conj(), order="C")).conj()
    tensor = convert(_lay_out(values, "strided" if form == "reversed" else form))
    if form == "read-only" and tensor.is_floating_point():
        tensor.requires_grad_()
    return tensor


def kind_of(array: Array) -> str:
    """Return which library an array belongs to: the name of its package."""
    return type(array).__module__.partition(".")[0]


def values_of(array: Array) -> np.ndarray:
    """Return the elements of an array as a numpy array."""
    if isinstance(array, np.ndarray):
        return array
    import torch

    assert isinstance(array, torch.Tensor), f"{array!r} is neither a numpy array nor a torch tensor"
    tensor = array.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def check_array(actual: Array, expected: np.ndarray, kind: str, *, exact: bool = True) -> None:
    """Assert that an array is of that kind and on the host, with the dtype, shape and values expected.

    :param exact: equal values, NaN equal to NaN; else equal to four roundings.
    """
    assert kind_of(actual) == kind, f"got a {type(actual).__name__}, expected an array of {kind}"
    if kind == "torch":
        assert actual.device.type == "cpu", f"got a tensor on {actual.device}"
    values = values_of(actual)
    assert isinstance(values, np.ndarray), f"got a scalar {type(values).__name__}, expected an array"
    assert values.dtype == expected.dtype, f"got dtype {values.dtype}, expected {expected.dtype}"
    assert values.shape == expected.shape, f"got shape {values.shape}, expected {expected.shape}"
    if same_values(values, expected):
        return
    rounding = 0.0 if exact else 4 * float(np.finfo(expected.dtype).eps)
    close = not exact and np.allclose(values, expected, rtol=rounding, atol=rounding, equal_nan=True)
    assert close, f"got {values!r:.300}, expected {expected!r:.300}"


def same_values(one: np.ndarray, other: np.ndarray) -> bool:
    """Return whether two arrays of one dtype and shape hold equal values; NaN equals NaN."""
    if one.dtype == ml_dtypes.bfloat16:
        one, other = one.astype(np.float32), other.astype(np.float32)
    return np.array_equal(one, other, equal_nan=one.dtype.kind in "fc")


def bits(array: Array) -> bytes:
    """Return the elements of an array as bytes, to compare bit by bit."""
    return values_of(array).tobytes()


def overlap(one: Array, other: Array) -> bool:
    """Return whether two arrays in host memory share a byte."""
    return np.may_share_memory(values_of(one), values_of(other))
