"""What rows are: how a producer keeps those that wait, and how a consumer puts its batch together.

`format_of` is the one place that tells one kind of rows from another.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from collective._core.warm import Pool
    from collective._gate import Gate
    from collective._rows.order import Run
    from collective.abc import Buffer


class Piece(NamedTuple):
    """Rows on their way to one batch: how many lie in each part of the buffers, and the buffers, part after part."""

    parts: list[int]
    buffers: list[Buffer]
    encode: Callable[[], list[Buffer]] | None = None
    """Returns the buffers instead, where making them costs more than finding them; may run off the loop."""
    nbytes: int = 0
    """About how many bytes `encode` makes."""


class Block(ABC):
    """Rows that were put, checked and ready to be stored."""

    rows: int
    nbytes: int
    lasting: bool
    """Whether the memory will not change: it need not be copied."""


class Staged(ABC):
    """Rows of a block on their way into a storage."""

    nbytes: int
    """Bytes that `fill` copies."""

    @abstractmethod
    def fill(self, gate: Gate) -> None:
        """Copy them through a gate. May run off the loop where `nbytes` is large."""


class Storage(ABC):
    """A producer's rows that wait to be fetched, by their numbers."""

    held: int
    """Bytes of memory that it holds."""
    end: int
    """The number of the row after the last."""

    @abstractmethod
    def stage(self, block: Block, start: int, stop: int, *, keep: bool) -> Staged:
        """Make room for rows of a block, or take them as they are where `keep`. They are in it once they are added.

        What is staged and never added is forgotten.
        """

    @abstractmethod
    def add(self, staged: Staged) -> None:
        """Add rows that were staged last, and filled."""

    @abstractmethod
    def piece(self, first: int, stop: int) -> Piece:
        """Return rows; their memory is lent until they are released."""

    @abstractmethod
    def release(self, first: int, stop: int) -> None:
        """Forget rows, each once."""

    @abstractmethod
    def clear(self) -> None:
        """Forget all rows."""


class Landing(ABC):
    """One batch that comes in pieces."""

    @abstractmethod
    def place(self, run: Run, offset: int, count: int, buffers: Sequence[memoryview], start: int) -> None:
        """Put `count` rows of a part, from its `start`-th on, where `run` has its rows from the `offset`-th on.

        May run off the loop, for several pieces at once.
        """

    @abstractmethod
    def finish(self) -> Any:
        """Return the batch, once all its rows were placed."""


class Format(ABC):
    """The columns of a stream's rows. Equal formats have equal columns; travels to the consumers by pickle."""

    row_bytes: int
    """Bytes that a row takes; about, where rows differ."""
    exact: bool
    """Whether all rows take as many."""
    buffers: int
    """How many buffers a part of a piece has."""

    @abstractmethod
    def block(self, rows: Any) -> Block:
        """Check rows that were put against this format.

        Raises:
            ValueError, TypeError: they are of another.
        """

    @abstractmethod
    def storage(self, first: int, limit: int, pool: Pool) -> Storage:
        """Return an empty storage, for rows from the `first` on, of which at most `limit` bytes are to be kept."""

    @abstractmethod
    def landing(self, rows: int, valid: int, pool: Pool) -> Landing:
        """Return a batch of so many rows, of which the first `valid` will come and the others are padding."""

    @abstractmethod
    def split(self, parts: Sequence[int], buffer: memoryview) -> list[memoryview]:
        """Return the buffers of a piece that were joined into one. Of exact formats alone: others are not joined."""

    @abstractmethod
    def load(self) -> None:
        """Import what putting a batch together needs; takes seconds, so call it off the loop.

        Raises:
            ImportError: it is not installed here.
        """

    @property
    @abstractmethod
    def loaded(self) -> bool:
        """Whether `load` has nothing to do."""

    @abstractmethod
    def __str__(self) -> str: ...


def format_of(rows: Any) -> Format:
    """Return the format of rows that were put.

    Raises:
        TypeError, ValueError: they are no rows that can be sent.
    """
    pyarrow = sys.modules.get("pyarrow")
    if pyarrow is not None and isinstance(rows, pyarrow.RecordBatch | pyarrow.Table):
        from collective._rows.arrow import ArrowFormat

        return ArrowFormat.of(rows)
    if isinstance(rows, dict):
        from collective._rows.arrays import ArrayFormat

        return ArrayFormat.of(rows)
    raise TypeError(
        f"rows are a {type(rows).__module__}.{type(rows).__qualname__}; put a dict of arrays, a pyarrow.RecordBatch "
        "or a pyarrow.Table"
    )
