"""Arrays of every dtype of plain bytes, wherever their fields and elements lie, through all that moves them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest

from collective import tensors
from collective.testing import world

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


def structured() -> Any:
    array = np.zeros(6, [("a", "i4"), ("b", "f8"), ("c", "S3"), ("d", "f4", (2,))])
    array["a"], array["b"], array["c"] = range(6), np.arange(6) / 3, b"xyz"
    array["d"] = np.arange(12).reshape(6, 2)
    return array


def overlapping() -> Any:
    array = np.zeros(3, np.dtype({"names": ["low", "all"], "formats": ["u1", "u4"], "offsets": [0, 0]}))
    array["all"] = [1, 300, 70_000]
    return array


ARRAYS: dict[str, Callable[[], Any]] = {
    "packed": structured,
    "aligned": lambda: np.ones(6, np.dtype([("a", "i1"), ("b", "f8")], align=True)),
    "chosen fields": lambda: structured()[["a", "c"]],
    "fields in another order": lambda: structured()[["d", "a"]],
    "overlapping fields": overlapping,
    "fields within fields": lambda: np.ones(3, [("in", [("x", ">i2"), ("y", "M8[25s]")]), ("z", "V3")]),
    "a field of bfloat16": lambda: np.ones(4, [("h", ml_dtypes.bfloat16), ("i", "i8")]),
    "fields of no bytes": lambda: np.ones(3, [("none", "V0"), ("one", "i2")]),
    "titles": lambda: np.ones(3, [(("Title", "a"), "i4")]),
    "a name with quotes": lambda: np.ones(3, [("it's \"it\"", "i4")]),
    "strided": lambda: structured()[::-2],
    "recarray": lambda: structured().view(np.recarray),
    "big-endian": lambda: np.arange(6, dtype=">f8"),
    "datetime64": lambda: np.arange(6).astype("M8[25s]"),
    "text": lambda: np.array(["ab", "c"]),
    "one element with a stride": lambda: np.ones((1, 2))[:, 0],
    "zero strides": lambda: np.broadcast_to(np.arange(4), (3, 4)),
    "void of no bytes": lambda: np.zeros(3, "V0"),
    "no fields": lambda: np.zeros((3, 2), []),
}


@pytest.mark.parametrize("backend", ["memory", "shm", "gloo"])
def test_arrays_of_any_dtype_of_plain_bytes_are_moved(backend: str) -> None:
    async def main() -> None:
        async with world(backend, 2, roles={"p": 1, "c": 1}) as opened, asyncio.timeout(60):
            first, second = groups = opened.groups
            for name, make in ARRAYS.items():
                array = make()
                moves: dict[str, list[Awaitable[Any]]] = {
                    "send": [second.recv(0), first.send(array, 1)],
                    "broadcast": [second.broadcast(None, 0), first.broadcast(array, 0)],
                    "scatter": [second.scatter(None, 0), first.scatter([array, array], 0)],
                    "alltoall": [group.alltoall([array, array]) for group in groups],
                    "gather": [group.gather(array, 0) for group in groups],
                    "allgather": [group.allgather(array) for group in groups],
                }
                for move, works in moves.items():
                    got: Any = (await asyncio.gather(*works))[0]
                    parts = np.split(got, 2) if move == "allgather" else got if isinstance(got, list) else [got]
                    for part in parts:
                        assert part.dtype == array.dtype, (name, move)
                        assert part.shape == array.shape, (name, move)
                        assert repr(part.tolist()) == repr(array.tolist()), (name, move)

    asyncio.run(main())


@pytest.mark.parametrize("name", ARRAYS)
def test_a_dtype_s_name_says_all_of_it(name: str) -> None:
    dtype = ARRAYS[name]().dtype
    there = tensors.numpy_dtype(tensors.dtype_name(np.empty(0, dtype)))
    assert there == dtype
    assert there.itemsize == dtype.itemsize
    assert there.fields == dtype.fields


def test_a_tensor_whose_storage_was_freed_is_refused() -> None:
    """Not read, which would end the process."""
    torch = pytest.importorskip("torch")
    freed = torch.ones(10)
    freed.untyped_storage().resize_(0)
    with pytest.raises(TypeError, match="without memory"):
        tensors.kind_of(freed)
