"""Placement templates: plain words for where the actors of a gang go.

They combine with `&`: `spread() & on_labels({"zone": "a"})`, `colocate("reader", "trainer") & strict_spread()`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scheduling.abc import Placement
from scheduling.types import UNITS, Bundle, Demand, FrozenMap, Request, Resources, Strategy, count_units

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_VALUE = r"[a-zA-Z0-9]([a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_SELECTOR = re.compile(rf"!?({_VALUE}|in\({_VALUE}(, ?{_VALUE})*\))")


def pack() -> Template:
    """Put the actors on as few nodes as possible; on more where one is not enough."""
    return Template(strategy="PACK")


def spread() -> Template:
    """Put the actors on as many nodes as possible; several on one where there are not enough nodes."""
    return Template(strategy="SPREAD")


def strict_pack() -> Template:
    """Put all actors on one node."""
    return Template(strategy="STRICT_PACK")


def strict_spread() -> Template:
    """Put each actor (with `colocate`: each share) on a node of its own."""
    return Template(strategy="STRICT_SPREAD")


def colocate(*roles: str) -> Template:
    """Let these roles share nodes, in equal shares.

    There are as many shares as the counts of the roles divide by: 4 readers and 2 trainers make 2 shares, of readers
    0-1 with trainer 0, and of readers 2-3 with trainer 1. A share is never torn over two nodes; two shares may meet on
    one (`& strict_spread()` keeps them apart). Actors of other roles are placed one by one.

    Raises:
        ValueError: fewer than two roles, or one of them twice.
    """
    if any(not isinstance(role, str) for role in roles):
        raise TypeError(f"colocate{roles!r}: roles are named by strings")
    if len(roles) < 2:
        raise ValueError(f"colocate{roles!r}: needs at least two roles that shall share nodes")
    _refuse_repeats(f"colocate{roles!r}", roles)
    return Template(shares=(roles,))


def on_labels(labels: Mapping[str, str], roles: Iterable[str] | None = None) -> Template:
    """Put actors only on nodes that have all of these labels.

    A value is matched as it is; "!a" takes nodes without it, "in(a, b)" those with one of these, "!in(a, b)" those with
    none of these.

    :param roles: the roles that this holds for; by default all.

    Raises:
        ValueError: no labels, no roles, or a value that is none of the above.
    """
    labels = FrozenMap(labels)
    if not labels:
        raise ValueError("on_labels({}): needs at least one label")
    for key, value in labels.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"on_labels({labels!r}): labels and their values are strings")
        if not _SELECTOR.fullmatch(value):
            raise ValueError(
                f"on_labels({labels!r}): {value!r} is not a value, !value, in(value, ...) or !in(value, ...)"
            )
    if isinstance(roles, str):
        raise TypeError(f"on_labels({labels!r}, {roles!r}): roles is a list of role names, not one string")
    chosen = None if roles is None else tuple(roles)
    if chosen == ():
        raise ValueError(f"on_labels({labels!r}, roles=()): names no role")
    return Template(labels=((labels, chosen),))


@dataclass(frozen=True)
class Template(Placement):
    """What the functions of this module return: a strategy, roles that share nodes, and labels.

    :param strategy: None means "PACK".
    :param shares: groups of roles that share nodes.
    :param labels: label selectors, each with the roles that it holds for (None: all).
    """

    strategy: Strategy | None = None
    shares: tuple[tuple[str, ...], ...] = ()
    labels: tuple[tuple[FrozenMap[str], tuple[str, ...] | None], ...] = ()

    def __and__(self, other: Template) -> Template:
        """Return a template that keeps both.

        Raises:
            ValueError: they contradict each other.
        """
        if not isinstance(other, Template):
            return NotImplemented
        if self.strategy and other.strategy and self.strategy != other.strategy:
            raise ValueError(f"{self.strategy} & {other.strategy}: a gang is spread in one way")
        shares = self.shares + other.shares
        _refuse_repeats(" & ".join(f"colocate{roles!r}" for roles in shares), [role for s in shares for role in s])
        return Template(self.strategy or other.strategy, shares, self.labels + other.labels)

    def request(self, demands: Sequence[Demand]) -> Request:
        """Turn the roles into bundles: one an actor, or one a share of roles that share nodes."""
        by_role = {demand.role: demand for demand in demands}
        if not demands:
            raise ValueError("a gang needs at least one role")
        _refuse_repeats("the gang", [demand.role for demand in demands])
        for roles in (*self.shares, *(roles for _, roles in self.labels if roles)):
            for role in roles:
                if role not in by_role:
                    raise ValueError(f"the placement names role {role!r}; the gang has {', '.join(map(repr, by_role))}")
        bundles: list[Bundle] = []
        done: set[str] = set()
        for demand in demands:
            if demand.role in done:
                continue
            roles = next((roles for roles in self.shares if demand.role in roles), (demand.role,))
            done.update(roles)
            bundles += self._bundles([by_role[role] for role in roles])
        return Request(tuple(bundles), self.strategy or "PACK")

    def _bundles(self, demands: list[Demand]) -> list[Bundle]:
        shares = math.gcd(*(demand.count for demand in demands))
        parts = [Demand(demand.role, demand.count // shares, demand.resources) for demand in demands]
        resources = _sum(parts)
        labels = self._labels([demand.role for demand in demands])
        return [
            Bundle(
                resources,
                tuple((part.role, share * part.count + index) for part in parts for index in range(part.count)),
                labels,
            )
            for share in range(shares)
        ]

    def _labels(self, roles: list[str]) -> FrozenMap[str]:
        merged: dict[str, str] = {}
        for labels, chosen in self.labels:
            if chosen is None or not set(chosen).isdisjoint(roles):
                for key, value in labels.items():
                    if merged.setdefault(key, value) != value:
                        raise ValueError(
                            f"label {key!r} must be {merged[key]!r} and {value!r} for the same node, "
                            f"that of {' and '.join(map(repr, roles))}"
                        )
        return FrozenMap(merged)


def _sum(parts: list[Demand]) -> Resources:
    """Return what one share takes. Sums are taken in whole units: three times 0.1 is 0.3."""
    units: dict[str, int] = {}
    for part in parts:
        for name, amount in part.resources.amounts().items():
            units[name] = units.get(name, 0) + part.count * count_units(amount)
    units["GPU"] = _gpu_units(parts)
    return Resources(
        cpu=units.pop("CPU", 0) / UNITS,
        gpu=units.pop("GPU") / UNITS,
        memory=units.pop("memory", 0) // UNITS,
        custom={name: count / UNITS for name, count in units.items()},
    )


def _gpu_units(parts: list[Demand]) -> int:
    """Return the GPUs of a share, such that parts of GPUs never straddle two of them.

    Up to one GPU the parts simply share it. Beyond, each role gets whole GPUs of its own: three actors of 0.6 GPU need
    three GPUs, not 1.8, and whatever order they come in, the parts of one role fill its GPUs without gaps.
    """
    needs = [(part.count, count_units(part.resources.gpu)) for part in parts if part.resources.gpu]
    total = sum(count * units for count, units in needs)
    if total <= UNITS:
        return total
    return sum(
        count * units if units >= UNITS else math.ceil(count / (UNITS // units)) * UNITS for count, units in needs
    )


def _refuse_repeats(what: str, roles: Sequence[str]) -> None:
    repeated = sorted({role for role in roles if roles.count(role) > 1})
    if repeated:
        raise ValueError(f"{what}: role {repeated[0]!r} is named twice")
