"""The one module that knows array libraries: numpy, torch and cupy.

Data planes move one-dimensional numpy arrays in host memory; this module turns what callers hold into those and back.
Torch and cupy are looked up among the modules that are already imported, so that asking about a numpy array never costs
an import; only `load`, `empty` and `from_host` for such a kind import its library.

The cupy branches have not been run: no device was at hand where they were written.
"""

from __future__ import annotations

import ast
import copyreg
import importlib
import sys
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import ml_dtypes
import numpy as np

from collective import _array_pickling

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Array: TypeAlias = Any
"""A numpy array or scalar, a torch tensor or a cupy array; `kind_of` tells which."""

KINDS: Final = ("numpy", "torch", "cupy")
ACCEPTED: Final = "numpy arrays, strided torch tensors and cupy arrays"

_NUMPY_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    name: np.dtype(name)
    for name in (
        "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
        "float16", "float32", "float64", "complex64", "complex128",
    )
}  # fmt: skip
_EXTENSION_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    name: np.dtype(getattr(ml_dtypes, name))
    for name in (
        "bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu",
    )
    if hasattr(ml_dtypes, name)
}  # fmt: skip
"""Those that torch has too, under the same name and with the same bits."""
_SHARED_DTYPES: Final = _NUMPY_DTYPES | _EXTENSION_DTYPES
_NAMES: Final = {dtype: name for name, dtype in _SHARED_DTYPES.items()}
_TORCH_CARRIERS: Final = {1: "uint8", 2: "int16", 4: "int32", 8: "int64", 16: "complex128"}
"""By item size, a torch dtype that numpy has too and that can stand for one that numpy lacks."""

_OVERLAP_WORK: Final[Any] = 100_000
"""Candidates that numpy may try before two strided arrays count as overlapping: a millisecond or so."""


