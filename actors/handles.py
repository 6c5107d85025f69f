"""References to actors: what calls are made on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar, cast, overload

from actors._broadcast import broadcast
from actors._caller import call
from actors._interface import Kind
from actors._pickling import Lent, dumps
from actors._scopes import call_to
from actors.actor import Actor
from actors.errors import NotReady
from actors.streams import Stream, Streams
from collective._integers import integer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence

    from actors._interface import Interface, Method
    from actors._target import Target

A = TypeVar("A", bound=Actor)
P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


def lend(value: T) -> T:
    """Have a call carry the arrays and tensors in `value` without copying them first; they arrive as they otherwise do.

    For an argument, `await handle.fit(lend(batch))`, a result, `return lend(self.weights)`, or an item of a stream, or
    any part of one. Otherwise what a call carries is what it was when the call was made, when the method returned or
    when the generator yielded, and memory that somebody could change before it has left is copied for that. Who lends
    gives his word that nobody changes it for longer: an argument before the call has returned or raised, a result or an
    item before the reader has it, memory of `collective.links.allocate` before all receivers have let go. Where that
    does not hold, what arrives is partly old and partly new; nothing else comes of it. Numbers, strings and the like
    are copied in any case.

    What it returns stands for `value` in what is sent, and is of no other use.
    """
    return cast("T", Lent(value))


class Handle(Generic[A]):
    """A picklable reference to one actor. It works wherever an event loop runs and the actor can be reached.

    `handle.fit(100)` and `handle.call(Trainer.fit, 100)` are the same; a type checker knows the second. Both check name
    and arguments at once, and return a coroutine. The call leaves at its first step, and calls of one caller to one
    actor start in the order in which they left. Cancelling the coroutine cancels the method. An async generator method
    gives a Stream.

    Equal to other handles of the same actor. Holds a key that opens this actor's calls and nothing else.
    """

    def __init__(self, target: Target) -> None:
        self._target = target

    @property
    def role(self) -> str:
        """The name of the actor's role."""
        return self._target.role

    @property
    def rank(self) -> int:
        """The actor's rank within its role."""
        return self._target.rank

    @property
    def ray_actor(self) -> Any:
        """The Ray actor behind it.

        Raises:
            NotReady: the gang runs on another runtime.
        """
        native = self._target.native
        if native is None:
            raise NotReady(f"{self._target} is no Ray actor: its gang runs on a runtime that has none")
        return native()

    @overload
    def call(  # type: ignore[overload-overlap]  # the overload for plain methods takes anything
        self, method: Callable[Concatenate[A, P], AsyncIterator[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> Stream[T]: ...
    @overload
    def call(
        self, method: Callable[Concatenate[A, P], Coroutine[Any, Any, R]], /, *args: P.args, **kwargs: P.kwargs
    ) -> Coroutine[Any, Any, R]: ...
    @overload
    def call(
        self, method: Callable[Concatenate[A, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> Coroutine[Any, Any, R]: ...
    def call(self, /, *args: Any, **kwargs: Any) -> Any:
        """Call a method, given as the function of the class: `handle.call(Trainer.fit, 100)`.

        Where the class has a method `call` of its own, what does not start with a method of the class is for that one.

        Raises:
            AttributeError: the actor has no public method of that name.
            TypeError: the arguments do not fit.
        """
        name, args = _called(self._target.interface, args)
        return self.__getattr__(name)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_target":  # what copy, pickle and inspect look for
            raise AttributeError(name)
        target = self._target
        method = target.interface.methods.get(name)
        if method is None:
            target.interface.fail(target.role, name)
        bound = BoundMethod(target, method)
        if name not in _HIDING:
            self.__dict__[name] = bound
        return bound

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Handle) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def __reduce__(self) -> tuple[object, ...]:
        return Handle, (self._target,)

    def __repr__(self) -> str:
        return f"<Handle {self._target} of gang {self._target.gang!r}>"

    def _identity(self) -> tuple[str, str, int]:
        return self._target.gang, self._target.role, self._target.rank


class Handles(Generic[A]):
    """Handles of the actors of one role in rank order: a sequence, on which a call goes to every one.

    `await handles.fit(100)` returns a list in rank order; `handles.fit.map(items)` gives one item to each. If one call
    fails, the others are cancelled and an ExceptionGroup names who failed. An async generator method gives Streams.
    """

    def __init__(self, role: str, interface: Interface, handles: Sequence[Handle[A]]) -> None:
        self._role = role
        self._interface = interface
        self._handles = tuple(handles)

    @property
    def role(self) -> str:
        """The name of the role."""
        return self._role

    @overload
    def call(  # type: ignore[overload-overlap]  # the overload for plain methods takes anything
        self, method: Callable[Concatenate[A, P], AsyncIterator[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> Streams[T]: ...
    @overload
    def call(
        self, method: Callable[Concatenate[A, P], Coroutine[Any, Any, R]], /, *args: P.args, **kwargs: P.kwargs
    ) -> Coroutine[Any, Any, list[R]]: ...
    @overload
    def call(
        self, method: Callable[Concatenate[A, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> Coroutine[Any, Any, list[R]]: ...
    def call(self, /, *args: Any, **kwargs: Any) -> Any:
        """Call a method on every actor, given as the function of the class: `handles.call(Trainer.fit, 100)`.

        Where the class has a method `call` of its own, what does not start with a method of the class is for that one.

        Raises:
            AttributeError: the actors have no public method of that name.
            TypeError: the arguments do not fit.
        """
        name, args = _called(self._interface, args)
        return self.__getattr__(name)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_interface":
            raise AttributeError(name)
        method = self._interface.methods.get(name)
        if method is None:
            self._interface.fail(self._role, name)
        bound = BoundMethods([handle._target for handle in self._handles], method)
        if name not in _HIDING:
            self.__dict__[name] = bound
        return bound

    def __len__(self) -> int:
        return len(self._handles)

    def __iter__(self) -> Iterator[Handle[A]]:
        return iter(self._handles)

    def __reversed__(self) -> Iterator[Handle[A]]:
        return reversed(self._handles)

    def __contains__(self, handle: object) -> bool:
        return handle in self._handles

    @overload
    def __getitem__(self, index: int) -> Handle[A]: ...
    @overload
    def __getitem__(self, index: slice) -> Handles[A]: ...
    def __getitem__(self, index: int | slice) -> Handle[A] | Handles[A]:
        if isinstance(index, slice):
            return Handles(self._role, self._interface, self._handles[index])
        index = integer(index, f"the index of {self._role}", "an int or a slice")
        try:
            return self._handles[index]
        except IndexError:
            raise IndexError(f"{self._role}[{index}]: there are {len(self)} handles") from None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Handles) and self._role == other._role and self._handles == other._handles

    def __hash__(self) -> int:
        return hash((self._role, self._handles))

    def __reduce__(self) -> tuple[object, ...]:
        return Handles, (self._role, self._interface, self._handles)

    def __repr__(self) -> str:
        return f"<Handles {self._role}[{', '.join(str(handle.rank) for handle in self._handles)}]>"


class BoundMethod:
    """A method of one actor, ready to be called."""

    __slots__ = ("_check", "_method", "_name", "_target")

    def __init__(self, target: Target, method: Method) -> None:
        self._target = target
        self._method = method
        self._name = f"{target}.{method.name}"
        self._check = method.check

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._check(None, *args, **kwargs)
        if self._method.kind is Kind.STREAM:
            return Stream(self._target, self._method, args, kwargs)
        coroutine: Any = call(self._target, self._method, self._name, args, kwargs)
        coroutine.__qualname__ = self._name  # for "was never awaited", and the names of tasks in debuggers
        return coroutine

    def __repr__(self) -> str:
        return f"<method {self._name}>"


class BoundMethods:
    """A method of several actors of one role, ready to be called."""

    __slots__ = ("_method", "_targets")

    def __init__(self, targets: Sequence[Target], method: Method) -> None:
        self._targets = targets
        self._method = method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._method.check(None, *args, **kwargs)
        if self._method.kind is Kind.STREAM:
            scope = call_to(self._targets)
            return Streams([Stream(target, self._method, args, kwargs, scope) for target in self._targets])
        return self._broadcast([(args, kwargs)])

    def map(self, items: Iterable[Any]) -> Any:
        """Call it with one item on each actor, in rank order: `handles.fit.map(items)`.

        Raises:
            ValueError: there are not as many items as actors.
        """
        each = [(item,) for item in items]
        if len(each) != len(self._targets):
            raise ValueError(f"{self!r}.map: {len(each)} items for {len(self._targets)} actors; give one to each")
        for args in each:
            self._method.check(None, *args)
        if self._method.kind is Kind.STREAM:
            pairs = zip(self._targets, each, strict=True)
            scope = call_to(self._targets)
            return Streams([Stream(target, self._method, args, {}, scope) for target, args in pairs])
        return self._broadcast([(args, {}) for args in each])

    async def _broadcast(self, arguments: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[Any]:
        """Call it with one tuple of arguments for all, pickled once, or with one for each."""
        what = f"an argument of {self!r}"
        pickles = [dumps(each, what) for each in arguments]
        del arguments
        # Once it has run out an iterator holds nothing of them, as this frame would.
        leaving = iter(pickles * len(self._targets) if len(pickles) == 1 else pickles)
        del pickles
        return await broadcast(self._targets, self._method, leaving, call_to(self._targets))

    def __repr__(self) -> str:
        role = self._targets[0].role if self._targets else "(nobody)"
        return f"{role}.{self._method.name}"


_HIDING = frozenset({"call"})
"""What a handle and an actor may both have: the handle's comes first, and passes on what is for the actor's."""


def _called(interface: Interface, args: tuple[Any, ...]) -> tuple[str, tuple[Any, ...]]:
    """Return the name of the method that `call(*args)` is for, and the arguments for it."""
    method = args[0] if args else None
    name = getattr(method, "__name__", None) if callable(method) else None
    if "call" in interface.methods and name not in interface.methods:
        return "call", args
    if not isinstance(name, str):
        raise TypeError(f"call() takes a method of the actor class, as in call(Trainer.fit, ...), not {method!r}")
    return name, args[1:]
