"""What can never fit: pure logic over bundles and the totals of nodes.

The answer is exact for strict_pack and strict_spread. For pack and spread it is the bin packing problem: exact wherever
a greedy packing, a counting argument or a bounded search decides, and "may fit" elsewhere, so that what Ray could place
is never called infeasible. Everything is counted in whole units, so no answer depends on rounding.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scheduling._packing import (
    BinKind,
    ItemClass,
    Overflow,
    Size,
    find_overflow,
    fits,
    greedy_packs,
    match_apart,
    search_packs,
)
from scheduling.types import UNITS, Shortage, count_units, describe_amounts, units_lost

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from scheduling.types import Bundle, Demand, Node, Request

_SELECTOR = re.compile(r"(!?)(?:in\((.*)\)|(.*))")


def find_shortages(demands: Sequence[Demand], request: Request, nodes: Sequence[Node]) -> tuple[Shortage, ...]:
    """Return the roles that can never fit on these nodes, were they idle; nothing where the request may fit.

    Deterministic, and independent of the order of the nodes but for the wording.
    """
    problem = _Problem(request, nodes)
    reasons = problem.solve()
    return tuple(
        Shortage(demand.role, demand.count, demand.resources, problem.labels_of[demand.role], reasons[demand.role])
        for demand in demands
        if demand.role in reasons
    )


def labels_match(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Return whether a node with these labels satisfies a selector, as Ray reads it."""
    for key, wanted in selector.items():
        parsed = _SELECTOR.fullmatch(wanted)
        assert parsed is not None  # it matches any text
        negated, several, one = parsed.groups()
        values = [one] if several is None else [value.strip() for value in several.split(",")]
        if (labels.get(key) in values) == bool(negated):
            return False
    return True


@dataclass(frozen=True)
class _Kind:
    """Bundles that are alike: `example` is one of `count`."""

    example: Bundle
    count: int
    roles: tuple[str, ...]


