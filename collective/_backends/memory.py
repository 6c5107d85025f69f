"""The data plane of groups whose members share one process and event loop. It is the specification: slow and obvious.

Members of one group and epoch meet in a `_Meeting`. The last one to call an operation computes it for all of them:
results first, in memory of their own, and then each is copied to its target.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypeAlias
from weakref import WeakValueDictionary

import numpy as np

from collective._core.offload import LONG, offload
from collective._gate import Gate
from collective.abc import DataPlane, PlaneContext
from collective.errors import BackendError
from collective.reductions import reduce_arrays

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from collective.types import ReduceOp

Arrays: TypeAlias = "Sequence[np.ndarray]"
Compute: TypeAlias = "Callable[[Sequence[Arrays]], Sequence[Arrays]]"
"""Each member's sources, in rank order, to each member's results."""


class _Call(NamedTuple):
    """What one member passed to an operation."""

    sources: Arrays
    targets: Arrays
    done: asyncio.Future[None]


class _Meeting:
    """Where the members of one group and epoch meet. It lives as long as one of them holds it."""

    def __init__(self, size: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.size = size
        self.present: set[int] = set()
        self.everyone = asyncio.Event()
        self.broken = False
        self.gate = Gate()
        self._joining: dict[int, dict[int, _Call]] = {}
        """By place in the order of operations, who has called so far."""
        self._ready: deque[tuple[Compute, list[_Call]]] = deque()
        self._busy = False

    def join(self, place: int, rank: int, call: _Call, compute: Compute) -> None:
        """Enter a member's call; the last one's runs the operation, after those before it."""
        calls = self._joining.setdefault(place, {})
        calls[rank] = call
        if len(calls) == self.size:
            del self._joining[place]
            self._ready.append((compute, [calls[rank] for rank in range(self.size)]))
            self._advance()

    def abandon(self) -> None:
        """End it for all members: no operation completes any more, nothing is written."""
        self.broken = True
        self.gate.shut()
        self.everyone.set()
        self._joining.clear()
        self._ready.clear()

    def _advance(self) -> None:
        while self._ready and not self._busy:
            compute, calls = self._ready.popleft()
            work = sum(array.nbytes for call in calls for array in (*call.sources, *call.targets))
            if work <= LONG:
                self._complete(calls, self._run(compute, calls))
            else:
                self._busy = True
                running = offload(lambda compute=compute, calls=calls: self._run(compute, calls))  # type: ignore[misc]
                running.add_done_callback(lambda outcome, calls=calls: self._ran(calls, outcome))  # type: ignore[misc]

    def _ran(self, calls: list[_Call], outcome: asyncio.Future[Exception | None]) -> None:
        self._busy = False
        self._complete(calls, outcome.result())
        self._advance()

    def _run(self, compute: Compute, calls: list[_Call]) -> Exception | None:
        try:
            results = compute([call.sources for call in calls])
            for call, mine in zip(calls, results, strict=True):
                for target, result in zip(call.targets, mine, strict=True):
                    self.gate.copy(target, result)
        except Exception as error:
            return error
        return None

    def _complete(self, calls: list[_Call], error: Exception | None) -> None:
        for call in calls:
            if self.broken or call.done.done():
                continue
            if error is None:
                call.done.set_result(None)
            else:
                failure = BackendError(f"memory: {type(error).__name__}: {error}")
                failure.__cause__ = error
                call.done.set_exception(failure)


_meetings: WeakValueDictionary[str, _Meeting] = WeakValueDictionary()


class MemoryPlane(DataPlane):
    """The data plane called "memory"; see the module."""

    name: ClassVar[str] = "memory"

    def __init__(self, context: PlaneContext) -> None:
        self._context = context
        self._meeting: _Meeting | None = None
        self._place = 0

    async def open(self) -> None:
        context = self._context
        meeting = _meetings.get(context.key)
        if meeting is None:
            meeting = _meetings[context.key] = _Meeting(context.size)
        if meeting.loop is not asyncio.get_running_loop():
            raise BackendError(
                f"memory: rank {context.rank} of group {context.group!r} runs on another event loop than its peers; "
                'run them all on one loop, or declare GroupSpec(..., backend="gloo")'
            )
        if context.rank in meeting.present:
            raise BackendError(f"memory: group {context.group!r} has two members of rank {context.rank}")
        self._meeting = meeting
        meeting.present.add(context.rank)
        if len(meeting.present) == meeting.size:
            meeting.everyone.set()
        await meeting.everyone.wait()
        if meeting.broken:
            raise BackendError(f"memory: a member of group {context.group!r} left while the group was being formed")

    def hear(self, rank: int, message: bytes) -> None:
        raise BackendError(f"memory: nothing is told here, but rank {rank} told {message!r}")

    def broadcast(self, array: np.ndarray, root: int) -> asyncio.Future[None]:
        is_root = self._context.rank == root
        return self._join(
            [array] if is_root else [],
            [] if is_root else [array],
            lambda sources: [[] if rank == root else sources[root] for rank in range(len(sources))],
        )

    def allreduce(self, source: np.ndarray, target: np.ndarray, op: ReduceOp) -> asyncio.Future[None]:
        return self._join([source], [target], lambda sources: [[_reduce(sources, op)]] * len(sources))

    def reduce(self, source: np.ndarray, target: np.ndarray | None, op: ReduceOp, root: int) -> asyncio.Future[None]:
        return self._join(
            [source],
            [] if target is None else [target],
            lambda sources: [[_reduce(sources, op)] if rank == root else [] for rank in range(len(sources))],
        )

    def reduce_scatter(
        self, source: np.ndarray, target: np.ndarray, op: ReduceOp, counts: Sequence[int]
    ) -> asyncio.Future[None]:
        cuts = np.cumsum(counts)[:-1]
        return self._join([source], [target], lambda sources: [[part] for part in np.split(_reduce(sources, op), cuts)])

    def allgather(self, source: np.ndarray, target: np.ndarray, counts: Sequence[int]) -> asyncio.Future[None]:
        return self._join(
            [source], [target], lambda sources: [[np.concatenate([one for (one,) in sources])]] * len(sources)
        )

    def alltoall(self, sources: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> asyncio.Future[None]:
        return self._join(
            sources, targets, lambda all_: [[one[rank].copy() for one in all_] for rank in range(len(all_))]
        )

    def abandon(self) -> None:
        if self._meeting is not None:
            self._meeting.abandon()
            self._meeting = None

    async def aclose(self) -> None:
        self._meeting = None

    def _join(self, sources: Arrays, targets: Arrays, compute: Compute) -> asyncio.Future[None]:
        if self._meeting is None:
            raise BackendError(f"memory: group {self._context.group!r} is not open on rank {self._context.rank}")
        done: asyncio.Future[None] = self._meeting.loop.create_future()
        place, self._place = self._place, self._place + 1
        self._meeting.join(place, self._context.rank, _Call(sources, targets, done), compute)
        return done


def _reduce(sources: Sequence[Arrays], op: ReduceOp) -> np.ndarray:
    arrays = [one for (one,) in sources]
    result = np.empty_like(arrays[0])
    reduce_arrays(arrays, op, result)
    return result
