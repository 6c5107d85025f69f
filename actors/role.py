"""What a gang is made of: how many actors of which class."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from actors._interface import Interface
from actors.actor import Actor
from collective._integers import integer
from scheduling.types import Demand, Resources

if TYPE_CHECKING:
    from collections.abc import Mapping

A = TypeVar("A", bound=Actor)


@dataclass(frozen=True, eq=False)
class Role(Generic[A]):
    """`count` actors of one class, with the same constructor arguments.

    :param name: unique in the gang.
    :param args, kwargs: for the constructor of each; they travel by pickle, on every runtime.
    :param resources: what each actor takes of its node.
    :param store_bytes: bytes that the store of each actor may hold; by default a quarter of its host's memory.
    :param threads: worker threads for the plain methods of each actor; more than one gives up their call order.
    """

    name: str
    cls: type[A]
    count: int = 1
    args: tuple[Any, ...] = field(default=(), kw_only=True)
    kwargs: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    resources: Resources = field(default_factory=Resources, kw_only=True)
    threads: int = field(default=1, kw_only=True)
    store_bytes: int | None = field(default=None, kw_only=True)

    def check(self) -> None:
        """Raise ValueError or TypeError where this role could not be started anywhere."""
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"role {self.name!r}: its name must be a string that is not empty")
        if not isinstance(self.cls, type) or not issubclass(self.cls, Actor):
            raise TypeError(f"role {self.name!r}: {self.cls!r} is no subclass of Actor")
        if missing := sorted(getattr(self.cls, "__abstractmethods__", ())):
            raise TypeError(f"role {self.name!r}: {self.cls.__qualname__} leaves {', '.join(missing)} abstract")
        for what in ("count", "threads", "store_bytes"):
            if getattr(self, what) is None and what == "store_bytes":
                continue
            number = integer(getattr(self, what), f"role {self.name!r}: {what}", "it must be a whole number")
            object.__setattr__(self, what, number)
            if number < 1:
                raise ValueError(f"role {self.name!r}: {what} is {number}; it must be at least 1")
        if not isinstance(self.resources, Resources):
            raise TypeError(f"role {self.name!r}: resources is {self.resources!r}; it must be a scheduling.Resources")
        if not isinstance(self.args, tuple | list):
            raise TypeError(f"role {self.name!r}: args is {self.args!r}; it must be a tuple")
        try:
            inspect.signature(self.cls).bind(*self.args, **self.kwargs)
        except TypeError as error:
            raise TypeError(f"role {self.name!r}: the arguments do not fit {self.cls.__qualname__}: {error}") from None
        Interface.of(self.cls)

    def demand(self) -> Demand:
        """Return what the role asks of a cluster."""
        return Demand(self.name, self.count, self.resources)
