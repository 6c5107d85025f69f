"""The backend "shm" passes the conformance suite, on the event loop that Ray's actors have."""

import pytest
import uvloop

from collective.testing import Case, conformance_cases


@pytest.mark.parametrize("case", conformance_cases("shm"), ids=str)
def test_conformance(case: Case) -> None:
    case.run(uvloop.run)


# Sends and receives go another way where links share memory.
OVER_LINKS = [
    case
    for case in conformance_cases("shm", (2, 3), link="shm")
    if case.check.body.__module__.endswith(("_point_to_point", "_aliasing", "_loss", "_breaking"))
]


@pytest.mark.parametrize("case", OVER_LINKS, ids=str)
def test_conformance_over_shared_memory(case: Case) -> None:
    case.run(uvloop.run)
