from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from link_harness import KINDS, LOOPS, SOCKETS

from collective._links import arena

if TYPE_CHECKING:
    from collections.abc import Callable


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


@pytest.fixture
def small_arena(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], arena.Arena]:
    """Give this process an arena of so many bytes; with 0 everything goes through the rings."""

    def make(limit: int) -> arena.Arena:
        made = arena.Arena(limit)
        monkeypatch.setattr(arena, "_arena", made)
        return made

    return make


@pytest.fixture(params=LOOPS)
def loop(request: pytest.FixtureRequest) -> str:
    """Every event loop."""
    value: str = request.param
    return value
