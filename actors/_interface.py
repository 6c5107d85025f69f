"""What can be called on an actor: names, kinds and parameters, without the class itself."""

from __future__ import annotations

import difflib
import enum
import functools
import inspect
from types import FunctionType, MethodType
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
            exec(f"def check{self._parameters}: pass", namespace)
            check = self._check = namespace["check"]
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

        What a decorator or a descriptor made of a method is taken as Python binds it; a wrapper has its own parameters.

        Raises:
            TypeError: a method takes no self.
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


_UNCHECKED = "(_actor, /, *args, **kwargs)"
"""Parameters of what takes anything, as far as can be known without an instance."""


def _rows(cls: type) -> list[tuple[str, int, str]]:
    rows = []
    for name in dir(cls):
        if name.startswith("_") or name in _OWN:
            continue
        raw = inspect.getattr_static(cls, name)
        function = None if isinstance(raw, type) else _bind(cls, raw)
        if callable(function):  # unlike a class in the class, a property, or a constant
            rows.append((name, int(_kind(raw, function)), _parameters(cls, name, raw, function)))
    return rows


def _bind(cls: type, raw: Any) -> Any:
    """Return what Python gives for an attribute of a class, None where instances alone have it."""
    bind = getattr(type(raw), "__get__", None)
    try:
        return raw if bind is None else bind(raw, None, cls)
    except AttributeError:
        return None


def _kind(raw: Any, function: Any) -> Kind:
    """Return how a method runs. A plain wrapper runs where what it says that it wraps would."""
    inwards = [raw, function]
    while inwards:
        each = inwards.pop()
        if inspect.isasyncgenfunction(each):
            return Kind.STREAM
        if inspect.iscoroutinefunction(each):
            return Kind.ASYNC
        if isinstance(each, functools.partial | functools.partialmethod | functools.singledispatchmethod):
            inwards.append(each.func)
        elif isinstance(each, MethodType):
            inwards.append(each.__func__)
        # Statically: objects that answer to every name would answer to this one, too, for ever.
        elif (wrapped := inspect.getattr_static(each, "__wrapped__", None)) is not None:
            inwards.append(wrapped)
        elif isinstance(call := getattr(type(each), "__call__", None), FunctionType):  # noqa: B004
            inwards.append(call)
    return Kind.PLAIN


class _Default:
    """Stands for a default value, which may be large or not picklable; only that there is one matters."""

    def __repr__(self) -> str:
        return "..."


def _parameters(cls: type, name: str, raw: Any, function: Any) -> str:
    """Return the parameters as source, the receiver included, without annotations and default values.

    A wrapper's own: what it wraps may take others.
    """
    takes_self = isinstance(function, FunctionType) and isinstance(raw, FunctionType | functools.partialmethod)
    known = (staticmethod, classmethod, functools.partialmethod)
    if not takes_self and hasattr(type(raw), "__get__") and not isinstance(raw, known):
        return _UNCHECKED  # a descriptor of somebody's own, or a method written in C
    try:
        signature = inspect.signature(function, follow_wrapped=False)
    except ValueError:  # it is written in C, and does not say
        return _UNCHECKED
    parameters = [
        p.replace(annotation=p.empty, default=p.empty if p.default is p.empty else _Default())
        for p in signature.parameters.values()
    ]
    if not takes_self:
        positional_only = any(p.kind is p.POSITIONAL_ONLY for p in parameters)
        kind = inspect.Parameter.POSITIONAL_ONLY if positional_only else inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters.insert(0, inspect.Parameter("_actor", kind))
    elif not parameters or parameters[0].kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD):
        raise TypeError(f"{cls.__qualname__}.{name} takes no self")
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))
