"""Arrays, tensors and tables of every kind in calls: what arrives is equal, and travels beside the pickle, alone."""

from __future__ import annotations

import pickle
import warnings
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from actor_harness import run, team

from actors import Actor
from actors._pickling import dumps, loads

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

N = 3_000
HEADER = 1500
"""More than a pickle has that holds no elements."""


class Echo(Actor):
    async def echo(self, value: Any) -> Any:
        return value


class Described(np.ndarray):
    """A subclass that says itself how it is pickled."""

    note = ""

    def __reduce__(self) -> Any:
        rebuild, arguments, state = super().__reduce__()  # type: ignore[misc]
        return rebuild, arguments, (state, self.note)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state[0])  # type: ignore[misc]
        self.note = state[1]


class Plain(np.ndarray):
    """A subclass that adds nothing."""


def travel(value: object) -> tuple[Any, int, int]:
    """Return what arrives, and the bytes in the pickle and beside it."""
    data, beside = dumps(value, "it")
    there = loads(data, [memoryview(bytearray(buffer)) for buffer in beside], "it")
    return there, len(data), sum(map(len, beside))


def line() -> Any:
    return np.arange(N, dtype=np.float64)


def structured() -> Any:
    array = np.zeros(N, np.dtype([("a", "i1"), ("b", "f8"), ("s", "S3"), ("d", "f4", (2, 2))], align=True))
    array["a"], array["b"], array["s"] = np.arange(N) % 100, line(), b"xyz"
    return array


ARRAYS: dict[str, Callable[[], Any]] = {
    "negative strides": lambda: line().reshape(100, -1)[::-1, ::-2],
    "zero strides": lambda: np.broadcast_to(line(), (3, N)),
    "overlapping": lambda: np.lib.stride_tricks.sliding_window_view(line()[:500], 10),
    "one element with a stride": lambda: np.ones((1, 2))[:, 0],
    "F order": lambda: np.asfortranarray(line().reshape(100, -1)),
    "axes in another order": lambda: line().reshape(10, 10, -1).transpose(2, 0, 1),
    "no dimensions": lambda: np.array(5.0),
    "no elements": lambda: np.zeros((5, 0, 3), np.int16).T,
    "datetime64": lambda: np.arange(N).astype("M8[25s]"),
    "timedelta64, F order": lambda: np.arange(N).astype("m8[ns]").reshape(100, -1).T,
    "datetime64 without dimensions": lambda: np.array("NaT", "M8[us]"),
    "structured": structured,
    "chosen fields": lambda: structured()[["a", "d"]],
    "fields in another order": lambda: structured()[["d", "a"]],
    "a field": lambda: structured()["b"],
    "titles": lambda: np.zeros(N, [(("Title", "a"), "i4")]),
    "big-endian": lambda: line().astype(">f8"),
    "text": lambda: np.array(["ab", "c"] * N),
    "bytes": lambda: np.array([b"ab", b"c"] * N),
    "void": lambda: np.zeros(N, "V5"),
    "void of no bytes": lambda: np.zeros(5, "V0"),
    "no fields": lambda: np.zeros(5, []),
    "bool view": lambda: (np.arange(N, dtype=np.uint8) % 2).view(bool),
    "bfloat16": lambda: line().astype(ml_dtypes.bfloat16),
    "float8, F order": lambda: (line() % 10).astype(ml_dtypes.float8_e4m3fn).reshape(100, -1).T,
    "int4": lambda: (line() % 7).astype(ml_dtypes.int4),
    "longdouble": lambda: line().astype(np.longdouble),
    "read-only": lambda: np.frombuffer(line().tobytes()),
    "matrix": lambda: line().reshape(100, -1).view(np.matrix),
    "recarray": lambda: structured().view(np.recarray),
    "recarray, transposed": lambda: np.rec.fromarrays([line(), line()], names="x,y").reshape(100, -1).T,
    "chararray": lambda: np.char.array(["abc"] * N),
    "subclass": lambda: line().view(Plain),
    "masked": lambda: np.ma.masked_array(line(), mask=line() % 2 == 0, fill_value=7),
    "masked, transposed": lambda: np.ma.masked_array(line(), mask=line() % 2 == 0).reshape(100, -1).T,
    "masked nowhere": lambda: np.ma.masked_array(line()),
    "masked, structured": lambda: np.ma.masked_array(structured()),
}
IN_BAND: dict[str, Callable[[], Any]] = {
    "objects": lambda: np.array([line(), {"x": 1}, None], object),
    "fields of objects": lambda: np.array([(1, "x")], [("i", "i4"), ("o", "O")]),
    "strings of any length": lambda: np.array(["a", "bcd" * 20], np.dtypes.StringDType()),
    "subclass that pickles itself": lambda: line().view(Described),
}


