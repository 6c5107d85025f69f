"""Which cases of the conformance suite our own data planes run: those that differ in the code they go through."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from collective.testing import conformance_cases

if TYPE_CHECKING:
    from collective.testing import Case

BY_SIZE = ("_reducing", "_moving", "_repartitioning", "_ordering", "_subgroups")
"""Modules of checks in which four members do other things than three."""


def cases_of(backend: str, sizes: tuple[int, ...] = (1, 2, 3, 4), **options: Any) -> list[Case]:
    """Return cases in which each check meets the data plane at every size that matters, and each kind of array once.

    Kinds of array are told apart above the planes, where group sizes are not looked at. Sends and receives go over
    links on every plane: the memory plane runs their checks for all, and so does each other kind of link.
    """
    return [case for case in conformance_cases(backend, sizes, **options) if _differs(case)]


def module_of(case: Case) -> str:
    """Return the module of a case's check, as in "_moving"."""
    return case.check.body.__module__.rpartition(".")[2]


def _differs(case: Case) -> bool:
    reference = case.backend == "memory"
    if case.mix != "numpy" and not (reference and case.size == 1):
        return case.size == (3 if 3 in case.check.sizes else max(case.check.sizes))
    if module_of(case) in ("_point_to_point", "_withdrawing") and case.link == "memory":
        return reference
    return reference or case.size < 4 or len(case.hosts) > 1 or module_of(case) in BY_SIZE
