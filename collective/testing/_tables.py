"""Run a long table of collectives on one world, many of them in flight at once."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

from collective.testing._arrays import check_array
from collective.testing._world import attempt, issue, outcomes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy as np

    from collective.testing._world import World
    from collective.work import Work

    Expected: TypeAlias = "np.ndarray | list[np.ndarray] | None"

_IN_FLIGHT = 64
_STRIDE = 11
"""Prime to the number of shapes, forms, kinds and roots, so that every one of them has its turn."""


class Trial:
    """One line of a table: an operation, and what every rank must get from it.

    :param expected: by rank: an array, a list of arrays, or None.
    :param operation: called with a group and `args`; see `World.call`.
    :param exact: see `check_array`.
    :param kinds: by rank: the kind of array that it must get; the world's own by default.
    """

    def __init__(
        self,
        label: str,
        expected: Sequence[Expected],
        operation: Callable[..., Work[Any]],
        *args: Any,
        exact: bool = True,
        kinds: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        self.label = label
        self.expected = expected
        self.operation = operation
        self.args = args
        self.options = options
        self.exact = exact
        self.kinds = kinds

    def check(self, results: Sequence[Any], kinds: Sequence[str]) -> None:
        """Assert that these are the right results, by rank."""
        for rank, result in enumerate(results):
            try:
                _compare(result, self.expected[rank], (self.kinds or kinds)[rank], exact=self.exact)
            except AssertionError as error:
                raise AssertionError(f"{self.label}: rank {rank}: {error}") from None


async def run_table(world: World, trials: Iterable[Trial]) -> None:
    """Issue the trials in order and check every result; where kinds mix, only some: each kind has its own world.

    Raises:
        AssertionError: naming the first lines that failed, and how many did.
    """
    failures: list[str] = []
    waiting: list[tuple[Trial, list[Any]]] = []
    count = 0

    async def collect() -> None:
        for trial, works in waiting:
            try:
                trial.check(await outcomes(works), world.kinds)
            except AssertionError as error:
                failures.append(f"  {error}")
        waiting.clear()

    for trial in islice(trials, 0, None, _STRIDE if len(set(world.kinds)) > 1 else 1):
        count += 1
        works = [attempt(issue, trial.operation, group, *trial.args, **trial.options) for group in world.groups]
        waiting.append((trial, works))
        if len(waiting) == _IN_FLIGHT:
            await collect()
    await collect()
    assert count, "the table is empty"
    assert not failures, "\n".join([f"{len(failures)} of {count} lines of the table failed:", *failures[:12]])


def _compare(result: Any, expected: Expected, kind: str, *, exact: bool) -> None:
    assert not isinstance(result, BaseException), f"raised {result!r}"
    if expected is None:
        assert result is None, f"got {result!r}, expected None"
    elif isinstance(expected, list):
        assert isinstance(result, list), f"got a {type(result).__name__}, expected a list"
        assert len(result) == len(expected), f"got {len(result)} parts, expected {len(expected)}"
        for part, wanted in zip(result, expected, strict=True):
            check_array(part, wanted, kind, exact=exact)
    else:
        check_array(result, expected, kind, exact=exact)