def same(one: Any, other: Any) -> bool:
    assert type(one) is type(other)
    assert repr(one.dtype) == repr(other.dtype)
    assert one.shape == other.shape
    if isinstance(one, np.ma.MaskedArray):
        assert np.array_equal(np.ma.getmaskarray(one), np.ma.getmaskarray(other))
        assert repr(one.fill_value) == repr(other.fill_value)
    return repr(np.asarray(one).tolist()) == repr(np.asarray(other).tolist())


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_travel_beside_the_pickle_and_arrive_read_only(name: str) -> None:
    """Whatever their strides, dtype or class."""
    array = ARRAYS[name]()
    there, inside, beside = travel({"nested": [array]})
    assert same(array, there["nested"][0])
    assert inside < HEADER
    masked = isinstance(array, np.ma.MaskedArray)
    extra = np.ma.getmask(array).nbytes + array.itemsize if masked else 0  # the mask and the fill value
    assert array.nbytes <= beside <= array.nbytes + extra
    assert not there["nested"][0].flags.writeable or not array.nbytes


@pytest.mark.parametrize("name", IN_BAND)
def test_arrays_that_are_no_plain_bytes_go_as_pickle_has_them(name: str) -> None:
    array = IN_BAND[name]()
    there, _, _ = travel(array)
    assert repr(there.tolist()) == repr(array.tolist())


def test_what_a_subclass_of_arrays_keeps_beside_its_elements_arrives() -> None:
    array = line().view(Described)
    array.note = "kept"
    assert travel(array)[0].note == "kept"


def test_a_memory_map_carries_what_is_looked_at(tmp_path: Path) -> None:
    array: Any = np.memmap(tmp_path / "it", np.float32, "w+", shape=(300, 300))
    array[:] = 3
    part = array[10:20]
    there, inside, beside = travel(part)
    assert same(part, there)
    assert inside < HEADER
    assert beside == part.nbytes


def test_an_array_that_is_there_twice_arrives_once() -> None:
    """The same object does; two views of one memory arrive apart."""
    array = line().view(Plain)
    there, _, beside = travel([array, {"again": array}, array[:10]])
    assert there[0] is there[1]["again"]
    assert not np.shares_memory(there[0], there[2])
    assert beside == array.nbytes + array[:10].nbytes


def test_tensors_of_any_kind_travel_by_their_elements() -> None:
    """Of a view only its own, beside the pickle; with what they have as attributes, and as their class."""
    torch = pytest.importorskip("torch")

    class Tagged(torch.Tensor):  # type: ignore[misc, name-defined]
        pass

    base = torch.arange(float(N))
    tensors = {
        "one row, one column": torch.ones(1, 2)[:, 0],
        "imaginary part": torch.tensor([1 + 2j]).imag,
        "diagonal": torch.ones(1, 3).diagonal(),
        "view": base[5:10],
        "column": base.reshape(10, -1)[:, 3],
        "expanded": base[:1].expand(5, 3),
        "flipped": base.flip(0),
        "windows": base[:100].unfold(0, 10, 3),
        "negated": torch.tensor([1 + 2j, 3 + 1j]).conj().imag,
        "conjugated": torch.ones(3, 4, dtype=torch.complex64).mH,
        "no dimensions": torch.tensor(3.0),
        "no elements": torch.empty(0, 3),
        "channels last": torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "needs a gradient": torch.ones(3, requires_grad=True),
        "no leaf": torch.ones(3, requires_grad=True) * 2,
        "parameter": torch.nn.Parameter(torch.ones(1, 2)[:, 0]),
        "parameter of a view": torch.nn.Parameter(base[5:8]),
        "buffer": torch.nn.Buffer(base[:3], persistent=False),
        "subclass": base[:5].as_subclass(Tagged),
        "in shared memory": base[:100].clone().share_memory_(),
        "bfloat16, transposed": base.to(torch.bfloat16).reshape(10, -1).T,
        "float8": base.to(torch.float8_e5m2).reshape(10, -1)[:1, 1],
        "uint16": torch.arange(9).to(torch.uint16)[::2],
        "bool": (base > 3)[::2],
    }
    for name in ("view", "parameter of a view", "subclass"):
        tensors[name].tag = {"of": name}
    for name, tensor in tensors.items():
        there, inside, beside = travel(tensor)
        assert type(there).__name__ == type(tensor).__name__, name
        assert there.requires_grad == tensor.requires_grad, name
        assert there.dtype == tensor.dtype, name
        assert torch.equal(there.as_subclass(torch.Tensor), tensor.as_subclass(torch.Tensor)), name
        assert there.__dict__ == tensor.__dict__, name
        assert beside == tensor.numel() * tensor.itemsize, name
        assert inside < HEADER or isinstance(tensor, Tagged), name  # its class is a local one


