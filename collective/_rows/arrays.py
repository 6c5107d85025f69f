"""Rows as dicts of arrays with equal first dimensions."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from collective import tensors
from collective._rows.formats import Block, Format, Landing, Piece, Staged, Storage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from collective._core.warm import Pool
    from collective._gate import Gate
    from collective._rows.order import Run

CHUNK = 1 << 20
"""Bytes of the memory that small blocks share."""


class Column(NamedTuple):
    """One column: what an array is but for its first dimension."""

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    device: str

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return math.prod(self.shape) * tensors.numpy_dtype(self.dtype).itemsize

    def __str__(self) -> str:
        where = "" if self.device == "cpu" else f" on {self.device}"
        return f"{self.name}: {self.kind} {self.dtype}{list(self.shape) if self.shape else ''}{where}"


@dataclass(frozen=True)
class ArrayFormat(Format):
    """Columns in the order of their names."""

    columns: tuple[Column, ...]
    exact = True

    @staticmethod
    def of(rows: dict[str, Any]) -> ArrayFormat:
        """Return the format of a dict of arrays."""
        if not rows:
            raise ValueError("rows are an empty dict; put at least one column")
        for name in rows:
            if not isinstance(name, str):
                raise TypeError(f"a column is called {name!r}; names are strings")
        lengths = {name: _length(name, array) for name, array in rows.items()}
        if len(set(lengths.values())) > 1:
            said = ", ".join(f"{name!r} has {length}" for name, length in lengths.items())
            raise ValueError(f"columns have different numbers of rows: {said}")
        return ArrayFormat(tuple(_column(name, rows[name]) for name in sorted(rows)))

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Bytes of a row of each column that has any."""
        return tuple(column.row_bytes for column in self.columns if column.row_bytes)

    @cached_property
    def row_bytes(self) -> int:  # type: ignore[override]
        """Bytes that a row takes."""
        return sum(self.widths)

    @property
    def buffers(self) -> int:  # type: ignore[override]
        """How many buffers a part of a piece has."""
        return len(self.widths)

    def block(self, rows: Any) -> ArrayBlock:
        found = ArrayFormat.of(rows) if isinstance(rows, dict) else None
        if found != self:
            other = str(found) if found is not None else f"a {type(rows).__module__}.{type(rows).__qualname__}"
            raise ValueError(f"rows are {other}, and those put before were {self}; all blocks have the same columns")
        host = [_bytes_of(rows[column.name]) for column in self.columns if column.row_bytes]
        return ArrayBlock(_length(self.columns[0].name, rows[self.columns[0].name]), host, self.row_bytes)

    def storage(self, first: int, limit: int, pool: Pool) -> ArrayStorage:
        return ArrayStorage(self, first, limit, pool)

    def landing(self, rows: int, valid: int, pool: Pool) -> ArrayLanding:
        return ArrayLanding(self, rows, valid, pool)

    def split(self, parts: Sequence[int], buffer: memoryview) -> list[memoryview]:
        cut, at = [], 0
        for rows in parts:
            for width in self.widths:
                cut.append(buffer[at : at + rows * width])
                at += rows * width
        return cut

    def load(self) -> None:
        for column in self.columns:
            tensors.load(column.kind)

    @property
    def loaded(self) -> bool:
        return all(tensors.loaded(column.kind) for column in self.columns)

    def __str__(self) -> str:
        return f"{{{', '.join(map(str, self.columns))}}}"


class ArrayBlock(Block):
    """A dict of arrays, as the bytes of each column in host memory."""

    lasting = False

    def __init__(self, rows: int, columns: list[np.ndarray], row_bytes: int) -> None:
        self.rows = rows
        self.nbytes = rows * row_bytes
        self.columns = columns


class _Chunk:
    """Memory for some rows, which follow one another."""

    __slots__ = ("capacity", "columns", "first", "left", "lent", "rows")

    def __init__(self, columns: list[np.ndarray], capacity: int, *, lent: bool) -> None:
        self.columns = columns
        self.capacity = capacity
        self.lent = lent
        """Whether the memory is the caller's."""
        self.first = 0
        self.rows = 0
        self.left = 0
        """Rows that were not released."""


class _Staged(Staged):
    def __init__(self, chunk: _Chunk, rows: int, copies: list[tuple[np.ndarray, np.ndarray]]) -> None:
        self.chunk = chunk
        self.rows = rows
        self._copies = copies
        self.nbytes = sum(target.nbytes for target, _ in copies)

    def fill(self, gate: Gate) -> None:
        for target, source in self._copies:
            gate.copy(target, source)


