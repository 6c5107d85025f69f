"""Rows as pyarrow record batches and tables. The one module that knows pyarrow, which is optional."""

from __future__ import annotations

import bisect
import importlib
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from collective._rows.formats import Block, Format, Landing, Piece, Staged, Storage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from collective._core.warm import Pool
    from collective._rows.order import Run


@dataclass(frozen=True)
class ArrowFormat(Format):
    """An Arrow schema, without its metadata."""

    schema: bytes
    text: str = field(compare=False)
    row_bytes: int = field(compare=False)
    exact = False
    buffers = 1

    @staticmethod
    def of(rows: Any) -> ArrowFormat:
        """Return the format of a RecordBatch or Table."""
        schema = rows.schema.remove_metadata()
        if not schema.names:
            raise ValueError("rows have no columns; put at least one")
        text = ", ".join(f"{each.name}: arrow {each.type}{'' if each.nullable else ' not null'}" for each in schema)
        width = -(-rows.nbytes // rows.num_rows) if rows.num_rows else 1
        return ArrowFormat(schema.serialize().to_pybytes(), f"{{{text}}}", max(1, width))

    def block(self, rows: Any) -> ArrowBlock:
        pyarrow = _pyarrow()

        known = isinstance(rows, pyarrow.RecordBatch | pyarrow.Table)
        found = ArrowFormat.of(rows) if known else None
        if found != self:
            other = str(found) if found is not None else f"a {type(rows).__module__}.{type(rows).__qualname__}"
            raise ValueError(f"rows are {other}, and those put before were {self}; all blocks have the same columns")
        table = pyarrow.Table.from_batches([rows]) if isinstance(rows, pyarrow.RecordBatch) else rows
        return ArrowBlock(table.replace_schema_metadata(None))

    def storage(self, first: int, limit: int, pool: Pool) -> ArrowStorage:
        return ArrowStorage(first)

    def landing(self, rows: int, valid: int, pool: Pool) -> ArrowLanding:
        return ArrowLanding(self, rows, valid)

    def split(self, parts: Sequence[int], buffer: memoryview) -> list[memoryview]:
        raise NotImplementedError("pieces of Arrow rows are not joined")

    def load(self) -> None:
        importlib.import_module("pyarrow.ipc")

    @property
    def loaded(self) -> bool:
        return "pyarrow.ipc" in sys.modules

    def __str__(self) -> str:
        return self.text


class ArrowBlock(Block):
    """A table. It cannot change, so that it is never copied."""

    lasting = True

    def __init__(self, table: Any) -> None:
        self.table = table
        self.rows = table.num_rows
        self.nbytes = table.nbytes


class _Stored(Staged):
    """Rows that wait. There is nothing to copy."""

    nbytes = 0

    def __init__(self, table: Any) -> None:
        self.table = table
        self.first = 0
        self.rows = self.left = table.num_rows
        self.held = table.nbytes

    def fill(self) -> None:
        """Do nothing: the rows stay where they are."""


class ArrowStorage(Storage):
    """Tables, one behind the other."""

    def __init__(self, first: int) -> None:
        self._tables: list[_Stored] = []
        self.held = 0
        self.end = first

    def stage(self, block: Block, start: int, stop: int, *, keep: bool) -> Staged:
        assert isinstance(block, ArrowBlock)
        return _Stored(block.table.slice(start, stop - start))

    def add(self, staged: Staged) -> None:
        assert isinstance(staged, _Stored)
        staged.first = self.end
        self.end += staged.rows
        self.held += staged.held
        self._tables.append(staged)

    def piece(self, first: int, stop: int) -> Piece:
        piece = Piece([], [])
        for stored in self._between(first, stop):
            start, end = max(first, stored.first), min(stop, stored.first + stored.rows)
            part = stored.table.slice(start - stored.first, end - start)
            piece.parts.append(end - start)
            piece.buffers.append(memoryview(_encode(part)))
        return piece

    def release(self, first: int, stop: int) -> None:
        for stored in self._between(first, stop):
            stored.left -= min(stop, stored.first + stored.rows) - max(first, stored.first)
            if not stored.left:
                self._tables.remove(stored)
                self.held -= stored.held

    def clear(self) -> None:
        self._tables.clear()
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
        pyarrow = _pyarrow()

        places = np.zeros(self._rows, np.int64)
        tables, at = [], 0
        for run, offset, count, buffer, start in self._parts:
            first = run.at + offset * run.stride
            places[first : first + (count - 1) * run.stride + 1 : run.stride] = np.arange(at, at + count)
            tables.append(_decode(buffer).slice(start, count))
            at += count
        if tables:
            table = pyarrow.concat_tables(tables).unify_dictionaries()
        else:
            table = pyarrow.ipc.read_schema(pyarrow.py_buffer(self._form.schema)).empty_table()
        missing = np.arange(self._rows) >= self._valid
        [batch] = table.take(pyarrow.array(places, mask=missing)).combine_chunks().to_batches() or [None]
        return batch


def _encode(table: Any) -> Any:
    pyarrow = _pyarrow()

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return sink.getvalue()


def _decode(buffer: memoryview) -> Any:
    pyarrow = _pyarrow()

    return pyarrow.ipc.open_stream(pyarrow.py_buffer(buffer)).read_all()


def _pyarrow() -> Any:
    importlib.import_module("pyarrow.ipc")
    return importlib.import_module("pyarrow")
