"""The backend "gloo" passes the conformance suite, on the event loop that Ray's actors have."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import uvloop
from case_choice import cases_of

if TYPE_CHECKING:
    from collective.testing import Case


@pytest.mark.parametrize("case", cases_of("gloo"), ids=str)
def test_conformance(case: Case) -> None:
    case.run(uvloop.run)
