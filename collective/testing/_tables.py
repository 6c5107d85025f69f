"""Run a long table of collectives on one world, many of them in flight at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from collective.testing._arrays import check_array
from collective.testing._world import attempt, outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from collective.group import Group
    from collective.testing._world import World
    from collective.work import Work

Expected: TypeAlias = "np.ndarray | list[np.ndarray] | None"

_IN_FLIGHT = 64


@dataclass(frozen=True)
class Trial:
    """One line of a table: an operation, and what every rank must get from it.

    :param issue: issues it on one rank, with new inputs.
    :param expected: by rank: an array, a list of arrays, or None.
    :param exact: see `check_array`.
    :param kinds: by rank: the kind of array that it must get; the world's own by default.
    """

    label: str
    issue: Callable[[Group], Work[Any]]
    expected: Sequence[Expected]
    exact: bool = True
    kinds: Sequence[str] | None = None


async def run_table(world: World, trials: Iterable[Trial]) -> None:
    """Issue the trials in order and check every result.

    Raises:
        AssertionError: naming the first lines that failed, and how many did.
    """
    failures: list[str] = []
    waiting: list[tuple[Trial, list[Any]]] = []
    count = 0
    for trial in trials:
        count += 1
        waiting.append((trial, [attempt(lambda group=group: trial.issue(group)) for group in world.groups]))  # type: ignore[misc]
        if len(waiting) == _IN_FLIGHT:
            failures += await _collect(world, waiting)
            waiting.clear()
    failures += await _collect(world, waiting)
    assert count, "the table is empty"
    assert not failures, "\n".join([f"{len(failures)} of {count} lines of the table failed:", *failures[:12]])


async def _collect(world: World, waiting: Sequence[tuple[Trial, list[Any]]]) -> list[str]:
    failures = []
    for trial, works in waiting:
        results = [await outcome(work) for work in works]
        try:
            for rank, result in enumerate(results):
                kind = trial.kinds[rank] if trial.kinds else world.kinds[rank]
                _compare(result, trial.expected[rank], kind, exact=trial.exact)
        except AssertionError as error:
            failures.append(f"  {trial.label}: rank {rank}: {error}")
    return failures


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
