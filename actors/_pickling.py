"""How arguments, results and exceptions travel: pickle protocol 5, with array memory beside the pickle.

C pickle where it serves, cloudpickle where it does not: for lambdas and local classes, and for whatever refers to
`__main__`, since the other process has another one.

An array that arrives out of band is read-only, on every kind of link, because over shared memory it is the sender's
memory. torch has no read-only tensors; a tensor takes the writable memory below, or private pages of the sender's.
"""

from __future__ import annotations

import copyreg
import functools
import io
import os
import pickle
import sys
import threading
import traceback
from collections import ChainMap
from types import FunctionType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from actors.errors import NotPicklable, RemoteError, RemoteTraceback
from collective import freight
from collective.errors import OutOfResources
from collective.links import private, snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Sequence
    from types import TracebackType

    from collective.abc import Buffer, Link
    from collective.store import TensorRef

T = TypeVar("T")

PROTOCOL = 5


class Beside(list[Any]):
    """What is beside a pickle: the memory of its arrays, and the refs to tensors that it has in it."""

    def __init__(
        self, buffers: Iterable[Buffer], refs: Sequence[TensorRef] = (), lent: Container[int] = frozenset()
    ) -> None:
        super().__init__(buffers)
        self.refs = refs
        self._lent = lent
        self._taken = not self

    def take(self, link: Link | None, *, must: bool = False) -> bool:
        """Copy what its owners could change, once for all receivers; return whether what is here stays as it is.

        Nobody may hold the arrays on the sender's part any more, lest they be copied without need.

        :param link: what it leaves by, if there is one yet.
        :param must: do so even where as many copies as there may be are under way; see `collective.links.snapshot`.
        """
        shared = link is None or link.kind == "shm"
        self._taken = self._taken or snapshot(self, self._lent, must=must, shared=shared)
        return self._taken


class Lent(Generic[T]):
    """What `lend` returns. Where it is pickled, what is in it is, and the memory that is met meanwhile is lent."""

    __slots__ = ("_value",)

    def __init__(self, value: T) -> None:
        self._value = value

    def __reduce__(self) -> tuple[object, ...]:
        return _second, (_Mark(lends=True), self._value, _Mark(lends=False))

    def __repr__(self) -> str:
        return f"<{type(self._value).__name__}, lent>"


class _Mark:
    """Tells the memory that is met while a Lent is pickled: pickle takes a tuple apart in its order."""

    __slots__ = ("_lends",)

    def __init__(self, *, lends: bool) -> None:
        self._lends = lends

    def __reduce__(self) -> tuple[object, ...]:
        _leaving.mark(lends=self._lends)
        return bool, ()


def _second(_: object, value: T, __: object) -> T:
    return value


class _Leaving(threading.local):
    """The memory beside what this thread pickles, and the places of what is lent of it."""

    buffers: Sequence[object] = ()
    lent: frozenset[int] = frozenset()
    _begun: tuple[int, ...] = ()

    def start(self, buffers: list[pickle.PickleBuffer]) -> None:
        buffers.clear()
        self.buffers = buffers
        self.lent, self._begun = frozenset(), ()

    def mark(self, *, lends: bool) -> None:
        if lends:
            self._begun += (len(self.buffers),)
        elif self._begun:
            self.lent = self.lent.union(range(self._begun[-1], len(self.buffers)))
            self._begun = self._begun[:-1]


_leaving = _Leaving()


def dumps(obj: object, what: str, of: object = None, *, in_call: bool = True) -> tuple[bytes, list[Any]]:
    """Take an object apart into a pickle and what is beside it: nothing, or a Beside.

    The memory is the object's own until `Beside.take`. Only what goes `in_call` may have refs to tensors in it.

    :param what: names the object in the error; so does `of`, whose text is taken only then.

    Raises:
        NotPicklable: neither pickle nor cloudpickle can.
    """
    refs = freight.start_leaving() if in_call else []
    try:
        return _dumps(obj, what, of, refs)
    finally:
        freight.stop_leaving()
        _leaving.buffers = ()  # They hold the arrays.


