"""Rows as pyarrow record batches and tables. `arrow_types` knows pyarrow, which is optional."""

from __future__ import annotations

import bisect
import itertools
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from collective._rows.arrow_types import (
    Joined,
    dictionaries_of,
    is_plain,
    is_simple,
    joins_cheaply,
    plain,
    pyarrow,
    restored,
    said,
    said_field,
    size_of,
)
from collective._rows.formats import Block, Format, Landing, Piece, Staged, Storage

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from collective._core.warm import Pool
    from collective._gate import Gate
    from collective._rows.order import Run


@dataclass(frozen=True)
class ArrowFormat(Format):
    """An Arrow schema. Formats that differ only in metadata are equal; a batch has those of the first producer."""

    text: str
    schema: bytes = field(compare=False)
    row_bytes: int = field(compare=False)
    exact = False
    buffers = 1

    @staticmethod
    def of(rows: Any) -> ArrowFormat:
        """Return the format of a RecordBatch or Table."""
        if not rows.schema.names:
            raise ValueError("rows have no columns; put at least one")
        form = ArrowFormat(_text(rows.schema), rows.schema.serialize().to_pybytes(), 1)
        for number, each in enumerate(rows.schema):
            if not is_simple(each.type):
                _check_column(each, rows.column(number))
        width = -(-form.size_of(rows) // rows.num_rows) if rows.num_rows else 1
        return replace(form, row_bytes=max(1, width))

    def block(self, rows: Any) -> ArrowBlock:
        pa = pyarrow()
        if not isinstance(rows, pa.RecordBatch | pa.Table):
            other = f"a {type(rows).__module__}.{type(rows).__qualname__}"
        elif rows.schema.equals(self.arrow_schema):  # quickly, as for most
            other = self.text
        else:
            other = _text(rows.schema)
        if other != self.text:
            raise ValueError(f"rows are {other}, and those put before were {self}; all blocks have the same columns")
        table = pa.Table.from_batches([rows]) if isinstance(rows, pa.RecordBatch) else rows
        return ArrowBlock(table, self.size_of(table), _dictionaries(table, self.taken_apart))

    def storage(self, first: int, limit: int, pool: Pool) -> ArrowStorage:
        return ArrowStorage(self, first)

    def landing(self, rows: int, valid: int, pool: Pool) -> ArrowLanding:
        return ArrowLanding(self, rows, valid)

    def split(self, parts: Sequence[int], buffer: memoryview) -> list[memoryview]:
        raise NotImplementedError("pieces of Arrow rows are not joined")

    def load(self) -> None:
        pyarrow()

    @property
    def loaded(self) -> bool:
        return "pyarrow.ipc" in sys.modules and "pyarrow.compute" in sys.modules

    @cached_property
    def arrow_schema(self) -> Any:
        """The schema, with its metadata."""
        pa = pyarrow()
        return pa.ipc.read_schema(pa.py_buffer(self.schema))

    @cached_property
    def taken_apart(self) -> list[int]:
        """The columns that pyarrow cannot do all with that is wanted here."""
        types = enumerate(self.arrow_schema.types)
        return [number for number, kind in types if not (is_plain(kind, dictionaries=True) and joins_cheaply(kind))]

    def size_of(self, rows: Any) -> int:
        """Return about how many bytes rows take, without their dictionaries."""
        if not self.taken_apart:
            return int(rows.nbytes)
        rest = rows.select([number for number in range(rows.num_columns) if number not in self.taken_apart])
        return int(rest.nbytes) + sum(size_of(chunk) for chunk in _chunks(rows, self.taken_apart))

    def __reduce__(self) -> tuple[Any, ...]:
        return ArrowFormat, (self.text, self.schema, self.row_bytes)

    def __str__(self) -> str:
        return self.text


class ArrowBlock(Block):
    """A table. It cannot change, so that it is never copied."""

    lasting = True

    def __init__(self, table: Any, nbytes: int, dictionaries: dict[Any, int]) -> None:
        self.table = table
        self.rows = table.num_rows
        self.nbytes = nbytes
        self.dictionaries = dictionaries
        """Bytes of each dictionary, by where it lies."""


class _Stored(Staged):
    """Rows that wait. There is nothing to copy."""

    nbytes = 0

    def __init__(self, block: ArrowBlock, start: int, stop: int) -> None:
        self.table = block.table.slice(start, stop - start)
        self.first = 0
        self.rows = self.left = stop - start
        self.held = block.nbytes * self.rows // block.rows
        self.dictionaries = block.dictionaries

    def fill(self, gate: Gate) -> None:
        """Do nothing: the rows stay where they are."""


class ArrowStorage(Storage):
    """Tables, one behind the other. A dictionary that several have counts once."""

    def __init__(self, form: ArrowFormat, first: int) -> None:
        self._form = form
        self._tables: list[_Stored] = []
        self._dictionaries: Counter[Any] = Counter()
        """How many tables have each."""
        self.held = 0
        self.end = first

    def stage(self, block: Block, start: int, stop: int, *, keep: bool) -> Staged:
        assert isinstance(block, ArrowBlock)
        return _Stored(block, start, stop)

    def add(self, staged: Staged) -> None:
        assert isinstance(staged, _Stored)
        staged.first = self.end
        self.end += staged.rows
        self.held += staged.held + sum(n for key, n in staged.dictionaries.items() if not self._dictionaries[key])
        self._dictionaries.update(staged.dictionaries.keys())
        self._tables.append(staged)

    def piece(self, first: int, stop: int) -> Piece:
        tables, nbytes = [], 0
        for stored in self._between(first, stop):
            start, end = max(first, stored.first), min(stop, stored.first + stored.rows)
            tables.append(stored.table.slice(start - stored.first, end - start))
            nbytes += stored.held * (end - start) // stored.rows
        return Piece([stop - first], [], lambda: [memoryview(_encode(tables, self._form.taken_apart))], nbytes)

    def release(self, first: int, stop: int) -> None:
        for stored in self._between(first, stop):
            stored.left -= min(stop, stored.first + stored.rows) - max(first, stored.first)
            if not stored.left:
                self._tables.remove(stored)
                self._dictionaries.subtract(stored.dictionaries.keys())
                gone = [key for key in stored.dictionaries if not self._dictionaries[key]]
                self.held -= stored.held + sum(stored.dictionaries[key] for key in gone)
                for key in gone:
                    del self._dictionaries[key]

    def clear(self) -> None:
        self._tables.clear()
        self._dictionaries.clear()
        self.held = 0

    def _between(self, first: int, stop: int) -> list[_Stored]:
        low = bisect.bisect_right(self._tables, first, key=lambda stored: stored.first) - 1
        high = bisect.bisect_left(self._tables, stop, key=lambda stored: stored.first)
        return self._tables[max(0, low) : high]


class ArrowLanding(Landing):
    """Parts of a batch, which `finish` puts in order. Padding rows are null."""

    def __init__(self, form: ArrowFormat, rows: int, valid: int) -> None:
        self._form = form
        self._rows = rows
        self._valid = valid
        self._parts: list[tuple[Run, int, int, memoryview, int]] = []

    def place(self, run: Run, offset: int, count: int, buffers: Sequence[memoryview], start: int) -> None:
        self._parts.append((run, offset, count, buffers[0], start))

    def finish(self) -> Any:
        pa = pyarrow()
        schema = self._form.arrow_schema
        places = np.zeros(self._rows, np.int64)
        tables, at = [], 0
        for run, offset, count, buffer, start in self._parts:
            first = run.at + offset * run.stride
            places[first : first + (count - 1) * run.stride + 1 : run.stride] = np.arange(at, at + count)
            tables.append(_decode(buffer).slice(start, count))
            at += count
        picked = pa.array(places, mask=np.arange(self._rows) >= self._valid)
        columns: dict[int, Any] = dict.fromkeys(range(len(schema)))
        rest = [number for number in columns if number not in self._form.taken_apart]
        if tables and rest:
            table = pa.concat_tables([table.select(rest) for table in tables]).take(picked)
            batches = table.combine_chunks().to_batches()
            if len(batches) > 1:
                raise ValueError("a batch has more than 2 GiB in one column; put large_ types, or pass batch_size=less")
            columns.update(zip(rest, batches[0].columns, strict=True))
        for number in self._form.taken_apart if tables else columns:
            each = schema.field(number)
            try:
                columns[number] = _pick([table.column(number) for table in tables], picked, each.type)
            except (ValueError, pa.ArrowException) as error:
                raise ValueError(f"column {each.name!r}, {said(each.type)}: {error}") from error
        return pa.RecordBatch.from_arrays(list(columns.values()), schema=schema)


def _pick(columns: Iterable[Any], places: Any, kind: Any) -> Any:
    """Return the rows at some places of columns that follow one another, as an array of a type; null for no place."""
    pa = pyarrow()
    chunks = list(itertools.chain.from_iterable(column.chunks for column in columns))
    if not chunks:
        return pa.nulls(len(places), kind)
    if is_plain(kind) and _alike(chunks):  # quickly, as for most
        return (chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks)).take(places)
    return _pick_apart(chunks, places, kind)


