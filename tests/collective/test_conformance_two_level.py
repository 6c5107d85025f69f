"""The backend "two-level" passes the conformance suite, on hosts that are pretended."""

import pytest
import uvloop

from collective.testing import Case, conformance_cases

# Kinds of array are the same above every data plane, and tried on the others; so is what moves no data.
CASES = [case for case in conformance_cases("two-level", (3,), hosts=("a", "b", "a")) if case.mix == "numpy"]
CASES += [
    case
    for case in conformance_cases("two-level", (4,), hosts=("a", "a", "b", "b"))
    if case.mix == "numpy" and case.check.body.__module__.endswith(("_moving", "_reducing", "_loss"))
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_conformance(case: Case) -> None:
    case.run(uvloop.run)