class ArrayStorage(Storage):
    """Rows in chunks. Small blocks share one, large ones have their own."""

    def __init__(self, form: ArrayFormat, first: int, limit: int, pool: Pool) -> None:
        self._widths = form.widths
        self._row_bytes = max(1, form.row_bytes)
        self._pool = pool
        self._shared_rows = max(1, min(CHUNK, limit // 8) // self._row_bytes)
        self._chunks: list[_Chunk] = []
        self.held = 0
        self.end = first

    def stage(self, block: Block, start: int, stop: int, *, keep: bool) -> Staged:
        assert isinstance(block, ArrayBlock)
        rows = stop - start
        sources = [
            column[start * width : stop * width] for column, width in zip(block.columns, self._widths, strict=True)
        ]
        if keep:
            return _Staged(_Chunk(sources, rows, lent=True), rows, [])
        last = self._chunks[-1] if self._chunks else None
        if last is not None and not last.lent and last.rows + rows <= last.capacity:
            chunk = last
        else:
            chunk = self._memory(rows if 4 * rows > self._shared_rows else self._shared_rows)
        copies = [
            (column[chunk.rows * width : (chunk.rows + rows) * width], source)
            for column, width, source in zip(chunk.columns, self._widths, sources, strict=True)
        ]
        return _Staged(chunk, rows, copies)

    def add(self, staged: Staged) -> None:
        assert isinstance(staged, _Staged)
        chunk = staged.chunk
        if not chunk.rows:
            chunk.first = self.end
            self._chunks.append(chunk)
            self.held += chunk.capacity * self._row_bytes
        chunk.rows += staged.rows
        chunk.left += staged.rows
        self.end += staged.rows

    def piece(self, first: int, stop: int) -> Piece:
        piece = Piece([], [])
        for chunk in self._between(first, stop):
            start, end = max(first, chunk.first) - chunk.first, min(stop, chunk.first + chunk.rows) - chunk.first
            piece.parts.append(end - start)
            for column, width in zip(chunk.columns, self._widths, strict=True):
                piece.buffers.append(column[start * width : end * width].data)
        return piece

    def release(self, first: int, stop: int) -> None:
        for chunk in self._between(first, stop):
            chunk.left -= min(stop, chunk.first + chunk.rows) - max(first, chunk.first)
            if not chunk.left:
                self._chunks.remove(chunk)
                self._drop(chunk)

    def clear(self) -> None:
        self._chunks.clear()  # not into the pool: they may be on their way still
        self.held = 0

    def _between(self, first: int, stop: int) -> list[_Chunk]:
        low = bisect.bisect_right(self._chunks, first, key=lambda chunk: chunk.first) - 1
        high = bisect.bisect_left(self._chunks, stop, key=lambda chunk: chunk.first)
        return self._chunks[max(0, low) : high]

    def _memory(self, rows: int) -> _Chunk:
        columns = []
        for width in self._widths:
            memory = self._pool.arena(rows * width)
            columns.append(self._pool.take(rows * width) if memory is None else memory)
        return _Chunk(columns, rows, lent=False)

    def _drop(self, chunk: _Chunk) -> None:
        self.held -= chunk.capacity * self._row_bytes
        if not chunk.lent:
            for column in chunk.columns:
                if column.base is None:  # else it is the arena's, and may be read still
                    self._pool.give(column)


class ArrayLanding(Landing):
    """A batch in memory of its own: a consumer may keep it and change it."""

    def __init__(self, form: ArrayFormat, rows: int, valid: int, pool: Pool) -> None:
        self._form = form
        self._rows = rows
        self._memory = [pool.lend(rows * width) for width in form.widths]
        # Elements of a row's size, of no kind: numpy moves each by one copy.
        self._items = [
            memory.view(f"V{width}") for memory, width in zip(self._memory, form.widths, strict=True)
        ]
        for memory, width in zip(self._memory, form.widths, strict=True):
            memory[valid * width :] = 0

    def place(self, run: Run, offset: int, count: int, buffers: Sequence[memoryview], start: int) -> None:
        first = run.at + offset * run.stride
        where = slice(first, first + (count - 1) * run.stride + 1, run.stride)
        for items, buffer in zip(self._items, buffers, strict=True):
            items[where] = np.frombuffer(buffer, items.dtype, count, start * items.itemsize)

    def finish(self) -> dict[str, Any]:
        memory = iter(self._memory)
        batch = {}
        for column in self._form.columns:
            dtype = tensors.numpy_dtype(column.dtype)
            if column.row_bytes:
                array = next(memory).view(dtype).reshape(self._rows, *column.shape)
            else:
                array = np.empty((self._rows, *column.shape), dtype)
            batch[column.name] = tensors.from_host(array, column.kind, column.device, dtype=column.dtype)
        return batch


def _length(name: str, array: Any) -> int:
    try:
        shape = tensors.shape_of(array) if tensors.kind_of(array) else ()
    except TypeError as error:
        raise TypeError(f"column {name!r}: {error}") from None
    if not shape:
        raise ValueError(f"column {name!r} has no dimensions; the first one counts the rows")
    return shape[0]


def _column(name: str, array: Any) -> Column:
    try:
        kind, dtype = tensors.kind_of(array), tensors.dtype_name(array)
    except TypeError as error:
        raise TypeError(f"column {name!r}: {error}") from None
    return Column(name, kind, dtype, tensors.shape_of(array)[1:], tensors.device_of(array))


def _bytes_of(array: Any) -> np.ndarray:
    """Return an array's bytes, a view of them where they lie in host memory in C order."""
    host = np.ascontiguousarray(tensors.to_host(array)).reshape(-1)
    return host.view(np.uint8) if host.size else np.empty(0, np.uint8)
