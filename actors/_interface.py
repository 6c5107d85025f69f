"""What can be called on an actor: names, kinds and parameters, without the class itself."""

from __future__ import annotations

import difflib
import enum
import functools
import inspect
from typing import TYPE_CHECKING, Any, NoReturn

from actors.actor import Actor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class Kind(enum.IntEnum):
    """How a method runs: on the loop, in a worker thread, as an async generator."""

    ASYNC = 0
    PLAIN = 1
    STREAM = 2


class Method:
    """One method of an interface.

    `check(None, *args, **kwargs)` raises TypeError where arguments do not fit. It is a function with the method's
    parameters and no body, so that Python itself checks, with its own words, in some 50 ns (`Signature.bind`: 3 us).
    """

    __slots__ = ("_check", "_owner", "_parameters", "kind", "name", "wire")

    def __init__(self, owner: str, name: str, kind: Kind, parameters: str, *, called: str | None = None) -> None:
        """:param called: what requests say, where that is not the name."""
        self.name = name
        self.kind = kind
        self.wire = wire_name(name if called is None else called, kind)
        self._owner = owner
        self._parameters = parameters
        self._check: Callable[..., None] | None = None

    @property
    def check(self) -> Callable[..., None]:
        check = self._check
        if check is None:
            namespace: dict[str, Any] = {}
            exec(f"def {self.name}{self._parameters}: pass", namespace)
            check = self._check = namespace[self.name]
            check.__qualname__ = f"{self._owner}.{self.name}"
        return check


STREAMING = 0x8000
"""Set in the length of a method's name where the caller expects a stream: an answer of another kind would be lost."""


def wire_name(name: str, kind: Kind) -> bytes:
    """Return what a request says of the method that it calls."""
    text = name.encode()
    return (len(text) | (STREAMING if kind is Kind.STREAM else 0)).to_bytes(2, "little") + text


class Interface:
    """The public methods of an actor class. Small, picklable without the class, and shared by equal handles."""

    __slots__ = ("_table", "methods", "owner")

    def __init__(self, owner: str, table: tuple[tuple[str, int, str], ...]) -> None:
        self.owner = owner
        self.methods: Mapping[str, Method] = {
            name: Method(owner, name, Kind(kind), parameters) for name, kind, parameters in table
        }
        self._table = table

    @staticmethod
    def of(cls: type) -> Interface:
        """Read the interface of a class: what it defines or inherits, without a leading underscore, beyond Actor's own.

        Raises:
            TypeError: a method's signature cannot be read.
        """
        return _interface(cls.__qualname__, tuple(_rows(cls)))

    def fail(self, role: str, name: str) -> NoReturn:
        """Raise the AttributeError for a name that is not a method."""
        if name.startswith("_"):
            problem = f"{name!r} is private: only methods without a leading underscore can be called from elsewhere"
        elif name in _OWN:
            problem = f"{name!r} belongs to the actor itself and cannot be called from elsewhere"
        else:
            near = " or ".join(map(repr, difflib.get_close_matches(name, self.methods)))
            hint = f"did you mean {near}?" if near else f"it has {', '.join(self.methods) or 'none'}"
            problem = f"no method {name!r} (attributes are not reachable); {hint}"
        raise AttributeError(f"{role} ({self.owner}): {problem}", name=name)

    def __reduce__(self) -> tuple[object, ...]:
        return _interface, (self.owner, self._table)

    def __repr__(self) -> str:
        return f"<Interface {self.owner}: {', '.join(self.methods)}>"


_OWN = frozenset(dir(Actor))


@functools.lru_cache(maxsize=256)
def _interface(owner: str, table: tuple[tuple[str, int, str], ...]) -> Interface:
    return Interface(owner, table)


def _rows(cls: type) -> list[tuple[str, int, str]]:
    rows = []
    for name in dir(cls):
        if name.startswith("_") or name in _OWN:
            continue
        raw = inspect.getattr_static(cls, name)
        function = raw.__func__ if isinstance(raw, staticmethod | classmethod) else raw
        if isinstance(function, property | type) or not callable(function):
            continue
        rows.append((name, int(_kind(function)), _parameters(cls, name, function, isinstance(raw, staticmethod))))
    return rows


def _kind(function: Any) -> Kind:
    if inspect.isasyncgenfunction(function):
        return Kind.STREAM
    return Kind.ASYNC if inspect.iscoroutinefunction(function) else Kind.PLAIN


class _Default:
    """Stands for a default value, which may be large or not picklable; only that there is one matters."""

    def __repr__(self) -> str:
        return "..."


def _parameters(cls: type, name: str, function: Any, static: bool) -> str:
    """Return the parameters as source, the receiver included, without annotations and default values."""
    try:
        signature = inspect.signature(function)
    except ValueError as error:
        raise TypeError(f"{cls.__qualname__}.{name} has no readable signature: {error}") from error
    parameters = [
        p.replace(annotation=p.empty, default=p.empty if p.default is p.empty else _Default())
        for p in signature.parameters.values()
    ]
    if static:
        positional_only = any(p.kind is p.POSITIONAL_ONLY for p in parameters)
        kind = inspect.Parameter.POSITIONAL_ONLY if positional_only else inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters.insert(0, inspect.Parameter("_actor", kind))
    elif not parameters or parameters[0].kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD):
        raise TypeError(f"{cls.__qualname__}.{name} takes no self")
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))
