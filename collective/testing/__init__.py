"""The conformance suite of groups: what every backend must do, as checks that a test module runs.

A test module for a backend is this:

    import pytest
    from collective.testing import conformance_cases

    @pytest.mark.parametrize("case", conformance_cases("mine"), ids=str)
    def test_conformance(case):
        case.run()

A case is one check on one backend with one group size and one mix of array kinds. It runs by itself, on an event loop
of its own, in one process: each rank has an endpoint of its own, joined to the others by memory links. It needs no
pytest, raises AssertionError (or what an operation raised, where it should not have) with the parameters that failed,
and never hangs: every case has a deadline. It also fails where it leaves a task behind, or an error that nobody saw.

What a check demands is in its docstring; `CHECKS` has them all. To write more of them, take `check` and `world`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from collective.testing import (
    _aliasing,
    _breaking,
    _errors,
    _forming,
    _in_place,
    _loss,
    _moving,
    _ordering,
    _outputs,
    _point_to_point,
    _reducing,
    _repartitioning,
    _scopes,
    _stopping,
    _subgroups,
    _withdrawing,
    _works,
)
from collective.testing._cases import MIXES, Case, Check, cases, check, checks_of
from collective.testing._world import World, world

if TYPE_CHECKING:
    from collections.abc import Sequence

CHECKS = checks_of(
    [
        _reducing,
        _moving,
        _repartitioning,
        _outputs,
        _in_place,
        _aliasing,
        _point_to_point,
        _withdrawing,
        _ordering,
        _scopes,
        _forming,
        _subgroups,
        _works,
        _errors,
        _breaking,
        _stopping,
        _loss,
    ]
)
"""Every check of the suite."""


def conformance_cases(
    backend: str, sizes: tuple[int, ...] = (1, 2, 3, 4), *, hosts: Sequence[str] = ("",), link: str = "memory"
) -> list[Case]:
    """Return every case of the suite for a backend, in an order that finds the simple failures first.

    :param hosts: the hosts on which the ranks pretend to be, in turn: ("a", "a", "b") has two on "a", then one on "b".
    :param link: the kind of link that joins the ranks; sends and receives travel over it.
    """
    return cases(CHECKS, backend, sizes, hosts=hosts, link=link)


__all__ = ["CHECKS", "MIXES", "Case", "Check", "World", "check", "conformance_cases", "world"]
