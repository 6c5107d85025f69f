"""The backend "two-level" passes the conformance suite, on hosts that are pretended."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import uvloop
from case_choice import cases_of, module_of

if TYPE_CHECKING:
    from collective.testing import Case

# Kinds of array are tried on the other data planes, and the table of reductions on planes of four by test_two_level.py.
CASES = [case for case in cases_of("two-level", (3,), hosts=("a", "b", "a")) if case.mix == "numpy"]
CASES += [
    case
    for case in cases_of("two-level", (4,), hosts=("a", "a", "b", "b"))
    if case.mix == "numpy" and module_of(case) in ("_moving", "_loss")
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_conformance(case: Case) -> None:
    case.run(uvloop.run)
