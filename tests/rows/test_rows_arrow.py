"""Arrow rows of every type arrive as they were put, or are refused at the put by an error that names the column."""

from __future__ import annotations

import asyncio
import datetime
import decimal
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collective import RowStream
from collective.testing import world

pa = pytest.importorskip("pyarrow", reason="pyarrow is optional")
pc = pytest.importorskip("pyarrow.compute", reason="pyarrow is optional")


class Unit(pa.ExtensionType):
    """An extension type with a parameter."""

    def __init__(self, unit: str = "m") -> None:
        self.unit = unit
        super().__init__(pa.float64(), "gangline.test.unit")

    def __arrow_ext_serialize__(self) -> bytes:
        return self.unit.encode()

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: Any, serialized: bytes) -> Unit:
        return cls(serialized.decode())


@pytest.fixture(autouse=True)
def extension():
    pa.register_extension_type(Unit())
    yield
    pa.unregister_extension_type("gangline.test.unit")


def stream(blocks: list[list[Any]], batch_size: int, **terms: Any) -> list[Any]:
    """Put each reader's blocks; return what each reader raised, and the trainer's batches or what it raised."""
    readers = len(blocks)

    async def main() -> list[Any]:
        async with world("memory", readers + 1, roles={"reader": readers, "trainer": 1}) as opened, asyncio.timeout(30):

            async def act(rank: int) -> Any:
                try:
                    async with RowStream(
                        opened.groups[rank], producers="reader", consumers="trainer", batch_size=batch_size, **terms
                    ) as rows:
                        if rank == readers:
                            return [batch.rows async for batch in rows]
                        for block in blocks[rank]:
                            await rows.put(block)
                except Exception as error:
                    return error

            return await asyncio.gather(*map(act, range(readers + 1)))

    return asyncio.run(main())


def whole(table: Any) -> Any:
    """Send a table as one block and get it as one batch."""
    *readers, got = stream([[table]], table.num_rows)
    assert readers == [None], readers
    assert len(got) == 1, got
    got[0].validate(full=True)
    return pa.Table.from_batches(got)


def rows_of(batches: list[Any]) -> list[Any]:
    assert isinstance(batches, list), batches
    for batch in batches:
        batch.validate(full=True)
    return [row for batch in batches for row in batch.to_pylist()]


def dictionary(values: Any, indices: Any, index: Any = None, *, ordered: bool = False) -> Any:
    return pa.DictionaryArray.from_arrays(pa.array(indices, index or pa.int32()), values, ordered=ordered)


