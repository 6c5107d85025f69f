"""The array adapters: numpy and torch in, host memory, and back."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from collective import tensors

NUMPY_DTYPES = [
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "float32", "float64", "complex64", "complex128",
]  # fmt: skip
TORCH_DTYPES = [*NUMPY_DTYPES, "bfloat16", "float8_e4m3fn", "float8_e5m2"]


def torch_of(dtype: str, *shape: int) -> torch.Tensor:
    """Return a tensor with different bytes everywhere."""
    kind = getattr(torch, dtype)
    if 0 in shape:
        return torch.empty(shape, dtype=kind)
    count = int(np.prod(shape)) * kind.itemsize
    content = torch.arange(count, dtype=torch.int64).remainder(2 if dtype == "bool" else 97).to(torch.uint8)
    return content.view(kind).reshape(shape)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    def content(tensor: torch.Tensor) -> bytes:
        plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
        return plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""

    return a.dtype == b.dtype and a.shape == b.shape and content(a) == content(b)


def test_kinds() -> None:
    for array in (np.zeros(2), np.float32(1), np.array(1), np.array([True]), np.zeros((0, 2))):
        assert tensors.kind_of(array) == "numpy"
    for tensor in (torch.zeros(2), torch.tensor(1), torch.nn.Parameter(torch.zeros(1)), torch.zeros(0)):
        assert tensors.kind_of(tensor) == "torch"


@pytest.mark.parametrize("value", [1, 1.5, True, [1, 2], (1,), range(3)])
def test_python_values_are_refused_with_advice(value: object) -> None:
    with pytest.raises(TypeError, match=rf"{type(value).__name__} is no array.*np\.asarray"):
        tensors.kind_of(value)


@pytest.mark.parametrize("value", [None, "text", object(), b"bytes"])
def test_what_is_no_array_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="numpy arrays, strided torch tensors and cupy arrays are accepted"):
        tensors.kind_of(value)


@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (lambda: np.ma.masked_array([1, 2], [True, False]), "mask"),
        (lambda: torch.eye(2).to_sparse(), "to_dense"),
        (lambda: torch.zeros(2, device="meta"), "meta device"),
    ],
)
def test_arrays_without_plain_elements_are_refused(make: Any, advice: str) -> None:
    with pytest.raises(TypeError, match=advice):
        tensors.kind_of(make())


def test_numpy_alone_imports_neither_torch_nor_cupy() -> None:
    script = """
import sys
import numpy as np
from collective import tensors
x = np.arange(6.0).reshape(2, 3)
name = tensors.dtype_name(x)
assert tensors.kind_of(x) == "numpy" and tensors.device_of(x) == "cpu" and tensors.is_writable(x)
tensors.fill(x, tensors.to_host(tensors.from_host(x.copy(), "numpy", "cpu", dtype=name)))
assert tensors.empty("numpy", (2,), name).shape == (2,)
assert tensors.may_overlap(x, x[0]) and not tensors.same_memory(x, x[0]) and type not in tensors.Reducers()
try:
    tensors.kind_of([1])
except TypeError:
    pass
assert tensors.loaded("numpy") and not tensors.loaded("torch")
assert "torch" not in sys.modules and "cupy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 4), (2, 0, 3)])
def test_torch_and_numpy_share_names_and_memory(dtype: str, shape: tuple[int, ...]) -> None:
    tensor = torch_of(dtype, *shape)
    host = tensors.to_host(tensor)
    assert tensors.dtype_name(tensor) == tensors.dtype_name(host) == dtype
    assert host.dtype == tensors.numpy_dtype(dtype)
    assert host.shape == shape
    back = tensors.from_host(host, "torch")
    assert same_bytes(back, tensor)
    if tensor.numel():
        assert host.ctypes.data == tensor.data_ptr() == back.data_ptr()
    assert tensors.from_host(host, "numpy", dtype=dtype).dtype == host.dtype


@pytest.mark.parametrize(
    "dtype",
    [
        "<M8[s]", ">f4", "|S3", "<U2", "|V5", [("a", "<i4"), ("b", ">f8", (2,))],
        np.dtype({"names": ["x"], "formats": ["<i2"], "offsets": [4], "itemsize": 8}),
        ml_dtypes.int4, ml_dtypes.float8_e3m4, ml_dtypes.bfloat16,
    ],
    ids=str,
)  # fmt: skip
def test_other_numpy_dtypes_are_rebuilt_from_their_names(dtype: Any) -> None:
    array = np.zeros((2, 3), dtype)
    name = tensors.dtype_name(array)
    assert tensors.numpy_dtype(name) == array.dtype
    assert tensors.empty("numpy", (4,), name).dtype == array.dtype
    assert tensors.to_host(array) is array
    content = np.zeros(array.nbytes, np.uint8).view(tensors.numpy_dtype(name)).reshape(2, 3)
    assert tensors.from_host(content, "numpy", dtype=name).dtype == array.dtype


