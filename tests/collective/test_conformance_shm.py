"""The backend "shm" passes the conformance suite, on the event loop that Ray's actors have."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import uvloop
from case_choice import cases_of, module_of

if TYPE_CHECKING:
    from collective.testing import Case


@pytest.mark.parametrize("case", cases_of("shm"), ids=str)
def test_conformance(case: Case) -> None:
    case.run(uvloop.run)


# Sends and receives go another way where links share memory.
OVER_LINKS = [
    case
    for case in cases_of("shm", (2, 3), link="shm")
    if module_of(case) in ("_point_to_point", "_withdrawing", "_aliasing", "_loss", "_breaking", "_stopping")
]


@pytest.mark.parametrize("case", OVER_LINKS, ids=str)
def test_conformance_over_shared_memory(case: Case) -> None:
    case.run(uvloop.run)