def _pick_apart(chunks: Sequence[Any], places: Any, kind: Any) -> Any:
    """Do as `_pick` does, of chunks of any type and with any dictionaries."""
    pa = pyarrow()
    joined: list[Joined] = []
    arrays = [plain(chunk, _each(joined)) for chunk in chunks]
    whole = arrays[0] if len(arrays) == 1 else pa.concat_arrays(arrays)
    return restored(whole.take(places), kind, _each(joined))


def _alike(chunks: Sequence[Any]) -> bool:
    """Whether the dictionaries inside of chunks of one column are equal."""
    first, *rest = ([*dictionaries_of(chunk)] for chunk in chunks)
    return all(one.equals(other) for each in rest for one, other in zip(first, each, strict=True))


def _each(joined: list[Joined]) -> Iterator[Joined]:
    """Yield what joins each of a column's dictionaries, made where it is not there."""
    for number in itertools.count():
        if number == len(joined):
            joined.append(Joined())
        yield joined[number]


def _encode(tables: Sequence[Any], taken_apart: Sequence[int]) -> Any:
    """Return the rows of tables as one message. Of views and run-end encoded columns only what these rows have."""
    pa = pyarrow()
    columns: dict[int, Any] = dict.fromkeys(range(tables[0].num_columns))
    rest = [number for number in columns if number not in taken_apart]
    joined = pa.concat_tables([table.select(rest) for table in tables]).combine_chunks()
    columns.update(zip(rest, joined.columns, strict=True))
    for number in taken_apart:
        chunks = [plain(chunk) for table in tables for chunk in table.column(number).chunks]
        column = pa.chunked_array(chunks or [plain(tables[0].column(number).combine_chunks())])
        if len(chunks) > 1 and joins_cheaply(column.type):
            column = pa.table([column], names=["0"]).combine_chunks().column(0)
        columns[number] = column
    table = pa.table(list(columns.values()), names=list(map(str, columns)))  # of the names several may be equal
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _decode(buffer: memoryview) -> Any:
    pa = pyarrow()
    return pa.ipc.open_stream(pa.py_buffer(buffer)).read_all()