def test_references_to_objects_are_refused() -> None:
    for array in (np.array([{}]), np.zeros(1, [("a", "O")])):
        with pytest.raises(TypeError, match="objects"):
            tensors.dtype_name(array)


def test_dtypes_of_torch_alone_travel_as_bytes() -> None:
    tensor = torch_of("uint8", 6).view(torch.bits8)
    name = tensors.dtype_name(tensor)
    host = tensors.to_host(tensor)
    assert name == "torch:bits8"
    assert host.dtype == tensors.numpy_dtype(name)
    back = tensors.from_host(host.copy(), "torch", dtype=name)
    assert back.dtype == torch.bits8
    assert torch.equal(back.view(torch.uint8), tensor.view(torch.uint8))
    assert tensors.empty("torch", (2,), name).dtype == torch.bits8


def test_dtypes_that_a_library_lacks_are_named() -> None:
    with pytest.raises(TypeError, match=r"torch has no dtype '<M8\[s\]'"):
        tensors.from_host(np.zeros(2, "M8[s]"), "torch")
    with pytest.raises(TypeError, match="torch has no dtype '>f4'"):
        tensors.empty("torch", (2,), ">f4")
    with pytest.raises(ValueError, match="unknown kind of array 'jax'"):
        tensors.from_host(np.zeros(2), "jax")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_non_contiguous_tensors_keep_their_strides(dtype: str) -> None:
    tensor = torch_of(dtype, 3, 4).t()
    host = tensors.to_host(tensor)
    assert host.shape == (4, 3)
    assert not host.flags.c_contiguous
    assert same_bytes(tensors.from_host(np.ascontiguousarray(host), "torch"), tensor)


def test_lazy_bits_are_resolved() -> None:
    tensor = torch.tensor([1 + 2j, 3 - 4j])
    assert tensors.to_host(tensor.conj()).tolist() == [1 - 2j, 3 + 4j]
    assert tensors.to_host(tensor.conj().imag).tolist() == [-2, 4]
    assert tensors.direct_target(tensor.conj()) is None
    tensors.fill(tensor.conj(), np.array([5 + 6j, 7j], np.complex64))
    assert tensor.tolist() == [5 - 6j, -7j]


def test_gradients_are_left_behind() -> None:
    tensor = torch.ones(2, requires_grad=True)
    assert tensors.to_host(tensor * 2).tolist() == [2, 2]


@pytest.mark.parametrize("make", [lambda a: a[::-1], lambda a: np.frombuffer(a.tobytes(), a.dtype)])
def test_what_torch_cannot_view_is_copied(make: Any) -> None:
    array = make(np.arange(4.0))
    tensor = tensors.from_host(array, "torch")
    assert tensor.tolist() == array.tolist()
    tensor[0] = 9
    assert array[0] != 9


def test_writable() -> None:
    frozen = np.zeros(2)
    frozen.setflags(write=False)
    assert tensors.is_writable(np.zeros(2))
    assert tensors.is_writable(torch.zeros(2))
    assert not tensors.is_writable(frozen)
    assert not tensors.is_writable(np.float64(1))
    assert not tensors.is_writable(torch.zeros(1).expand(3))
    assert tensors.is_writable(torch.zeros(1, 3).expand(1, 3))


@pytest.mark.parametrize(
    "make",
    [
        lambda: np.zeros((2, 3)),
        lambda: np.zeros((3, 2)).T,
        lambda: np.zeros((4, 6))[::2, ::2],
        lambda: torch.zeros(2, 3, dtype=torch.float64),
        lambda: torch.zeros(3, 2, dtype=torch.float64).t(),
        lambda: torch.zeros(2, 3, dtype=torch.float64, requires_grad=True),
    ],
)
def test_fill(make: Any) -> None:
    out, values = make(), np.arange(6.0)
    direct = tensors.direct_target(out)
    if direct is not None:
        direct[:] = values
        tensors.fill(out, direct)
    else:
        tensors.fill(out, values)
    assert np.asarray(out.detach() if isinstance(out, torch.Tensor) else out).tolist() == values.reshape(2, 3).tolist()
    assert (direct is not None) == tensors.to_host(out).flags.c_contiguous


def test_scalars_can_be_filled() -> None:
    for out in (np.zeros(()), torch.zeros((), dtype=torch.float64)):
        tensors.fill(out, np.array([3.0]))
        assert float(out) == 3.0
        direct = tensors.direct_target(out)
        assert direct is not None
        assert direct.shape == (1,)


