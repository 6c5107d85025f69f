"""What rows can be: numpy and torch arrays of any dtype and shape, Arrow tables; and the same between processes."""

from __future__ import annotations

import asyncio
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from collective import RowStream
from collective._core.warm import Pool
from collective.testing import world


def stream_all(
    blocks: list[list[Any]], *, trainers: int = 2, batch_size: int = 4, share: bool = False, **terms: Any
) -> list[list[Any]]:
    """Put each producer's blocks, and return each consumer's batches."""

    async def main() -> list[list[Any]]:
        readers = len(blocks)
        async with world("memory", readers + trainers, roles={"reader": readers, "trainer": trainers}) as opened:
            async with asyncio.timeout(20):

                async def act(rank: int) -> Any:
                    stream = RowStream(
                        opened.groups[rank], producers="reader", consumers="trainer", batch_size=batch_size, **terms
                    )
                    if rank >= readers:
                        return [batch async for batch in stream]
                    for block in blocks[rank]:
                        await stream.put(block, share=share)
                    await stream.close()

                results = await asyncio.gather(*map(act, range(readers + trainers)))
            assert opened.unseen == []
            return results[readers:]

    return asyncio.run(main())


DTYPES = [np.bool_, np.int8, np.uint16, np.int64, np.float16, ml_dtypes.bfloat16, np.complex128, "S5", "M8[s]"]


def _fields() -> np.ndarray:
    fields = np.zeros(6, [("a", "i4"), ("b", "f8"), ("c", "S3"), ("d", "f4", (2,))])
    fields["a"], fields["b"], fields["c"], fields["d"] = range(6), np.arange(6) / 3, b"xyz", np.arange(12).reshape(6, 2)
    return fields


ODD = {
    "fields": _fields(),
    "fields that are chosen": _fields()[["a", "c"]],
    "fields backwards": _fields()[::-1],
    "aligned fields": np.ones(6, np.dtype([("a", "i1"), ("b", "f8")], align=True)),
    "records": _fields().view(np.recarray),
    "no fields": np.zeros(6, []),
    "no bytes": np.zeros(6, "V0"),
    "big-endian": np.arange(6, dtype=">f8")[::-1],
    "text": np.array(["a", "bcd", "", "e", "x", "y"]),
    "dates": np.array(["2020-01-01", "NaT"] * 3, "M8[25ns]"),
    "long double": np.arange(6).astype(np.longdouble),
    "small integers": np.arange(6).astype(ml_dtypes.int4),
    "Fortran order": np.asfortranarray(np.arange(24.0).reshape(6, 4)),
    "one value": np.broadcast_to(np.float32(3), (6, 4)),
    "torch column": torch.arange(12.0).reshape(6, 2)[:, 1],
    "torch conjugate": (torch.arange(6) + 1j).conj(),
    "torch float8": torch.arange(6.0).to(torch.float8_e5m2),
}


@pytest.mark.parametrize("name", ODD)
def test_columns_of_odd_dtypes_and_strides(name: str) -> None:
    """Kind: whatever has plain elements comes: no bytes at all, other byte orders, fields, padding, any strides."""
    column = ODD[name]
    [[batch]] = stream_all([[{"x": column, "n": np.arange(6)}]], trainers=1, batch_size=6)
    assert batch["x"].dtype == column.dtype
    assert batch["x"].shape == column.shape
    assert repr(batch["x"].tolist()) == repr(column.tolist())


@pytest.mark.parametrize(
    ("column", "error", "why"),
    [
        (np.array([1, "a"], object), TypeError, "references to objects"),
        (np.zeros(2, [("a", "O")]), TypeError, "references to objects"),
        (np.array(["a", "b"], np.dtypes.StringDType()), TypeError, "references to objects"),
        (np.ma.masked_array([1, 2], mask=[1, 0]), TypeError, "lose its mask"),
        (torch.ones(2).to_sparse(), TypeError, "to_dense"),
        (np.array(3), ValueError, "no dimensions"),
        (torch.tensor(3.0), ValueError, "no dimensions"),
        ([1, 2], TypeError, "np.asarray"),
    ],
)
def test_columns_that_are_refused_are_named(column: Any, error: type[Exception], why: str) -> None:
    with pytest.raises(error, match=f"column 'odd'.*{why}"):
        stream_all([[{"n": np.arange(2), "odd": column}]])


@pytest.mark.parametrize("share", [False, True])
def test_numpy_columns_of_every_dtype_and_shape_come_whole(share: bool) -> None:
    def block(producer: int, first: int, count: int) -> dict[str, Any]:
        number = np.arange(first, first + count) * 2 + producer
        columns: dict[str, Any] = {f"c{i}": (number % 2 if i == 0 else number).astype(d) for i, d in enumerate(DTYPES)}
        columns["strided"] = np.repeat(number, 6).reshape(count, 2, 3)[:, ::-1].transpose(0, 2, 1)
        columns["empty"] = np.empty((count, 0), np.float32)
        columns["number"] = number
        return columns

    blocks = [[block(p, first, 10) for first in range(0, 40, 10)] for p in range(2)]
    got = stream_all(blocks, batch_size=5, share=share)
    for number, batches in enumerate(got):
        assert len(batches) == 8
        for step, batch in enumerate(batches):
            expected = np.arange(5) + (2 * step + number) * 5
            np.testing.assert_array_equal(batch["number"], expected)
            assert batch["empty"].shape == (5, 0)
            assert batch["strided"].shape == (5, 3, 2)
            assert (batch["strided"] == expected[:, None, None]).all()
            for i, dtype in enumerate(DTYPES):
                assert batch[f"c{i}"].dtype == np.dtype(dtype)
                np.testing.assert_array_equal(batch[f"c{i}"], (expected % 2 if i == 0 else expected).astype(dtype))
            batch["number"][:] = 0  # it is the consumer's own