def _dumps(obj: object, what: str, of: object, refs: list[TensorRef]) -> tuple[bytes, list[Any]]:
    buffers: list[pickle.PickleBuffer] = []
    _leaving.start(buffers)
    try:
        by_table = _by_table or "torch" in sys.modules
        if not by_table:
            data = pickle.dumps(obj, PROTOCOL, buffer_callback=buffers.append)
        if by_table or _IN_BAND in data or _ARROW in data:
            _leaving.start(buffers)
            refs.clear()
            data = _dumps_arrays(obj, buffers.append)
        by_value = b"__main__" in data
    except Exception:  # whatever a __reduce__ raises: cloudpickle tries next, and reports its own failure
        by_value = True
    if by_value:
        _leaving.start(buffers)
        refs.clear()
        try:
            data = _dumps_by_value(obj, buffers.append)
        except Exception as error:
            raise _not_picklable(what, of, error) from error
    if not buffers and not refs:
        return data, []
    return data, Beside([buffer.raw() for buffer in buffers], refs, _leaving.lent)


def loads(data: Buffer, buffers: Sequence[memoryview], what: str, of: object = None) -> Any:
    """Put an object together again, in memory that `buffers` hand over.

    Raises:
        NotPicklable: what the pickle needs is missing here, or fails.
    """
    if type(buffers) is Beside:
        freight.start_arriving(buffers.refs)
        try:
            return loads(data, list(buffers), what, of)
        finally:
            freight.stop_arriving()
    try:
        if not buffers:
            return pickle.loads(data)
        shown = [buffer.toreadonly() for buffer in buffers]
        _lent.buffers = {id(view): buffer for view, buffer in zip(shown, buffers, strict=True)}
        try:
            return pickle.loads(data, buffers=shown)
        finally:
            del _lent.buffers
    except Exception as error:
        raise _not_picklable(what, of, error) from error


def _not_picklable(what: str, of: object, error: Exception) -> Exception:
    name = what if of is None else f"{what} of {of}"
    # Where a module has to be imported, its file cannot be opened; that says nothing of the object.
    exhausted = OutOfResources.of(error, f"this process ({os.getpid()})", f"take apart or put together {name}")
    return exhausted or NotPicklable(name, f"{type(error).__name__}: {error}")


def dumps_error(error: BaseException, own_modules: Container[str]) -> tuple[str, str, str, bytes | None]:
    """Take an exception apart: its type and text for people, its traceback, and its pickle where it has one.

    :param own_modules: whose frames the traceback does not start with.
    """
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_globals.get("__name__") in own_modules:
        trace = trace.tb_next
    return name, _text(error), _format(error, trace), _pickle_error(error)


def loads_error(record: tuple[str, str, str, bytes | None], where: str) -> Exception:
    """Put an exception together again, as its own type where that works here; its cause is the remote traceback."""
    name, text, trace, data = record
    error: Exception = RemoteError(where, name, text)
    if data is not None:
        try:
            own = pickle.loads(data)
        except Exception:  # its class is missing here, or cannot be rebuilt: the name and text must do
            own = None
        if isinstance(own, Exception):
            error = own
    error.__cause__ = RemoteTraceback(trace)
    error.add_note(f"in {where}")
    return error


class _Lent(threading.local):
    """The buffers below the read-only views of the `loads` that runs in this thread; most are writable."""

    buffers: dict[int, memoryview]


_lent = _Lent()
_table: dict[type, Any] = {}
_table_of = 0
_by_table = False
"""Whether an array was met here that numpy pickles in band, or one of Arrow: the next ones are not pickled twice."""
_IN_BAND = b"reconstruct"
"""In every pickle that holds an array's elements itself, as numpy does with arrays that have no flat buffer."""
_ARROW = b"pyarrow"
"""In every pickle that has Arrow data in it. That pyarrow is loaded says nothing: Ray loads it in all workers."""


def _dumps_arrays(obj: object, keep: Callable[[pickle.PickleBuffer], Any]) -> bytes:
    """Pickle with all arrays out of band. Costs a microsecond more than `pickle.dumps`."""
    global _by_table
    _by_table = True
    file = io.BytesIO()
    pickler = pickle.Pickler(file, PROTOCOL, buffer_callback=keep)
    pickler.dispatch_table = _array_table()
    pickler.dump(obj)
    return file.getvalue()


