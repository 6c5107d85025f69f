"""Values that the whole room shares: what is asked for, and what there is. Imports nothing of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from typing import Any, Generic, Literal, TypeAlias, TypeVar

Strategy: TypeAlias = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
"""How the bundles of a request are spread over nodes, in Ray's words."""

UNITS = 10_000
"""Resources are counted in 1/UNITS, as Ray counts them."""

_RESERVED = ("CPU", "GPU", "memory", "object_store_memory")
_RESERVED_PREFIXES = ("bundle_group_", "node:__internal_")

V = TypeVar("V")


class FrozenMap(Mapping[str, V], Generic[V]):
    """A mapping that cannot change, so that what holds it can be hashed; equal to any mapping of the same items."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, V] | None = None) -> None:
        self._items = dict(items or {})

    def __getitem__(self, key: str) -> V:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenMap, (self._items,)


@dataclass(frozen=True)
class Resources:
    """What one actor takes of its node, for as long as it lives.

    Amounts are counted in steps of 1/10,000 and rounded down to one. They are what the scheduler counts, not a limit on
    what the process uses.

    :param cpu: CPUs. 0 places the actor also where every CPU is taken.
    :param gpu: GPUs: a whole number, or a part of one.
    :param memory: bytes.
    :param custom: resources by the names that the nodes were started with.
    """

    cpu: float = 1.0
    gpu: float = 0.0
    memory: int = 0
    custom: Mapping[str, float] = field(default_factory=FrozenMap)

    def __post_init__(self) -> None:
        object.__setattr__(self, "cpu", _amount("cpu", self.cpu))
        object.__setattr__(self, "gpu", _amount("gpu", self.gpu))
        if self.gpu > 1 and self.gpu != int(self.gpu):
            raise ValueError(f"Resources(gpu={self.gpu!r}): above 1, only whole GPUs can be had")
        memory = _amount("memory", self.memory)
        if memory != int(memory):
            raise ValueError(f"Resources(memory={self.memory!r}): memory is a whole number of bytes")
        object.__setattr__(self, "memory", int(memory))
        if not isinstance(self.custom, Mapping):
            raise TypeError(f"Resources(custom={self.custom!r}): needs a mapping of resource names to amounts")
        for name in self.custom:
            if not isinstance(name, str):
                raise TypeError(f"Resources(custom={dict(self.custom)!r}): {name!r} is not a string")
            if not name or name in _RESERVED or name.startswith(_RESERVED_PREFIXES):
                raise ValueError(
                    f"Resources(custom={dict(self.custom)!r}): {name!r} is not a custom resource; "
                    "CPUs, GPUs and memory are Resources(cpu=..., gpu=..., memory=...)"
                )
        amounts = {name: _amount(name, amount) for name, amount in self.custom.items()}
        object.__setattr__(self, "custom", FrozenMap({name: amount for name, amount in amounts.items() if amount}))

    def amounts(self) -> dict[str, float]:
        """Return what is asked for by Ray's names, without zeros."""
        amounts: dict[str, float] = {"CPU": self.cpu, "GPU": self.gpu, "memory": self.memory, **self.custom}
        return {name: amount for name, amount in amounts.items() if amount}

    def __str__(self) -> str:
        return describe_amounts(self.amounts()) or "0 CPU"


def _amount(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"Resources: {name} is {value!r}; it must be a number")
    amount = float(value)
    if not math.isfinite(amount) or amount < 0:
        raise ValueError(f"Resources: {name} is {value!r}; it must be finite and not negative")
    units = count_units(amount)
    if amount and not units:
        raise ValueError(f"Resources: {name} is {value!r}; the smallest amount is {1 / UNITS:g}")
    return units / UNITS


def count_units(amount: float) -> int:
    """Return an amount as a whole number of 1/UNITS, rounded down."""
    if amount == int(amount):
        return int(amount) * UNITS  # exact for bytes, too
    # The hundredth of a unit keeps 0.57 (5699.999... units in binary) what it says.
    return math.floor(amount * UNITS + 0.01)


def units_lost(units: int) -> int:
    """Return how many of these units Ray may lose on their way.

    Ray keeps whole units and passes floating-point numbers around, cutting each time what is below a unit: 0.57
    arrives as 0.5699. Measured with 2.60: an amount takes at most two such steps, and loses at most two units.
    """
    kept = units
    for _ in range(2):
        kept = int(kept / UNITS * UNITS)
    return units - kept


def describe_amounts(amounts: Mapping[str, float]) -> str:
    """Return amounts by Ray's names in words, such as "2 CPU, 1.5 GiB memory"."""
    return ", ".join(
        f"{_bytes(amount)} {name}" if name.endswith("memory") else f"{round(amount, 4):g} {name}"
        for name, amount in amounts.items()
    )


def _bytes(amount: float) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if amount >= size:
            return f"{amount / size:.4g} {unit}"
    return f"{amount:g} B"


@dataclass(frozen=True)
class Demand:
    """`count` actors of one role, each of which takes `resources`."""

    role: str
    count: int
    resources: Resources = field(default_factory=Resources)

    def __post_init__(self) -> None:
        if not isinstance(self.count, int) or isinstance(self.count, bool):
            raise TypeError(f"Demand({self.role!r}): count is {self.count!r}; it must be a whole number")
        if self.count < 1:
            raise ValueError(f"Demand({self.role!r}): count is {self.count!r}; it must be at least 1")


@dataclass(frozen=True)
class Bundle:
    """Resources that are reserved together on one node, for the actors that will live there.

    :param resources: what the members take together.
    :param members: (role, rank) of each.
    :param labels: the node must have these labels, in the syntax of `on_labels`.
    """

    resources: Resources
    members: tuple[tuple[str, int], ...]
    labels: Mapping[str, str] = field(default_factory=FrozenMap)


@dataclass(frozen=True)
class Request:
    """A whole gang as one placement group: all of its bundles are reserved, or none."""

    bundles: tuple[Bundle, ...]
    strategy: Strategy = "PACK"

    def bundle_of(self, role: str, rank: int) -> int:
        """Return the index of the bundle that an actor lives in.

        Raises:
            KeyError: the gang has no such actor.
        """
        return self._places[role, rank]

    @cached_property
    def _places(self) -> dict[tuple[str, int], int]:
        return {member: index for index, bundle in enumerate(self.bundles) for member in bundle.members}


@dataclass(frozen=True)
class Node:
    """A living node of the cluster; amounts are by Ray's names.

    :param total: what it has when nothing runs there.
    :param available: what is free now.
    """

    id: str
    name: str
    total: Mapping[str, float]
    available: Mapping[str, float] = field(default_factory=FrozenMap)
    labels: Mapping[str, str] = field(default_factory=FrozenMap)


@dataclass(frozen=True)
class Holder:
    """Who holds resources: "placement group 'x'" or "actor Foo (pid 7)", and how much it holds on which node."""

    what: str
    node_id: str
    amounts: Mapping[str, float]


@dataclass(frozen=True)
class Shortage:
    """A role that cannot fit, and why.

    :param count: actors of the role in the gang.
    :param resources: what each of them asks for.
    :param labels: labels that their node must have.
    :param reason: why there is no room, in words.
    """

    role: str
    count: int
    resources: Resources
    labels: Mapping[str, str]
    reason: str

    def __str__(self) -> str:
        where = f" on nodes with labels {dict(self.labels)!r}" if self.labels else ""
        return f"{self.role}: {self.count} x ({self.resources}){where}: {self.reason}"
