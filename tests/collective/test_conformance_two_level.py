"""The backend "two-level" passes the conformance suite, on hosts that are pretended."""

import pytest
import uvloop

from collective.testing import Case, conformance_cases

HOSTS = {3: ("a", "b", "a"), 4: ("a", "a", "b", "b")}
# What kinds of array there are is the same above every data plane, and tried on the others.
CASES = [
    case
    for size, hosts in HOSTS.items()
    for case in conformance_cases("two-level", (size,), hosts=hosts)
    if case.mix == "numpy"
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_conformance(case: Case) -> None:
    case.run(uvloop.run)
