"""The backend "memory" passes the conformance suite."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from case_choice import cases_of

if TYPE_CHECKING:
    from collective.testing import Case


@pytest.mark.parametrize("case", cases_of("memory"), ids=str)
def test_conformance(case: Case) -> None:
    case.run()
