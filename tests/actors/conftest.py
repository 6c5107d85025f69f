from __future__ import annotations

import pytest
from actor_harness import KINDS


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """The kind of link between callers and actors."""
    return str(request.param)