def _array_table() -> dict[type, Any]:
    """Return `collective.tensors.Reducers`, made anew where copyreg's table has grown; imports numpy."""
    global _table, _table_of
    if _table_of != len(copyreg.dispatch_table):
        from collective.tensors import Reducers

        _table_of = len(copyreg.dispatch_table)
        _table = Reducers(of_tensors=_taking_memory)
    return _table


def _taking_memory(reduce: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def reduce_taking(array: Any) -> Any:
        reduced = reduce(array)
        if isinstance(reduced, tuple) and reduced[1] and isinstance(reduced[1][0], pickle.PickleBuffer):
            rebuild, arguments, *rest = reduced
            return _rebuild_taking, (rebuild, *arguments), *rest
        return reduced

    return reduce_taking


def _rebuild_taking(rebuild: Callable[..., Any], content: Any, *rest: Any) -> Any:
    lent: dict[int, memoryview] = getattr(_lent, "buffers", {})
    buffer = lent.pop(id(content), None)
    return rebuild(content if buffer is None else private(buffer), *rest)


def _dumps_by_value(obj: object, keep: Callable[[pickle.PickleBuffer], Any] | None) -> bytes:
    import cloudpickle  # type: ignore[import-untyped]  # slow to import, and seldom needed

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        dispatch_table: ClassVar[Any] = ChainMap(
            _array_table() | {functools.singledispatchmethod: _reduce_dispatching}, cloudpickle.Pickler.dispatch_table
        )

    file = io.BytesIO()
    Pickler(file, PROTOCOL, buffer_callback=keep).dump(obj)
    return file.getvalue()


def _reduce_dispatching(method: functools.singledispatchmethod[Any]) -> Any:
    """Take a method of a class of `__main__` apart: its cache, of weak references, cannot travel."""
    return _rebuild_dispatching, (method.func, dict(method.dispatcher.registry))


def _rebuild_dispatching(function: Any, registry: dict[type, Any]) -> functools.singledispatchmethod[Any]:
    method = functools.singledispatchmethod(function)
    for kind, implementation in registry.items():
        if kind is not object:
            method.dispatcher.register(kind, implementation)
    return method


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as broken:  # its own __str__ fails; the report of it must not
        return f"<its __str__ raised {type(broken).__name__}>"


def _format(error: BaseException, trace: TracebackType | None) -> str:
    try:
        return "".join(traceback.format_exception(type(error), error, trace))
    except Exception as broken:
        return f"{type(error).__name__} (its traceback cannot be shown: {type(broken).__name__})\n"


def _pickle_error(error: BaseException) -> bytes | None:
    """Pickle an exception so that it comes back as it is, or return None."""
    if not isinstance(error, Exception):
        return None
    for by_parts in (True, False):
        try:
            data = _dumps_error(error, by_parts=by_parts)
            back = pickle.loads(data)
        except Exception:  # where both ways fail, the caller gets type, text and traceback in a RemoteError
            continue
        if type(back) is type(error) and _text(back) == _text(error):
            return data
    return None


def _dumps_error(error: Exception, *, by_parts: bool) -> bytes:
    """Pickle an exception, and what it holds.

    Pickle rebuilds an exception by calling its class with `args`. That goes wrong where `__init__` composes the message
    from other parameters, which is common; `by_parts` puts the attributes back instead, without calling `__init__`. It
    loses what an exception keeps in C, as a UnicodeError does.
    """
    import cloudpickle

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        def reducer_override(self, obj: Any) -> Any:
            kind = type(obj)
            if by_parts and issubclass(kind, BaseException) and isinstance(kind.__init__, FunctionType):
                if kind.__reduce__ in (BaseException.__reduce__, OSError.__reduce__):
                    return _rebuild_error, (kind, obj.args, obj.__dict__)
            return super().reducer_override(obj)

    file = io.BytesIO()
    Pickler(file, PROTOCOL).dump(error)
    return file.getvalue()


def _rebuild_error(kind: type[BaseException], args: tuple[Any, ...], state: dict[str, Any]) -> BaseException:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error
