"""What goes into an operation and where its result lands, as host arrays."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from collective import tensors
from collective._core.offload import LONG

if TYPE_CHECKING:
    from collections.abc import Sequence

    from collective._gate import Gate, Guarded


class Spec(NamedTuple):
    """What a tensor is, without its data; travels to the other members."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    device: str

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * tensors.numpy_dtype(self.dtype).itemsize


def describe(tensor: Any, what: str = "the tensor") -> Spec:
    """Return the Spec of an array of a known library.

    Raises:
        TypeError: it is none.
    """
    try:
        if type(tensor) is np.ndarray:  # quickly, as for most
            return Spec("numpy", tensors.dtype_name(tensor), tensor.shape, "cpu")
        kind = tensors.kind_of(tensor)
        return Spec(kind, tensors.dtype_name(tensor), tensors.shape_of(tensor), tensors.device_of(tensor))
    except TypeError as error:
        raise TypeError(f"{what}: {error}") from None


def flat(tensor: Any, gate: Gate | None = None) -> np.ndarray:
    """Return the elements as a one-dimensional C-contiguous host array, a view where that is possible.

    :param gate: what a copy goes through; of one that is shut meanwhile the elements are of any value.
    """
    host = tensors.to_host(tensor)
    if gate is None or host.flags.c_contiguous:
        return np.ascontiguousarray(host).reshape(-1)
    copy = np.empty(host.shape, host.dtype)
    gate.fill(copy, host)
    return copy.reshape(-1)


def as_bytes(array: np.ndarray) -> np.ndarray:
    """View a one-dimensional contiguous array as uint8."""
    return array.view(np.uint8) if array.nbytes else np.empty(0, np.uint8)


def copies(tensor: Any, spec: Spec) -> int:
    """Return how many bytes `flat` has to copy for this tensor."""
    if type(tensor) is np.ndarray:
        return 0 if tensor.flags.c_contiguous else spec.nbytes
    return 0 if spec.device == "cpu" and tensors.to_host(tensor).flags.c_contiguous else spec.nbytes


class Landing:
    """Where a result lands: in `out`, or in fresh memory of the given kind.

    `memory(dtype, shape)` gives the contiguous host array to write; `finish()` turns it into what the caller gets.
    """

    def __init__(self, out: Any, kind: str, device: str) -> None:
        self._out = out
        self._kind = kind
        self._device = device
        self._direct = None if out is None else tensors.direct_target(out)
        self._memory: np.ndarray
        self._dtype: str
        self._shape: tuple[int, ...]

    def memory(self, dtype: str, shape: Sequence[int]) -> np.ndarray:
        """Return the one-dimensional array to write the result's elements into."""
        self._dtype = dtype
        self._shape = tuple(shape)
        if self._direct is not None:
            self._memory = self._direct
        else:
            self._memory = np.empty(math.prod(self._shape), tensors.numpy_dtype(dtype))
        return self._memory

    @property
    def long(self) -> bool:
        """Whether `finish` may take longer than the loop can wait."""
        if self._direct is not None:
            return False
        if not tensors.loaded(self._kind):
            return True
        return (self._out is not None or self._device != "cpu") and self._memory.nbytes > LONG

    def finish(self, operation: Guarded) -> Any:
        """Return the result; where that has to be copied into `out`, through the operation's gate."""
        if self._direct is not None and self._kind == "numpy":
            return self._out
        result = self._memory.reshape(self._shape)
        if self._out is None:
            return tensors.from_host(result, self._kind, self._device, dtype=self._dtype)
        operation.gate.fill(self._out, result)
        return self._out


def overlap() -> ValueError:
    """Return the error of an `out` that some of an input lies in, or the other way round."""
    return ValueError("out overlaps an input partially; pass the input itself, its own part, or separate memory")


def check_out(out: Any, expected: Spec, *, inputs: Sequence[Any] = (), shape_known: bool = True) -> None:
    """Raise where `out` cannot take a result like `expected`, or overlaps an input partially.

    Raises:
        TypeError: it is of another library or dtype, or no array. ValueError: another shape, read-only, or an overlap.
    """
    spec = describe(out, "out")
    if spec.kind != expected.kind:
        raise TypeError(f"out is a {spec.kind} array and the result a {expected.kind} one; pass the same library")
    if spec.dtype != expected.dtype:
        raise TypeError(f"out has dtype {spec.dtype}, the result {expected.dtype}")
    if shape_known and spec.shape != expected.shape:
        raise ValueError(f"out has shape {spec.shape}, the result {expected.shape}")
    if not tensors.is_writable(out):
        raise ValueError("out is read-only")
    for tensor in inputs:
        if tensors.may_overlap(out, tensor) and not tensors.same_memory(out, tensor):
            raise overlap()