WORDS = ["a" * 20, None, "", "b" * 30]
ENDS = [0, 1, 1, 3, 4]
ARRAYS = {
    "null": pa.nulls(4),
    "bool": pa.array([True, None, False, True]),
    "decimal": pa.array([decimal.Decimal("1.20"), None] * 2, pa.decimal128(9, 2)),
    "decimal256": pa.array([decimal.Decimal("1.20"), None] * 2, pa.decimal256(60, 2)),
    "zoned": pa.array([datetime.datetime(2020, 1, 1), None] * 2, pa.timestamp("us", "Europe/Berlin")),
    "duration": pa.array([datetime.timedelta(1), None] * 2),
    "interval": pa.array([pa.MonthDayNano([1, 2, 3]), None] * 2),
    "nan": pa.array([float("nan"), None, 1.0, -0.0]),
    "large_string": pa.array(WORDS, pa.large_string()),
    "fixed_binary": pa.array([b"aa", None] * 2, pa.binary(2)),
    "string_view": pa.array(WORDS, pa.string_view()),
    "binary_view": pa.array([b"\xff" * 40, None, b"", b"x"], pa.binary_view()),
    "list": pa.array([[1], None, [], [2, None]], pa.list_(pa.field("element", pa.int8()))),
    "lists not null": pa.array([[[1]], [], [[]], [[2], [3]]], pa.list_(pa.field("x", pa.list_(pa.int8()), False))),
    "list_view": pa.array([[1], None, [], [2, None]], pa.list_view(pa.int64())),
    "large_list_view": pa.array([["a"], None, [], ["b" * 20]], pa.large_list_view(pa.string_view())),
    "fixed list": pa.array([[1, 2], None, [3, 4], [5, None]], pa.list_(pa.int64(), 2)),
    "fixed list of views": pa.array([["a", "b"], None, ["c" * 20, None], ["d", "e"]], pa.list_(pa.string_view(), 2)),
    "fixed list of none": pa.array([[], None, [], []], pa.list_(pa.int64(), 0)),
    "struct": pa.array([{"a": 1, "b": "x"}, None, {"a": None, "b": "y" * 20}, {"a": 2, "b": None}]),
    "struct of views": pa.array(
        [{"a": WORDS, "b": None}, None, {"a": None, "b": b"y"}, {"a": [], "b": b"z" * 20}],
        pa.struct([pa.field("a", pa.list_(pa.string_view())), pa.field("b", pa.binary_view())]),
    ),
    "struct of none": pa.array([{}, None, {}, {}], pa.struct([])),
    "map": pa.array([[("a", 1)], None, [], [("b", 2), ("c", None)]], pa.map_(pa.string(), pa.int64())),
    "map of views": pa.array([[("a", "x")], None, [], [("b", None)]], pa.map_(pa.string_view(), pa.string_view())),
    "dense union": pa.UnionArray.from_dense(
        pa.array([0, 1, 0, 1], pa.int8()), pa.array([0, 0, 1, 1], pa.int32()), [pa.array([1, 2]), pa.array(["a", "b"])]
    ),
    "sparse union": pa.UnionArray.from_sparse(
        pa.array([0, 1, 0, 1], pa.int8()), [pa.array([1, 2, 3, 4]), pa.array(["a", "b", "c", "d"])]
    ),
    "run ends": pc.run_end_encode(pa.array([1, 1, 2, None])),
    "run ends of text": pc.run_end_encode(pa.array(["a", "a", None, "b"]), pa.int16()),
    "dictionary": dictionary(["b", "a", "unused"], [0, 1, None, 1], pa.uint8()),
    "ordered dictionary": dictionary(["b", "a", "unused"], [0, 1, None, 1], ordered=True),
    "dictionary with a null": dictionary(pa.array(["a", None]), [0, 1, None, 1]),
    "dictionary of nulls": dictionary(pa.nulls(2), [0, 1, None, 1]),
    "dictionary of lists": dictionary(pa.array([[1], []]), [0, 1, None, 1]),
    "dictionary of views": dictionary(pa.array(["a", None, "c" * 20], pa.string_view()), [0, 1, None, 2]),
    "empty dictionary": dictionary(pa.array([], pa.string()), [None] * 4),
    "list of dictionary": pa.ListArray.from_arrays(ENDS, dictionary(["a", "b"], [0, 1, None, 1])),
    "list view of dictionary": pa.ListViewArray.from_arrays(
        [3, 0, 0, 1], [1, 1, 0, 2], dictionary(["a", "b"], [0, 1, None, 1])
    ),
    "fixed list of dictionary": pa.FixedSizeListArray.from_arrays(dictionary(["a", "b"], [0, 1, None, 1]), 1),
    "map to dictionary": pa.MapArray.from_arrays(ENDS, pa.array(list("abcd")), dictionary(["a", "b"], [0, 1, None, 1])),
    "struct of dictionaries": pa.StructArray.from_arrays(
        [dictionary(["a"], [0, 0, None, 0]), dictionary(["b", "c"], [1, 0, None, 0])], ["x", "y"]
    ),
    "extension": pa.ExtensionArray.from_storage(Unit("s"), pa.array([1.0, None, 3.0, 4.0])),
    "list of extension": pa.ListArray.from_arrays(
        ENDS, pa.ExtensionArray.from_storage(Unit("s"), pa.array([1.0, None, 3.0, 4.0]))
    ),
    "tensor": pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(16.0).reshape(4, 2, 2)),
}
REFUSED = {
    "dictionary of dictionaries": dictionary(dictionary(["a", "b"], [1, 0]), [0, 1, None, 1]),
    "union of views": pa.UnionArray.from_sparse(
        pa.array([0, 1, 0, 1], pa.int8()), [pa.array([1, 2, 3, 4]), pa.array(list("abcd"), pa.string_view())]
    ),
    "union of dictionaries": pa.UnionArray.from_sparse(
        pa.array([0, 1, 0, 1], pa.int8()), [pa.array([1, 2, 3, 4]), dictionary(["a", "b"], [0, 1, 0, 1])]
    ),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_a_table_arrives_as_it_was_put(name: str) -> None:
    """Kind: what pyarrow can hold comes, though it cannot cut, join or pick rows of it; the same values and types."""
    array = ARRAYS[name]
    fields = [
        pa.field("x", array.type, metadata={"PARQUET:field_id": "1"}),
        pa.field("x", pa.int64(), nullable=False, metadata={"unit": "m"}),  # names may be there twice
    ]
    table = pa.table([array, pa.array(range(4))], schema=pa.schema(fields, metadata={"from": "here"}))
    arrived = whole(table)
    assert arrived.schema.equals(table.schema, check_metadata=True)
    assert arrived.equals(table, check_metadata=True) or repr(arrived.to_pydict()) == repr(table.to_pydict())
    if name != "nan":
        assert arrived.equals(table, check_metadata=True)
    many = pa.concat_tables([table] * 50)
    for part in (table.slice(1, 2), many.slice(101, 7)):
        assert repr(whole(part).column(0).to_pylist()) == repr(part.column(0).to_pylist())


@pytest.mark.parametrize("name", ARRAYS)
def test_rows_of_several_readers_are_mixed_and_padded(name: str) -> None:
    table = pa.table({"x": ARRAYS[name]})
    blocks = [[table, table.slice(1, 2)], [table.slice(3), table.slice(0, 0), table.slice(1)], [table.slice(2)]]
    *readers, got = stream(blocks, 5, tail="pad")
    assert readers == [None] * 3
    rows = [[row for block in each for row in block.to_pylist()] for each in blocks]
    longest = max(map(len, rows))
    want = [each[n] for n in range(longest) for each in rows if n < len(each)]
    found = rows_of(got)
    assert repr(found[: len(want)]) == repr(want)
    assert all(row["x"] is None or name == "sparse union" for row in found[len(want) :])
    assert all(batch.schema.field("x").type.equals(table.schema.field("x").type) for batch in got)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_sent_is_refused_by_the_put(name: str) -> None:
    put, _ = stream([[pa.table({"ok": pa.array([1, 2, 3, 4]), "odd": REFUSED[name]})]], 2)
    assert isinstance(put, TypeError)
    assert "column 'odd' is" in str(put)
    assert "cast it" in str(put)


FAR = pa.array([f"category number {n}" for n in range(50_000)])
DIFFERENT = {
    "of more words than indices count": [[f"a{n}" for n in range(100)], [f"b{n}" for n in range(100)]],
    "with nulls in them": [pa.array(["a", None]), pa.array([None, "b"])],
    "of lists": [pa.array([[1], [2]]), pa.array([[3], [2]])],
    "of views": [pa.array(["a", None], pa.string_view()), pa.array(["b" * 20, "a"], pa.string_view())],
    "of floats, NaN too": [pa.array([1.0, float("nan")]), pa.array([float("nan"), 2.0])],
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_dictionaries_that_differ_between_readers_and_blocks(name: str) -> None:
    """Kind: a batch has the values that its rows use; what its readers' dictionaries have beside them is no matter."""
    one, other = DIFFERENT[name]
    blocks = [pa.table({"x": dictionary(words, [0, 1, 0, None], pa.int8())}) for words in (one, other)]
    *readers, got = stream([blocks, blocks[::-1]], 8)
    assert readers == [None, None]
    first, second = (block.to_pylist() for block in blocks)
    want = [row for pair in zip(first + second, second + first, strict=True) for row in pair]
    assert repr(rows_of(got)) == repr(want)


def test_ordered_dictionaries_keep_their_order() -> None:
    low, full = pa.array(["low"]), pa.array(["low", "middle", "high"])
    blocks = [pa.table({"x": dictionary(words, [0] * 2, ordered=True)}) for words in (low, full)]
    *_, got = stream([[block] for block in blocks], 4)
    assert got[0]["x"].dictionary.equals(full)
    assert rows_of(got) == [{"x": "low"}] * 4
    other = pa.table({"x": dictionary(full.take(pa.array([2, 0])), [0] * 2, ordered=True)})
    *_, error = stream([[blocks[1]], [other]], 4)
    assert isinstance(error, ValueError)
    assert "column 'x'" in str(error)
    assert "ordered dictionaries that differ" in str(error)


def test_more_values_in_one_batch_than_indices_count() -> None:
    blocks = [[pa.table({"x": dictionary([f"{p}{n}" for n in range(100)], range(100), pa.int8())})] for p in "ab"]
    *_, error = stream(blocks, 200)
    assert isinstance(error, ValueError)
    assert "column 'x'" in str(error)
    assert "put dictionaries with wider indices" in str(error)
    assert len(rows_of(stream(blocks, 100)[-1])) == 200


def test_a_dictionary_of_many_blocks_counts_once() -> None:
    blocks = [pa.table({"x": dictionary(FAR, range(k, k + 4))}) for k in range(0, 64, 4)]
    *readers, got = stream([blocks], 64, budget=2 << 20)
    assert readers == [None]
    assert [row["x"] for row in rows_of(got)] == FAR.to_pylist()[:64]


def test_only_metadata_differ() -> None:
    """Kind: rows are those of one stream though somebody has written other remarks on them; the first reader's come."""

    def block(remark: str, number: int) -> Any:
        child = pa.field("y", pa.int64(), metadata={"child": remark})
        field = pa.field("x", pa.struct([child]), metadata={"PARQUET:field_id": remark})
        element = pa.field(remark, pa.int64(), metadata={"element": remark})
        schema = pa.schema([field, pa.field("z", pa.list_(element))], metadata={"pandas": remark})
        return pa.table([[{"y": number}], [[number]]], schema=schema)

    *readers, got = stream([[block("a", 1), block("b", 3)], [block("c", 2), block("d", 4)]], 2)
    assert readers == [None, None]
    assert [row["x"]["y"] for row in rows_of(got)] == [1, 2, 3, 4]
    assert all(batch.schema.equals(block("a", 1).schema, check_metadata=True) for batch in got)


def test_a_mismatch_says_what_differs_inside_of_a_type() -> None:
    one, other = (pa.field("x", pa.map_(pa.string(), pa.field("value", pa.int8(), nullable=n))) for n in (True, False))
    put, *_ = stream([[pa.table([[[("a", 1)]]], pa.schema([each])) for each in (one, other)]], 1)
    assert isinstance(put, ValueError)
    assert "map<string, int8 not null>}, and those put before were {x: arrow map<string, int8>}" in str(put)


def test_large_pieces_are_encoded_off_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    from collective._rows import arrow

    threads = set()

    def encode(tables: Any, taken_apart: Any, encode: Any = arrow._encode) -> Any:
        threads.add(threading.current_thread() is threading.main_thread())
        return encode(tables, taken_apart)

    monkeypatch.setattr(arrow, "_encode", encode)
    for rows, inline in ((100, True), (4_000_000, False)):
        threads.clear()
        whole(pa.table({"x": np.zeros(rows)}))
        assert threads == {inline}


@pytest.mark.parametrize("name", [name for name in ARRAYS if "dictionar" not in name and name != "run ends of text"])
def test_a_slice_sends_only_its_rows(name: str) -> None:
    from collective._rows import arrow

    many = pa.table({"x": pa.chunked_array([ARRAYS[name]] * 10_000)}).combine_chunks()
    part = many.slice(20_001, 8)
    form = arrow.ArrowFormat.of(part)
    assert len(arrow._encode([part], form.taken_apart)) < 8_000
    assert form.size_of(part) < 2_000


leaves = st.sampled_from(
    [pa.int8(), pa.string(), pa.string_view(), pa.binary_view(), pa.null(), pa.bool_(), pa.float32()]
)


def _nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        inner.map(pa.list_),
        inner.map(pa.large_list),
        inner.map(pa.list_view),
        inner.map(lambda each: pa.list_(each, 2)),
        st.lists(inner, min_size=1, max_size=3).map(lambda each: pa.struct([(str(n), t) for n, t in enumerate(each)])),
        inner.map(lambda each: pa.map_(pa.string(), each)),
    )


types = st.recursive(leaves | st.just(pa.dictionary(pa.int8(), pa.string())), _nested, max_leaves=5)


@st.composite
def values(draw: Any, kind: Any) -> Any:
    """Draw a value of a type."""
    if draw(st.integers(0, 4)) == 0 or pa.types.is_null(kind):
        return None
    if pa.types.is_dictionary(kind):
        return draw(st.sampled_from(["yes", "no", "perhaps"]))
    if pa.types.is_struct(kind):
        return {kind.field(n).name: draw(values(kind.field(n).type)) for n in range(kind.num_fields)}
    if pa.types.is_map(kind):
        return [(f"k{n}", draw(values(kind.item_type))) for n in range(draw(st.integers(0, 2)))]
    if pa.types.is_fixed_size_list(kind):
        return [draw(values(kind.value_type)) for _ in range(2)]
    if pa.types.is_nested(kind):
        return [draw(values(kind.value_type)) for _ in range(draw(st.integers(0, 3)))]
    if pa.types.is_boolean(kind):
        return draw(st.booleans())
    if pa.types.is_integer(kind):
        return draw(st.integers(-100, 100))
    if pa.types.is_floating(kind):
        return float(draw(st.integers(-9, 9)))
    word = draw(st.sampled_from(["", "short", "a word of more than twelve bytes"]))
    return word.encode() if pa.types.is_binary_view(kind) else word


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_nested_types_that_are_drawn(data: Any) -> None:
    """Kind: as above, whatever is nested in what, with nulls anywhere, in slices and chunks that differ."""
    kind = data.draw(types)
    blocks = []
    for _ in range(2):
        rows = data.draw(st.lists(values(kind), min_size=4, max_size=8))
        cut = data.draw(st.integers(0, len(rows)))
        column = pa.chunked_array([_array(rows[:cut], kind), _array(rows[cut:], kind)], kind)
        blocks.append(pa.table({"x": column}).slice(data.draw(st.integers(0, 3))))
    *readers, got = stream([[each] for each in blocks], 3, tail="pad")
    assert readers == [None, None]
    lists = [block.to_pylist() for block in blocks]
    want = [each[n] for n in range(max(map(len, lists))) for each in lists if n < len(each)]
    found = rows_of(got)
    assert repr(found[: len(want)]) == repr(want)
    assert all(row["x"] is None for row in found[len(want) :])
    if len(blocks[0]):
        assert whole(blocks[0]).schema.equals(blocks[0].schema)
        assert whole(blocks[0]).to_pylist() == lists[0]


def _array(rows: list[Any], kind: Any) -> Any:
    """Make an array of nested types that pyarrow makes none of from Python: by way of IPC's plain ones."""
    from collective._rows import arrow_types

    plain = arrow_types.plain(pa.nulls(1, kind)).type
    return arrow_types.restored(pa.array(rows, plain), kind)
