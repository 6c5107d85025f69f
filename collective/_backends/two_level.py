"""The data plane of groups on several hosts, of which some have several members: shared memory inside, Gloo between.

The members of each host make a plane of their own, as a group of that host alone would have; the first of each host,
its leader, joins another one with the leaders of the other hosts. What hosts have for each other crosses between them
once, not once for each member: it is reduced inside a host before, and shown to the members of one after, as in the
hierarchical collectives of MPI libraries. An operation is a sequence of stages on the two planes (`_two_level_stages`),
and operations run one after another (`_two_level_line`).

Reductions go in another order than on the other data planes: by rank inside each host, then by host. What all members
have together up to 64 KiB is reduced by rank. Either way the order depends on nothing but the group and the length.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Final

from collective._backends import make_plane, plane_within_a_host
from collective._backends._two_level_line import Line
from collective._backends._two_level_places import Places
from collective._backends._two_level_stages import Levels
from collective._gate import Gate
from collective.abc import DataPlane
from collective.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from collective._backends._two_level_line import Stages
    from collective.abc import PlaneContext
    from collective.types import ReduceOp

_INNER: Final = b"i"
_OUTER: Final = b"o"
"""What messages start with, by the plane that they are of."""


class TwoLevelPlane(DataPlane):
    """The data plane called "two-level"; see the module."""

    name: ClassVar[str] = "two-level"

    def __init__(self, context: PlaneContext) -> None:
        self._context = context
        self._places = places = Places.of(context.hosts or [""] * context.size, context.rank)
        leaders = [ranks[0] for ranks in places.hosts]
        self._inner = self._make(plane_within_a_host(len(places.here)), places.here, _INNER)
        self._outer = self._make("gloo", leaders, _OUTER) if places.leads else None
        self._gate = Gate()
        self._levels: Levels | None = None
        self._line: Line | None = None
        self._opening: list[asyncio.Task[None]] = []
        self._ended = False

    def _make(self, name: str, ranks: Sequence[int], prefix: bytes) -> DataPlane:
        """Return a data plane of some of the members, whose messages start with a prefix."""
        context = self._context

        def tell(rank: int, message: bytes) -> None:
            context.tell(ranks[rank], prefix + message)

        return make_plane(
            name,
            replace(
                context,
                key=f"{context.key}/{prefix.decode()}{ranks[0]}",
                rank=ranks.index(context.rank),
                size=len(ranks),
                tell=tell,
                hosts=tuple(context.hosts[rank] for rank in ranks) if context.hosts else (),
            ),
        )

    @property
    def backends(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self._inner.backends, "gloo")))

    async def open(self) -> None:
        if self._ended or self._opening:
            raise BackendError(f"two-level: group {self._context.group!r} was opened before")
        self._opening = [asyncio.ensure_future(plane.open()) for plane in self._planes()]
        try:
            await asyncio.gather(*self._opening)
        except BaseException as error:
            # What one could not do, or was told not to, the other is not to wait for.
            given_up = self._ended and isinstance(error, asyncio.CancelledError)
            self.abandon()
            await asyncio.wait(self._opening)
            task = asyncio.current_task()
            if given_up and task is not None and not task.cancelling():
                raise self._abandoned() from None
            raise
        if self._ended:
            raise self._abandoned()
        self._line = line = Line(asyncio.get_running_loop(), self.abandon)
        self._levels = Levels(self._places, self._inner, self._outer, gate=self._gate, watch=line.watch)

    def hear(self, rank: int, message: bytes) -> None:
        prefix, told = message[:1], message[1:]
        if prefix == _INNER:
            self._inner.hear(self._places.here.index(rank), told)
        elif self._outer is not None:
            self._outer.hear(self._places.host_of(rank), told)

    def empty(self, nbytes: int) -> np.ndarray:
        return self._inner.empty(nbytes)

    def broadcast(self, array: np.ndarray, root: int) -> asyncio.Future[None]:
        return self._start(self._opened().broadcast(array, root))

    def allreduce(self, source: np.ndarray, target: np.ndarray, op: ReduceOp) -> asyncio.Future[None]:
        return self._start(self._opened().allreduce(source, target, op))

    def reduce(self, source: np.ndarray, target: np.ndarray | None, op: ReduceOp, root: int) -> asyncio.Future[None]:
        return self._start(self._opened().reduce(source, target, op, root))

    def reduce_scatter(
        self, source: np.ndarray, target: np.ndarray, op: ReduceOp, counts: Sequence[int]
    ) -> asyncio.Future[None]:
        return self._start(self._opened().reduce_scatter(source, target, op, counts))

    def allgather(self, source: np.ndarray, target: np.ndarray, counts: Sequence[int]) -> asyncio.Future[None]:
        return self._start(self._opened().allgather(source, target, counts))

    def alltoall(self, sources: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> asyncio.Future[None]:
        return self._start(self._opened().alltoall(sources, targets))

    def abandon(self) -> None:
        self._end()
        for plane in self._planes():
            plane.abandon()
        for opening in self._opening:  # Gloo's may be connecting, to a leader that has given up
            opening.cancel()

    async def aclose(self) -> None:
        self._end()
        for plane in self._planes():
            await plane.aclose()

    def _end(self) -> None:
        self._ended = True
        self._gate.shut()
        if self._line is not None:
            self._line.end()

    def _planes(self) -> list[DataPlane]:
        return [self._inner] if self._outer is None else [self._inner, self._outer]

    def _abandoned(self) -> BackendError:
        return BackendError(f"two-level: group {self._context.group!r} was abandoned while it was being formed")

    def _opened(self) -> Levels:
        if self._levels is None or self._ended:
            raise BackendError(f"two-level: group {self._context.group!r} is not open on rank {self._context.rank}")
        return self._levels

    def _start(self, stages: Stages) -> asyncio.Future[None]:
        assert self._line is not None, "it is open"
        return self._line.start(stages)