def test_tensors_that_only_torch_can_pickle_go_as_it_does() -> None:
    torch = pytest.importorskip("torch")
    base = torch.arange(float(N))
    sparse = torch.eye(300).to_sparse()
    assert torch.equal(travel(sparse)[0].to_dense(), sparse.to_dense())
    assert travel(torch.empty(3, 4, device="meta"))[0].is_meta
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about what it does itself
        nested = torch.nested.nested_tensor([base[:3], base[:5]])
        assert torch.equal(travel(nested)[0].to_padded_tensor(0), nested.to_padded_tensor(0))
        quantized = torch.quantize_per_tensor(base, 0.1, 0, torch.qint8)[3:9]
        there, inside, beside = travel(quantized)
    assert torch.equal(there.int_repr(), quantized.int_repr())
    assert inside + beside < HEADER
    freed = torch.ones(10)
    freed.untyped_storage().resize_(0)
    with pytest.raises(Exception, match="its storage was resized to nothing"):
        dumps(freed, "it")


def tables() -> dict[str, Any]:
    arrow: Any = pytest.importorskip("pyarrow")
    text = arrow.array(["a text that is not short", None, "b"] * 2000)
    count = len(text)
    kinds = arrow.array([0, 1] * (count // 2), arrow.int8())
    half = arrow.array(range(count // 2)), arrow.array(["u"] * (count // 2))
    union = arrow.UnionArray.from_dense(kinds, arrow.array([i // 2 for i in range(count)], arrow.int32()), list(half))
    return {
        "numbers": arrow.array(np.arange(count)),
        "bools": arrow.array([True, None] * (count // 2)),
        "text": text,
        "views": text.cast(arrow.string_view()),
        "lists": arrow.array([[1, 2, None]] * count),
        "list views": arrow.array([[1, 2, None]] * count, arrow.list_view(arrow.int64())),
        "lists of views": arrow.array([["long enough to lie elsewhere"]] * count, arrow.list_(arrow.string_view())),
        "structs": arrow.array([{"a": 1, "b": "x"}] * count),
        "maps": arrow.array([[("a", 1)]] * count, arrow.map_(arrow.string(), arrow.int32())),
        "dictionary": text.dictionary_encode(),
        "sparse union": arrow.UnionArray.from_sparse(kinds, [arrow.array(range(count)), text]),
        "dense union": union,
        "decimals": arrow.array([1] * count, arrow.decimal128(10)),
        "nulls": arrow.nulls(count),
    }


def test_slices_of_tables_carry_no_more_than_they_are() -> None:
    """So do those of arrays, chunked arrays and record batches; what is no slice is not copied."""
    arrow: Any = pytest.importorskip("pyarrow")
    for name, array in tables().items():
        part = array.slice(7, 10)
        there, inside, beside = travel(part)
        assert there.equals(part), name
        assert there.type == part.type, name
        assert inside + beside < 1500, name
        empty, inside, beside = travel(array.slice(5, 0))
        assert len(empty) == 0, name
        assert inside + beside < 1000, name
        _, _, beside = travel(array.slice(0, len(array) // 2))
        assert beside <= array.get_total_buffer_size() * 0.6 + 1100, name
        whole = dumps(array, "it")[1]
        plain: list[Any] = []
        pickle.dumps(array, 5, buffer_callback=plain.append)
        addresses = [np.frombuffer(each, np.uint8).ctypes.data for each in plain if each.raw().nbytes]
        assert [np.frombuffer(each, np.uint8).ctypes.data for each in whole if len(each)] == addresses, name
    table = arrow.table(tables()).replace_schema_metadata({"key": "value"})
    chunked = arrow.concat_tables([table, table]).slice(len(table) - 3, 6)
    for part in (table.slice(7, 10), chunked, chunked["text"], table.to_batches()[0].slice(7, 10)):
        there, inside, beside = travel({"rows": part})
        assert there["rows"].equals(part)
        if part is not chunked["text"]:
            assert getattr(there["rows"], "schema", None) == getattr(part, "schema", None)
        assert inside + beside < 40_000


def test_they_arrive_through_calls(kind: str) -> None:
    async def main() -> None:
        async with team(kind, Echo) as actors:
            for array in (make() for make in ARRAYS.values()):
                assert same(array, await actors[0].echo(array))
            for array in tables().values():
                assert (await actors[0].echo(array.slice(3, 2000))).equals(array.slice(3, 2000))

    run(kind, main())
