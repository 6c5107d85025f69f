"""The backend "two-level" passes the conformance suite, on hosts that are pretended."""

import pytest
import uvloop

from collective.testing import Case, conformance_cases

CASES = [
    *conformance_cases("two-level", (3,), hosts=("a", "b", "a")),
    *conformance_cases("two-level", (4,), hosts=("a", "a", "b", "b")),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_conformance(case: Case) -> None:
    case.run(uvloop.run)