def test_autograd_notices_a_fill() -> None:
    weights = torch.ones(2, requires_grad=True)
    loss = (weights * weights).sum()
    direct = tensors.direct_target(weights)
    assert direct is not None
    direct[:] = 5
    tensors.fill(weights, direct)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_overlap() -> None:
    base = np.zeros(10)
    view = torch.from_numpy(base)
    assert tensors.may_overlap(base[:6], base[5:])
    assert not tensors.may_overlap(base[:5], base[5:])
    assert not tensors.may_overlap(base[::2], base[1::2])
    assert tensors.may_overlap(view[:6], base[5:])
    assert not tensors.may_overlap(view[:5], view[5:])
    assert not tensors.may_overlap(base[:0], base)
    assert tensors.same_memory(base, base[:])
    assert tensors.same_memory(view, view.detach())
    assert tensors.same_memory(view, base)
    assert not tensors.same_memory(base[:5], base[5:])
    assert not tensors.same_memory(base.reshape(2, 5), base)
    assert not tensors.same_memory(base, base[::-1])
    assert not tensors.same_memory(base, base.view(np.int64))
    complexes = torch.zeros(3, dtype=torch.complex64)
    assert tensors.may_overlap(complexes.conj(), complexes)
    assert not tensors.same_memory(complexes.conj(), complexes)


# Pickling


def dump(value: object) -> tuple[bytes, list[pickle.PickleBuffer]]:
    buffers: list[pickle.PickleBuffer] = []
    out = io.BytesIO()
    pickler = pickle.Pickler(out, protocol=5, buffer_callback=buffers.append)
    pickler.dispatch_table = tensors.Reducers()
    pickler.dump(value)
    return out.getvalue(), buffers


def through_pickle(value: Any, *, writable: bool = True) -> Any:
    stream, buffers = dump(value)
    kind = bytearray if writable else bytes
    return pickle.loads(stream, buffers=[kind(buffer.raw()) for buffer in buffers])


@pytest.mark.parametrize("dtype", [*TORCH_DTYPES, "bits8"])
@pytest.mark.parametrize("writable", [True, False])
def test_pickled_tensors_come_back(dtype: str, writable: bool) -> None:
    for shape in ((), (0,), (5,), (3, 4)):
        tensor = torch_of(dtype, *shape)
        assert same_bytes(through_pickle(tensor, writable=writable), tensor)
    transposed = torch_of(dtype, 3, 4).t()
    assert same_bytes(through_pickle(transposed, writable=writable), transposed)


def test_pickled_bytes_travel_beside_the_stream() -> None:
    tensor = torch.zeros(1 << 20)
    stream, buffers = dump({"weights": tensor, "again": tensor})
    assert len(stream) < 1000
    (buffer,) = buffers
    assert buffer.raw().nbytes == tensor.nbytes
    assert np.frombuffer(buffer, np.uint8).ctypes.data == tensor.data_ptr()
    loaded = pickle.loads(stream, buffers=[memoryview(bytearray(buffer.raw()))])
    assert loaded["weights"] is loaded["again"]


def test_writable_buffers_are_shared_and_read_only_ones_copied() -> None:
    stream, _ = dump(torch.ones(4))
    memory = bytearray(np.full(4, 2, np.float32))
    shared = pickle.loads(stream, buffers=[memory])
    shared[0] = 7
    assert np.frombuffer(memory, np.float32)[0] == 7
    frozen = bytes(memory)
    private = pickle.loads(stream, buffers=[frozen])
    private[0] = 9
    assert np.frombuffer(frozen, np.float32)[0] == 7


def test_misaligned_buffers_are_copied() -> None:
    stream, _ = dump(torch.ones(4))
    memory = memoryview(bytearray(17))[1:]
    assert pickle.loads(stream, buffers=[memory]).data_ptr() % 4 == 0


def test_pickling_without_out_of_band_buffers() -> None:
    out = io.BytesIO()
    pickler = pickle.Pickler(out, protocol=5)
    pickler.dispatch_table = tensors.Reducers()
    pickler.dump(torch.arange(5))
    loaded = pickle.loads(out.getvalue())
    loaded += 1
    assert loaded.tolist() == [1, 2, 3, 4, 5]


def test_gradients_and_parameters_survive_pickling() -> None:
    assert through_pickle(torch.ones(2, requires_grad=True)).requires_grad
    assert not through_pickle(torch.ones(2)).requires_grad
    parameter = through_pickle(torch.nn.Parameter(torch.ones(2), requires_grad=False))
    assert type(parameter) is torch.nn.Parameter
    assert not parameter.requires_grad
    module = torch.nn.Linear(3, 2)
    loaded = through_pickle(module)
    assert torch.equal(loaded.weight, module.weight)
    assert loaded.weight.requires_grad


def test_lazily_conjugated_tensors_are_pickled_by_value() -> None:
    tensor = torch.tensor([1 + 2j]).conj()
    assert through_pickle(tensor).tolist() == [1 - 2j]


def test_other_tensors_are_left_to_torch() -> None:
    sparse = torch.eye(3).to_sparse()
    assert torch.equal(through_pickle(sparse).to_dense(), torch.eye(3))
    tagged = torch.ones(2)
    tagged.tag = "kept"  # type: ignore[attr-defined]
    loaded = through_pickle(tagged)
    assert loaded.tag == "kept"
    assert loaded.tolist() == [1, 1]