def kind_of(x: object) -> str:
    """Return which library `x` belongs to: "numpy", "torch" or "cupy". A numpy scalar is a 0-d array.

    Raises:
        TypeError: it is no array, or one that has no plain elements in memory.
    """
    if type(x) is np.ndarray:
        return "numpy"
    if isinstance(x, np.ndarray | np.generic):
        if isinstance(x, np.ma.MaskedArray):
            raise TypeError("a numpy masked array would lose its mask; pass x.filled(...), and the mask beside it")
        return "numpy"
    torch = _loaded("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        _check_plain_tensor(torch, x)
        return "torch"
    cupy = _loaded("cupy")
    if cupy is not None and isinstance(x, cupy.ndarray):
        return "cupy"
    advice = "; np.asarray(x) makes one" if isinstance(x, bool | int | float | complex | list | tuple | range) else ""
    raise TypeError(f"{type(x).__module__}.{type(x).__qualname__} is no array: {ACCEPTED} are accepted{advice}")


def loaded(kind: str) -> bool:
    """Whether arrays of this kind can be made without importing a library."""
    return kind == "numpy" or _loaded(kind) is not None


def load(kind: str) -> None:
    """Import the library of a kind; torch takes seconds, so call this off the event loop.

    Raises:
        ImportError: it is not installed here.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of array {kind!r}; known are {', '.join(KINDS)}")
    importlib.import_module(kind)


def dtype_name(x: Array) -> str:
    """Return the name of the dtype of `x`, equal on every library that has that dtype with the same bits.

    These are numpy's names, bfloat16 and torch's float8 ones. Others can be moved but not reduced: numpy's keep
    `dtype.str` or a description of their fields, and torch's own are called "torch:...".

    Raises:
        TypeError: elements are references to objects, which mean nothing elsewhere.
    """
    dtype = x.dtype
    known = _NAMES.get(dtype)
    return known if known is not None else _name_of(dtype)


def kind_and_dtype(dtype: Any) -> tuple[str, str]:
    """Return the library that a dtype belongs to, and its name: torch's own, or whatever numpy takes for one.

    Raises:
        TypeError: it is none.
    """
    torch = _loaded("torch")
    if torch is not None and isinstance(dtype, torch.dtype):
        return "torch", _name_of(dtype)
    return "numpy", _name_of(np.dtype(_EXTENSION_DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype))


def _name_of(dtype: Any) -> str:
    if not isinstance(dtype, np.dtype):
        name = str(dtype).removeprefix("torch.")
        return name if name in _SHARED_DTYPES else f"torch:{name}"
    known = _NAMES.get(dtype)
    if known is not None:
        return known
    if dtype.hasobject:
        raise TypeError(f"an array of dtype {dtype} holds references to objects; convert it to a dtype of plain values")
    if dtype.type.__module__ == "ml_dtypes":
        return f"ml_dtypes:{dtype.name}"
    if dtype.fields is not None:
        return f"numpy:{_described(dtype)!r}"
    return dtype.str


def _described(dtype: np.dtype[Any]) -> Any:
    """Return a dtype as literals: its name, or of each field name, title, offset and dtype; wherever the fields lie."""
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return [_described(base), shape]
    if dtype.fields is None:
        return _name_of(dtype)
    fields = [(name, *(dtype.fields[name] + (None,))[:3]) for name in dtype.names or ()]
    inside = [(name, title, offset, _described(kind)) for name, kind, offset, title in fields]
    return inside, dtype.itemsize


def _from_described(described: Any) -> np.dtype[Any]:
    if isinstance(described, str):
        return numpy_dtype(described)
    if isinstance(described, list):
        base, shape = described
        return np.dtype((_from_described(base), shape))
    fields, itemsize = described
    names, titles, offsets, kinds = zip(*fields, strict=True) if fields else ((), (), (), ())
    formats = [_from_described(kind) for kind in kinds]
    layout: Any = {"names": names, "titles": titles, "offsets": offsets, "formats": formats, "itemsize": itemsize}
    dtype: np.dtype[Any] = np.dtype(layout)
    return dtype


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the dtype of the host array that stands for a dtype name; raw bytes for those that numpy lacks."""
    known = _SHARED_DTYPES.get(name)
    if known is not None:
        return known
    library, _, local = name.rpartition(":") if name.startswith(("torch:", "ml_dtypes:")) else ("", "", name)
    if library == "torch":
        return np.dtype(f"V{getattr(importlib.import_module('torch'), local).itemsize}")
    dtype: np.dtype[Any]
    if library == "ml_dtypes":
        dtype = np.dtype(getattr(ml_dtypes, local))
    elif name.startswith("numpy:"):
        dtype = _from_described(ast.literal_eval(name.removeprefix("numpy:")))
    else:
        dtype = np.dtype(name)
    return dtype


def to_host(x: Array) -> np.ndarray:
    """Return the elements of `x` as a numpy array of the same shape and `numpy_dtype(dtype_name(x))`.

    What lies in host memory is not copied, so its strides and its being read-only carry over; device memory is, after
    the current stream's earlier work.
    """
    if type(x) is np.ndarray:
        return x
    kind = kind_of(x)
    if kind == "numpy":
        return np.asarray(x)
    if kind == "cupy":
        return np.asarray(_loaded("cupy").asnumpy(x))
    tensor = x.detach().resolve_conj().resolve_neg()
    return _tensor_to_host(tensor if tensor.device.type == "cpu" else tensor.cpu())


def from_host(array: np.ndarray, kind: str, device: str | None = None, *, dtype: str | None = None) -> Array:
    """Return the elements of a host array as an array of another kind, on `device` ("cpu", "cuda:0", ...).

    numpy and torch on the CPU share the memory of `array`, unless torch cannot: it has neither read-only tensors nor
    negative strides. A device's arrays are copies, ready when this returns.

    :param dtype: the dtype name where the array's own dtype does not tell it (see `to_host`).

    Raises:
        TypeError: that library has no such dtype. ImportError: it is not installed here.
    """
    name = dtype or dtype_name(array)
    if kind == "numpy":
        return array if name.startswith("torch:") else array.view(numpy_dtype(name))
    if kind == "torch":
        tensor = _tensor_from_host(array, _torch_dtype(name))
        return tensor if device in (None, "cpu") else tensor.to(device)
    if kind == "cupy":
        _check_cupy_dtype(name)
        cupy: Any = importlib.import_module("cupy")
        with _cupy_device(cupy, device):
            copy = cupy.asarray(array)
            cupy.cuda.get_current_stream().synchronize()
            return copy
    raise ValueError(f"unknown kind of array {kind!r}; known are {', '.join(KINDS)}")


def empty(kind: str, shape: Sequence[int], dtype: str, device: str | None = None) -> Array:
    """Return a new array of a kind, with elements of any value.

    Raises:
        TypeError: that library has no such dtype. ImportError: it is not installed here.
    """
    if kind == "numpy":
        return np.empty(tuple(shape), numpy_dtype(dtype))
    if kind == "torch":
        return importlib.import_module("torch").empty(tuple(shape), dtype=_torch_dtype(dtype), device=device or "cpu")
    if kind == "cupy":
        _check_cupy_dtype(dtype)
        cupy: Any = importlib.import_module("cupy")
        with _cupy_device(cupy, device):
            return cupy.empty(tuple(shape), numpy_dtype(dtype))
    raise ValueError(f"unknown kind of array {kind!r}; known are {', '.join(KINDS)}")


def from_bytes(data: np.ndarray, shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray:
    """Return the elements that a flat array of bytes holds, in place; also those of a dtype that has none."""
    return data.view(dtype).reshape(shape) if dtype.itemsize else np.empty(shape, dtype)


def shape_of(x: Array) -> tuple[int, ...]:
    """Return the shape as a tuple of ints."""
    return tuple(x.shape)


def device_of(x: Array) -> str:
    """Return the device as torch writes it: "cpu", "cuda:0", ..."""
    kind = kind_of(x)
    if kind == "numpy":
        return "cpu"
    return str(x.device) if kind == "torch" else f"cuda:{x.device.id}"


def is_writable(x: Array) -> bool:
    """Whether each element of `x` may be given a value of its own: not read-only, nor sharing memory as in `expand`."""
    if isinstance(x, np.generic) or (isinstance(x, np.ndarray) and not x.flags.writeable):
        return False
    if type(x) is np.ndarray and x.flags.c_contiguous:
        return True
    strides = x.stride() if kind_of(x) == "torch" else x.strides
    return 0 in x.shape or not any(size > 1 and stride == 0 for size, stride in zip(x.shape, strides, strict=True))


def direct_target(x: Array) -> np.ndarray | None:
    """Return the memory of `x` as a one-dimensional writable host array, or None where it has no such view.

    None for what lies on a device, is read-only, is not C-contiguous or is negated or conjugated lazily: there, receive
    elsewhere and `fill`.
    """
    if type(x) is np.ndarray:  # quickly, as for most
        return x.reshape(-1) if x.flags.c_contiguous and x.flags.writeable else None
    if not is_writable(x) or device_of(x) != "cpu" or _is_lazy(x):
        return None
    host = to_host(x)
    return host.reshape(-1) if host.flags.c_contiguous else None


def fill(x: Array, array: np.ndarray) -> None:
    """Write a host array of as many elements and the same dtype into `x`, which is writable, in C order.

    Where `array` is `direct_target(x)` nothing is copied. Autograd is told that a torch tensor changed, so that a
    backward pass that had saved the old values raises instead of using the new ones.
    """
    array = array.reshape(shape_of(x))
    kind = kind_of(x)
    if kind == "numpy":
        if not same_memory(x, array):
            x[...] = array
    elif kind == "cupy":
        x[...] = from_host(array, "cupy", device_of(x))
    else:
        torch = _loaded("torch")
        target = x.detach()
        source = _tensor_from_host(array, target.dtype)
        if target.data_ptr() != source.data_ptr() or _is_lazy(target):
            target.copy_(source)
        if not x.is_inference():
            torch.autograd.graph.increment_version(x)


def may_overlap(a: Array, b: Array) -> bool:
    """Whether some byte may belong to both. Exact for host arrays but where finding out would take long."""
    if 0 in a.shape or 0 in b.shape:
        return False
    if type(a) is np.ndarray and type(b) is np.ndarray and not np.may_share_memory(a, b):
        return False  # quickly, as for most
    if device_of(a) != device_of(b):
        return False
    if device_of(a) == "cpu" and not _is_lazy(a) and not _is_lazy(b):
        try:
            return bool(np.shares_memory(to_host(a), to_host(b), _OVERLAP_WORK))
        except np.exceptions.TooHardError:
            return True
    (first_a, last_a), (first_b, last_b) = extent(a), extent(b)
    return bool(first_a < last_b and first_b < last_a)


def same_memory(a: Array, b: Array) -> bool:
    """Whether both are the same elements of the same memory in the same order: to write one is to write the other."""
    if shape_of(a) != shape_of(b) or device_of(a) != device_of(b) or dtype_name(a) != dtype_name(b):
        return False
    return _layout(a) == _layout(b)


def row_of(whole: Array, part: Array) -> int | None:
    """Return the row of `whole` from which on its rows are those of `part`, in the same memory; None without one."""
    if not whole.ndim or part.ndim != whole.ndim or not 0 < len(part) <= len(whole):
        return None
    stride = whole.stride(0) * whole.element_size() if kind_of(whole) == "torch" else whole.strides[0]
    start, first = _layout(part)[0], _layout(whole)[0]
    if not isinstance(start, int) or not isinstance(first, int) or not stride:
        return None
    row = (start - first) // stride
    return row if 0 <= row <= len(whole) - len(part) and same_memory(whole[row : row + len(part)], part) else None


def extent(x: Array) -> tuple[int, int]:
    """Return the first byte of an array's memory and the one after its last."""
    if kind_of(x) == "torch":
        start, item = x.data_ptr(), x.element_size()
        strides = [stride * item for stride in x.stride()]
    elif kind_of(x) == "cupy":
        start, item, strides = x.data.ptr, x.itemsize, list(x.strides)
    else:
        host = np.asarray(x)
        start, item, strides = host.ctypes.data, host.itemsize, list(host.strides)
    reach = [stride * (length - 1) for stride, length in zip(strides, shape_of(x), strict=True)]
    return start + sum(r for r in reach if r < 0), start + sum(r for r in reach if r > 0) + item


class Reducers(dict[type, "Callable[[Any], Any]"]):
    """A dispatch table for picklers of protocol 5: copyreg's, and entries for the array libraries that are loaded.

    They pickle numpy arrays and torch tensors in host memory by their bytes, as an out-of-band `pickle.PickleBuffer`,
    and Arrow arrays without the rest of what they are slices of. So are those of subclasses that add attributes alone;
    what says itself how it is pickled goes so, and whatever else there is (tensors on a device, sparse or quantized;
    arrays of objects) as its library pickles it. An array comes back read-only where its buffer is; a tensor copies
    a read-only buffer and shares a writable one.

    :param of_tensors: given how tensors of a class are reduced, returns how they are instead.
    """

    def __init__(self, of_tensors: Callable[[Callable[[Any], Any]], Callable[[Any], Any]] | None = None) -> None:
        super().__init__(copyreg.dispatch_table)
        self._of_tensors = of_tensors

    def __missing__(self, kind: type) -> Callable[[Any], Any]:
        found = _array_pickling.reducer(kind)
        if found is None and _loaded("torch") is not None:
            from collective import _torch_pickling

            found = _torch_pickling.reducer(kind)
            if found is not None and self._of_tensors is not None:
                found = self._of_tensors(found)
        if found is None and _loaded("pyarrow") is not None:
            from collective import _arrow_pickling

            found = _arrow_pickling.reducer(kind)
        if found is None:
            raise KeyError(kind)
        self[kind] = found
        return found


def _loaded(library: str) -> Any:
    """Return an imported library, or None; also None while another thread is still importing it."""
    module: Any = sys.modules.get(library)
    if module is None or getattr(getattr(module, "__spec__", None), "_initializing", False):
        return None
    return module


def _check_plain_tensor(torch: Any, x: Any) -> None:
    if type(x).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        problem = f"a {type(x).__qualname__}, which wraps other tensors; pass its local tensor"
    elif x.layout is not torch.strided:
        problem = f"a tensor of layout {x.layout}; pass x.to_dense(), or its parts"
    elif x.is_quantized:
        problem = "a quantized tensor; pass x.int_repr(), or x.dequantize()"
    elif x.is_nested:
        problem = "a nested tensor; pass its parts, or x.to_padded_tensor(...)"
    elif x.is_meta:
        problem = "a tensor on the meta device, which has no elements"
    elif x.numel() and not x.data_ptr():
        problem = "a tensor without memory: its storage was resized to nothing"
    else:
        return
    raise TypeError(f"{ACCEPTED} are accepted, not {problem}")


def _tensor_to_host(tensor: Any) -> np.ndarray:
    name = dtype_name(tensor)
    if name in _NUMPY_DTYPES:
        return np.asarray(tensor.numpy())
    carrier = getattr(_loaded("torch"), _TORCH_CARRIERS[tensor.dtype.itemsize])
    return np.asarray(tensor.view(carrier).numpy()).view(numpy_dtype(name))


def _tensor_from_host(array: np.ndarray, dtype: Any) -> Any:
    torch: Any = importlib.import_module("torch")
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    if _NUMPY_DTYPES.get(str(dtype).removeprefix("torch.")) == array.dtype:
        return torch.from_numpy(array)
    carrier = np.dtype(_TORCH_CARRIERS[array.dtype.itemsize])
    return torch.from_numpy(array.view(carrier)).view(dtype)


def _torch_dtype(name: str) -> Any:
    torch: Any = importlib.import_module("torch")
    dtype = getattr(torch, name.removeprefix("torch:"), None)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"torch has no dtype {name!r}; pass out=np.empty(...) to receive it as a numpy array")
    return dtype


def _check_cupy_dtype(name: str) -> None:
    if name not in _NUMPY_DTYPES:
        raise TypeError(f"cupy has no dtype {name!r}; pass out=torch.empty(...) to receive it as a torch tensor")


def _cupy_device(cupy: Any, device: str | None) -> Any:
    index = (device or "cuda").partition(":")[2]
    return cupy.cuda.Device(int(index)) if index else cupy.cuda.Device()


def _is_lazy(x: Array) -> bool:
    """Whether torch conjugates or negates the elements only when they are read."""
    return kind_of(x) == "torch" and bool(x.is_conj() or x.is_neg())


def _layout(x: Array) -> tuple[object, ...]:
    """Return where the elements lie, by the strides in bytes of the dimensions that have more than one element."""
    if isinstance(x, np.generic):
        return (object(),)  # its elements lie where no array can
    kind = kind_of(x)
    if kind == "torch":
        size = x.element_size()
        strides = tuple(stride * size for stride in x.stride())
        start, lazy = x.data_ptr(), (x.is_conj(), x.is_neg())
    else:
        strides, lazy = x.strides, (False, False)
        start = x.data.ptr if kind == "cupy" else x.ctypes.data
    return start, lazy, tuple(stride for stride, length in zip(strides, shape_of(x), strict=True) if length > 1)
