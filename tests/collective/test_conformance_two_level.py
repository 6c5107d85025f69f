"""The backend "two-level" passes the conformance suite, on hosts that are pretended."""

import pytest
import uvloop

from collective.testing import Case, conformance_cases

# Kinds of array are the same above every data plane, and tried on the others; so is what moves no data. Sends go over
# links on all of them, and the table of reductions is tried on planes of four by test_two_level.py.
CASES = [
    case
    for case in conformance_cases("two-level", (3,), hosts=("a", "b", "a"))
    if case.mix == "numpy" and not case.check.body.__module__.endswith("_point_to_point")
]
CASES += [
    case
    for case in conformance_cases("two-level", (4,), hosts=("a", "a", "b", "b"))
    if case.mix == "numpy" and case.check.body.__module__.endswith(("_moving", "_loss"))
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_conformance(case: Case) -> None:
    case.run(uvloop.run)