def _check_column(known: Any, column: Any) -> None:
    """Raise TypeError where a column's first row does not arrive as it is: pyarrow cannot do all with every type."""
    pa = pyarrow()
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    first = next((chunk.slice(0, 1) for chunk in chunks if len(chunk)), None)
    first = pa.nulls(1, known.type) if first is None else first
    why = ""
    try:
        arrived = _decode(_encode([pa.table([first], names=["0"])], [0])).column(0)
        ways = [_pick([arrived] * 2, pa.array([1]), known.type)]
        ways.append(_pick_apart(arrived.chunks * 2, pa.array([1]), known.type))
        for each in ways:
            each.validate(full=True)
            if not each.equals(first) and repr(each.to_pylist()) != repr(first.to_pylist()):  # NaN equals nothing
                why = "it arrives as another value"
    except (pa.ArrowException, TypeError, ValueError, OSError) as error:
        why = f"{type(error).__name__}: {error}"
    if why:
        raise TypeError(
            f"column {known.name!r} is {said(known.type)}, which cannot be sent in a row stream ({why}); cast it to a "
            "type without that, such as the plain form of a nested dictionary, view or run-end encoded type"
        )


def _text(schema: Any) -> str:
    columns = [f"{each.name}: arrow {said_field(each, named=False)}" for each in schema]
    return f"{{{', '.join(columns)}}}"


def _dictionaries(rows: Any, numbers: Sequence[int]) -> dict[Any, int]:
    """Return how many bytes each dictionary in some columns takes, by where it lies."""
    found = {}
    for each in itertools.chain.from_iterable(map(dictionaries_of, _chunks(rows, numbers))):
        where = tuple(0 if buffer is None else buffer.address for buffer in each.buffers())
        found[where, each.offset, len(each)] = int(each.nbytes)
    return found


def _chunks(rows: Any, numbers: Sequence[int]) -> Iterable[Any]:
    for number in numbers:
        column = rows.column(number)
        yield from column.chunks if hasattr(column, "chunks") else [column]
