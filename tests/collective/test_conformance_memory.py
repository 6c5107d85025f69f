"""The backend "memory" passes the conformance suite."""

import pytest

from collective.testing import Case, conformance_cases


@pytest.mark.parametrize("case", conformance_cases("memory"), ids=str)
def test_conformance(case: Case) -> None:
    case.run()
