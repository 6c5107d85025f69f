"""The error tree of this room.

    SchedulingError
     |- GangInfeasible              the cluster can never hold the gang
     |- GangTimeout (TimeoutError)  the gang's resources were not free in time
     |- ReservationLost             somebody removed the gang's placement group
     `- RayUnavailable (ConnectionError)    Ray could not be joined or started

    CpusOversubscribed (RuntimeWarning)     a one-machine Ray was started with more CPUs than the machine has

Bad arguments are ValueError or TypeError, as everywhere in Python.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from scheduling.types import describe_amounts

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from scheduling.types import Demand, Holder, Node, Shortage

_MOST = 20
"""Nodes, roles or holders that a message lists before it says how many more there are."""


class SchedulingError(Exception):
    """Base of every error that this package defines."""


class RayUnavailable(SchedulingError, ConnectionError):
    """Ray could not be joined or started."""


class CpusOversubscribed(RuntimeWarning):
    """A one-machine Ray was started with more CPUs than the machine has: its actors will share them."""


class ReservationLost(SchedulingError):
    """Somebody removed the gang's placement group while the gang waited for it."""

    def __init__(self, gang: str) -> None:
        super().__init__(f"the placement group of gang {gang!r} was removed by somebody else; start the gang again")
        self.gang = gang

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.gang,)


class GangInfeasible(SchedulingError):
    """The cluster, however idle, cannot hold the gang.

    :ivar shortages: each role that does not fit, what it asks for, and why it does not fit.
    :ivar nodes: the nodes that there are.
    """

    def __init__(self, gang: str, shortages: Sequence[Shortage], nodes: Sequence[Node]) -> None:
        asked = {name for short in shortages for name in short.resources.amounts()}
        labelled = any(short.labels for short in shortages)
        super().__init__(
            f"gang {gang!r} can never fit on this cluster:\n"
            + _lines(str(short) for short in shortages)
            + f"\nthe {len(nodes)} node{'s have' if len(nodes) != 1 else ' has'}, when idle:\n"
            + (_lines(_describe_nodes(nodes, asked, labelled)) or "  nothing")
            + "\nask for less, choose another placement, or add nodes"
        )
        self.gang = gang
        self.shortages = tuple(shortages)
        self.nodes = tuple(nodes)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.gang, self.shortages, self.nodes)


class GangTimeout(SchedulingError, TimeoutError):
    """The resources of the gang were not free together within its `start_timeout`.

    :ivar timeout: seconds that it waited.
    :ivar demands: what was asked for.
    :ivar holders: who holds resources that the gang asks for.
    :ivar nodes: the nodes, with what is free on each.
    :ivar shortages: what not even the idle cluster could hold, where its autoscaler was expected to add nodes.
    """

    def __init__(
        self,
        gang: str,
        timeout: float,
        demands: Sequence[Demand],
        holders: Sequence[Holder],
        nodes: Sequence[Node],
        shortages: Sequence[Shortage] = (),
    ) -> None:
        asked = {name for demand in demands for name in demand.resources.amounts()}
        names = {node.id: node_name(node) for node in nodes}
        held = [
            f"{holder.what}: {describe_amounts(holder.amounts)} on {names.get(holder.node_id, 'a node that is gone')}"
            for holder in holders
        ]
        super().__init__(
            f"gang {gang!r} waited {timeout:g} s for its resources:\n"
            + _lines(f"{demand.role}: {demand.count} x ({demand.resources})" for demand in demands)
            + (f"\nthe autoscaler added no node that holds these:\n{_lines(map(str, shortages))}" if shortages else "")
            + f"\nfree:\n{_lines(_describe_free(nodes, asked)) or '  nothing, there is no node'}"
            + f"\nheld by:\n{_lines(held) or '  no placement group and no actor: it may be running tasks'}"
            + "\nend what holds them, ask for less, or raise the gang's start_timeout"
        )
        self.gang = gang
        self.timeout = timeout
        self.demands = tuple(demands)
        self.holders = tuple(holders)
        self.nodes = tuple(nodes)
        self.shortages = tuple(shortages)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.gang, self.timeout, self.demands, self.holders, self.nodes, self.shortages)


def node_name(node: Node) -> str:
    """Return how messages call a node."""
    return f"node {node.name} ({node.id[:8]})"


def _lines(items: Iterable[str]) -> str:
    lines = [f"  {item}" for item in items]
    more = [f"  and {len(lines) - _MOST} more"] if len(lines) > _MOST else []
    return "\n".join(lines[:_MOST] + more)


def _shown(amounts: Mapping[str, float], asked: Iterable[str] = ()) -> dict[str, float]:
    """Leave out what Ray keeps for itself, unless it was asked for; what was asked for and is not there is 0."""
    hidden = ("object_store_memory", "node:", "bundle_group_")
    asked = set(asked)
    shown = {name: amounts[name] for name in sorted(amounts) if name in asked or not name.startswith(hidden)}
    return {**shown, **dict.fromkeys(sorted(asked - shown.keys()), 0.0)}


def _describe_free(nodes: Sequence[Node], asked: set[str]) -> list[str]:
    """One line a node, the emptiest first."""

    def free(node: Node) -> dict[str, float]:
        return {name: node.available.get(name, 0.0) for name in sorted(asked or {"memory"}) if node.total.get(name)}

    emptiest = sorted(nodes, key=lambda node: (-sum(amount > 0 for amount in free(node).values()), node.id))
    return [
        f"{node_name(node)}: "
        + (
            "; ".join(
                f"{describe_amounts({name: amount})} of {describe_amounts({name: node.total[name]})}"
                for name, amount in free(node).items()
            )
            or "has none of it"
        )
        for node in emptiest
    ]


def _describe_nodes(nodes: Sequence[Node], asked: set[str], labelled: bool) -> list[str]:
    """One line a kind of node: a cluster of thousands has few kinds."""
    kinds: Counter[str] = Counter()
    example: dict[str, Node] = {}
    for node in nodes:
        labels = {key: value for key, value in sorted(node.labels.items()) if key != "ray.io/node-id"}
        kind = (describe_amounts(_shown(node.total, asked)) or "nothing") + (f", labels {labels!r}" if labelled else "")
        kinds[kind] += 1
        example.setdefault(kind, node)
    return [
        f"{node_name(example[kind])}{f' and {count - 1} alike' if count > 1 else ''}: {kind}"
        for kind, count in kinds.items()
    ]