class _Problem:
    """A request over nodes, as a packing problem."""

    def __init__(self, request: Request, nodes: Sequence[Node]) -> None:
        self.strategy = request.strategy
        self.bundles = _group(request.bundles)
        self.labels_of = {role: kind.example.labels for kind in self.bundles for role in kind.roles}
        self.names = sorted({name for kind in self.bundles for name in kind.example.resources.amounts()})
        self.node_count = len(nodes)
        # Nodes alike in what was asked for, and in the selectors that they satisfy, are one kind.
        selectors = list(dict.fromkeys(kind.example.labels for kind in self.bundles))
        counted = Counter(
            (self._capacity(node), tuple(labels_match(selector, node.labels) for selector in selectors))
            for node in nodes
        )
        self.nodes = [BinKind(count, size) for (size, _), count in counted.items()]
        matches = [dict(zip(selectors, matched, strict=True)) for _, matched in counted]
        self.eligible = [
            [k for k, matched in enumerate(matches) if matched[kind.example.labels]] for kind in self.bundles
        ]
        self.items = [
            ItemClass(kind.count, size, frozenset(k for k in eligible if fits(size, self.nodes[k].capacity)))
            for kind, eligible in zip(self.bundles, self.eligible, strict=True)
            for size in [self._size(kind.example)]
        ]

    # Both lean to "fits" by the units that Ray loses, as it does itself.

    def _size(self, bundle: Bundle) -> Size:
        amounts = bundle.resources.amounts()
        units = [count_units(amounts.get(name, 0.0)) for name in self.names]
        return tuple(count - units_lost(count) for count in units)

    def _capacity(self, node: Node) -> Size:
        units = [count_units(node.total.get(name, 0.0)) for name in self.names]
        return tuple(count + 2 if count % UNITS else count for count in units)

    def solve(self) -> dict[str, str]:
        """Return the reason for each role that does not fit."""
        reasons: dict[str, str] = {}
        for index, items in enumerate(self.items):
            if not items.kinds:
                reasons.update(self._blame([index], self._why_alone(index)))
        if reasons:
            return reasons
        if self.strategy == "STRICT_PACK":
            return self._strict_pack()
        if self.strategy == "STRICT_SPREAD":
            overflow = match_apart(self.items, self.nodes)
            return {} if overflow is None else self._blame(overflow.classes, self._why_apart(overflow))
        return self._pack()

    def _strict_pack(self) -> dict[str, str]:
        together = [sum(items.count * items.size[d] for items in self.items) for d in range(len(self.names))]
        shared = frozenset[int].intersection(*(frozenset(eligible) for eligible in self.eligible))
        if any(fits(tuple(together), self.nodes[k].capacity) for k in shared):
            return {}
        what = self._describe(tuple(together)) or "0 CPU"
        where = "no node has that" if shared else "no node has the labels of all of them"
        return self._blame(range(len(self.items)), f"the gang needs one node with {what}; {where}")

    def _pack(self) -> dict[str, str]:
        if greedy_packs(self.items, self.nodes):
            return {}
        overflow = find_overflow(self.items, self.nodes)
        if overflow is not None:
            return self._blame(overflow.classes, self._why_together(overflow))
        if search_packs(self.items, self.nodes) is False:
            reason = "each fits alone, but there is no way to place all of them at once"
            return self._blame(range(len(self.items)), reason)
        return {}

    def _why_alone(self, index: int) -> str:
        size, eligible = self.items[index].size, self.eligible[index]
        share = self._share(index)
        if not self.node_count:
            return "the cluster has no node"
        if not eligible:
            return "no node has these labels"
        short = [d for d, need in enumerate(size) if all(self.nodes[k].capacity[d] < need for k in eligible)]
        lacking = self._describe(tuple(need if d in short else 0 for d, need in enumerate(size)))
        return f"{share}no node has {lacking}" if short else f"{share}no node has {self._describe(size)} together"

    def _why_apart(self, overflow: Overflow) -> str:
        roles = self._roles(overflow.classes)
        return (
            f"{_and(roles)} need{'s' if len(roles) == 1 else ''} {overflow.needed} different nodes; "
            f"{overflow.room} could hold {'it' if len(roles) == 1 else 'one of them'}"
        )

    def _why_together(self, overflow: Overflow) -> str:
        roles = _and(self._roles(overflow.classes))
        share = self._share(overflow.classes[0]) if len(overflow.classes) == 1 else ""
        if overflow.dimension is None:
            return f"{share}there is room for {overflow.room} of {overflow.needed} at once ({roles})"
        name = self.names[overflow.dimension]
        needed, room = (describe_amounts({name: count / UNITS}) for count in (overflow.needed, overflow.room))
        return f"{share}{roles} together need {needed}; the nodes that can hold one have {room}"

    def _share(self, index: int) -> str:
        example = self.bundles[index].example
        if len(example.members) == 1:
            return ""
        shares = Counter(role for role, _ in example.members)
        what = _and([f"{count} {role}" for role, count in shares.items()])
        return f"a share of {what} takes {example.resources} on one node; "

    def _roles(self, classes: Iterable[int]) -> list[str]:
        return list(dict.fromkeys(role for index in classes for role in self.bundles[index].roles))

    def _blame(self, classes: Iterable[int], reason: str) -> dict[str, str]:
        return dict.fromkeys(self._roles(classes), reason)

    def _describe(self, size: Size) -> str:
        return describe_amounts({name: units / UNITS for name, units in zip(self.names, size, strict=True) if units})


def _group(bundles: Sequence[Bundle]) -> list[_Kind]:
    kinds: dict[object, list[Bundle]] = {}
    for bundle in bundles:
        kinds.setdefault((bundle.resources, bundle.labels), []).append(bundle)
    return [
        _Kind(alike[0], len(alike), tuple(dict.fromkeys(role for bundle in alike for role, _ in bundle.members)))
        for alike in kinds.values()
    ]


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
