"""The conformance suite notices what it is there to notice: each of these faults fails a case."""

from typing import Any

import numpy as np
import pytest

from collective import reductions
from collective._core import operations
from collective._core.mailbox import Mailbox
from collective._gate import Gate
from collective.testing import Case, conformance_cases
from collective.types import ReduceOp


def _case(name: str) -> Case:
    return [case for case in conformance_cases("memory", sizes=(1, 2, 3)) if case.check.name == name][-1]


def _chunks_as_numpy(rows: int, size: int) -> tuple[int, ...]:
    return tuple(len(part) for part in np.array_split(np.zeros(rows), size))


def _accumulate_in_halves(arrays: Any, op: Any, out: Any, *, accumulate: Any) -> None:
    _reduce_chunks(arrays, op, out, accumulate=out.dtype)


_reduce_chunks = reductions._reduce_chunks


@pytest.mark.parametrize(
    ("check", "owner", "name", "fault"),
    [
        ("reduce_scatter_table", operations, "chunks", _chunks_as_numpy),
        ("halves_accumulate_in_float32", reductions, "_reduce_chunks", _accumulate_in_halves),
        ("cancelled_recv_is_withdrawn", Mailbox, "_give_up", lambda self, recv: False),
        ("failed_operations_leave_memory_alone", Gate, "shut", lambda self: None),
        ("a_recv_that_is_given_up_leaves_out_alone", Gate, "shut", lambda self: None),
    ],
)
def test_faults_are_found(check: str, owner: Any, name: str, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _case(check).run()
    monkeypatch.setattr(owner, name, fault)
    with pytest.raises(AssertionError):  # noqa: PT012 (where the machine is busy, a thread may be done before it is caught)
        for _ in range(5 if owner is Gate else 1):
            _case(check).run()


def test_nan_that_is_skipped_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(reductions._UFUNCS, ReduceOp.MIN, np.fmin)
    with pytest.raises(AssertionError, match="NaN at"):
        _case("nan_wins_min_and_max").run()


def test_every_check_says_what_it_demands_and_has_cases() -> None:
    cases = conformance_cases("memory")
    assert len({str(case) for case in cases}) == len(cases)
    for case in cases:
        assert case.check.body.__doc__, f"{case.check.name} has no docstring"
