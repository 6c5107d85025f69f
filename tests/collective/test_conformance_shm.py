"""The backend "shm" passes the conformance suite, on the event loop that Ray's actors have."""

import pytest
import uvloop

from collective.testing import Case, conformance_cases


@pytest.mark.parametrize("case", conformance_cases("shm"), ids=str)
def test_conformance(case: Case) -> None:
    case.run(uvloop.run)