def test_a_block_may_be_changed_once_it_is_put() -> None:
    async def main() -> None:
        async with world("memory", 2, roles={"reader": 1, "trainer": 1}) as opened, asyncio.timeout(10):
            giver, taker = (
                RowStream(group, producers="reader", consumers="trainer", batch_size=4) for group in opened.groups
            )
            memory = np.zeros((4, 1000))
            for value in range(10):
                memory[:] = value
                await giver.put({"x": memory})
            memory[:] = -1
            closing = asyncio.ensure_future(giver.close())
            assert [float(batch["x"].mean()) for batch in [batch async for batch in taker]] == list(range(10))
            await closing

    asyncio.run(main())


def test_torch_columns_come_as_torch() -> None:
    def block(first: int) -> dict[str, Any]:
        values = torch.arange(first, first + 8)
        return {"x": values.to(torch.bfloat16).reshape(8, 1).expand(8, 3), "n": values.numpy()}

    [batches] = stream_all([[block(0), block(8)]], trainers=1, batch_size=16)
    assert batches[0]["x"].dtype == torch.bfloat16
    torch.testing.assert_close(batches[0]["x"], torch.arange(16).to(torch.bfloat16).reshape(16, 1).expand(16, 3))
    assert isinstance(batches[0]["n"], np.ndarray)


def test_large_rows_and_blocks_larger_than_the_budget_come_whole() -> None:
    data = [np.random.default_rng(p).integers(0, 255, (24, 1 << 20), np.uint8) for p in range(2)]
    got = stream_all([[{"x": each}] for each in data], batch_size=3, budget=7 << 20)
    for number, batches in enumerate(got):
        for step, batch in enumerate(batches):
            for place in range(3):
                row, producer = divmod((2 * step + number) * 3 + place, 2)
                assert (batch["x"][place] == data[producer][row]).all()


@pytest.mark.parametrize("form", ["RecordBatch", "Table"])
def test_arrow_rows_come_as_record_batches(form: str) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is optional")

    def block(producer: int, first: int, count: int) -> Any:
        numbers = [2 * row + producer for row in range(first, first + count)]
        columns = {
            "n": pyarrow.array(numbers),
            "text": pyarrow.array(["x" * n if n % 3 else None for n in numbers]),
            "list": pyarrow.array([list(range(n)) for n in numbers]),
            "word": pyarrow.array([f"w{n % 2}" for n in numbers]).dictionary_encode(),
        }
        return getattr(pyarrow, form).from_pydict(columns)

    blocks = [[block(p, 0, 7), block(p, 7, 8).slice(8), block(p, 7, 8)] for p in range(2)]
    got = stream_all(blocks, tail="pad")
    assert [len(batches) for batches in got] == [4, 4]
    order = [row for step in zip(*got, strict=True) for batch in step for row in batch.rows.to_pylist()]
    valid = [bool(each) for step in zip(*got, strict=True) for batch in step for each in batch.valid]
    rows = [row for row, real in zip(order, valid, strict=True) if real]
    assert [row["n"] for row in rows] == list(range(30))
    assert all(row["text"] == ("x" * row["n"] if row["n"] % 3 else None) for row in rows)
    assert all(row["list"] == list(range(row["n"])) and row["word"] == f"w{row['n'] % 2}" for row in rows)
    assert all(set(row.values()) == {None} for row, real in zip(order, valid, strict=True) if not real)
    assert all(isinstance(batch.rows, pyarrow.RecordBatch) for batches in got for batch in batches)


def test_arrow_rows_of_different_columns_are_refused() -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is optional")
    one, other = pyarrow.table({"n": [1, 2]}), pyarrow.table({"n": ["1", "2"]})
    with pytest.raises(Exception, match=r"n: arrow int64.*n: arrow string"):
        stream_all([[one], [other]])
    with pytest.raises(ValueError, match="all blocks have the same columns"):
        stream_all([[one, {"n": np.ones(2)}]])


def test_thousands_of_columns_take_more_than_one_word() -> None:
    names = [f"{'column ' * 8}{number}" for number in range(1500)]
    [[batch]] = stream_all([[{name: np.full(2, n) for n, name in enumerate(names)}]], trainers=1, batch_size=2)
    assert all((batch[name] == n).all() for n, name in enumerate(names))


def test_memory_that_was_lent_comes_back_when_nobody_has_a_view_of_it() -> None:
    pool = Pool(1 << 20)
    lent = pool.lend(1 << 18)
    lent[:] = 7
    view = lent.view(np.float32)[10:20]
    where = lent.ctypes.data
    del lent
    others = [pool.take(1 << 18) for _ in range(5)]
    assert where not in [other.ctypes.data for other in others]
    del view
    assert pool.take(1 << 18).ctypes.data == where
    for other in others:
        pool.give(other)
    assert pool._held == 1 << 20  # the fifth is not kept
