from __future__ import annotations

import pytest
from link_harness import KINDS, LOOPS, SOCKETS


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Every kind of link."""
    value: str = request.param
    return value


@pytest.fixture(params=SOCKETS)
def socket_kind(request: pytest.FixtureRequest) -> str:
    """The kinds that go over sockets."""
    value: str = request.param
    return value


@pytest.fixture(params=LOOPS)
def loop(request: pytest.FixtureRequest) -> str:
    """Every event loop."""
    value: str = request.param
    return value
