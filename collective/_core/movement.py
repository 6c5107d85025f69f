"""Carrying out one rank's part of plans: what it sends, passes on, receives, reduces and keeps.

A route is one stream of bytes for each edge of its tree, cut into messages that say where in it they belong. A rank
that passes a route on sends each message as soon as it has come, and what it has itself whenever there is room, so no
stream waits for another.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from collective._core.arithmetic import Arithmetic
from collective._core.offload import offload
from collective._core.streams import DST, SRC, Stream
from collective._rings import CONTRIBUTION, RESULT, Ring, Route
from collective.errors import CollectiveError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from collective._core.arithmetic import Job
    from collective._core.flows import Flows
    from collective._gate import Gate
    from collective.abc import Channel, Message

PACKED = 1 << 20
"""Bytes of a message that is packed from several blocks, on the loop, or that is passed on when it has come."""
PLAIN = 4 << 20
"""Bytes of any other message."""
SMALL = 32 << 10
"""Bytes up to which all that goes from one rank to another is posted: that needs no channel and no task."""
_HEADER = struct.Struct("<IQ")
"""Which of the routes from sender to receiver, in their order, and the offset in its stream."""


class _Edge:
    """What goes from this rank to another: its own streams, and messages to pass on."""

    def __init__(self, child: int, routes: list[Route], nbytes: int) -> None:
        self.child = child
        self.small = nbytes <= SMALL  # and so its other end knows it, too
        self.numbers = {route: number for number, route in enumerate(routes)}
        self.queue: deque[tuple[int, int, memoryview]] = deque()
        self.woken = asyncio.Event()


class _Inflow:
    """What comes from another rank: the routes on which it comes, in the order of their numbers."""

    def __init__(self, movement: Movement, routes: list[Route], streams: list[Stream]) -> None:
        self._movement = movement
        self._routes = routes
        self._streams = streams
        self.left = sum(stream.nbytes for stream in streams)

    def allocate(self, header: bytes, sizes: Sequence[int]) -> list[memoryview] | None:
        number, offset = _HEADER.unpack(header)
        memory = self._streams[number].place(offset, sizes[0])
        return None if memory is None else [memory]

    def take(self, message: Message) -> bool:
        number, offset = _HEADER.unpack(message.header)
        buffer = message.buffers[0]
        data = np.frombuffer(buffer, np.uint8)
        try:
            place = self._streams[number].place(offset, data.nbytes)
            if place is None or np.frombuffer(place, np.uint8).ctypes.data != data.ctypes.data:
                self._streams[number].put(offset, data)
        except Exception as error:  # the others would wait for this member
            self._movement.fail(error)
            return True
        self._movement.arrived(self._routes[number], offset, buffer)
        self.left -= data.nbytes
        if not self.left:
            self._movement.finished()
        return not self.left


class Movement:
    """What one rank does for all tensors of one operation."""

    def __init__(self, rank: int, place: int, jobs: Sequence[Job], *, flows: Flows, gate: Gate) -> None:
        self._rank = rank
        self._place = place
        self._flows = flows
        self._out: dict[Route, Stream] = {}
        self._in: dict[Route, Stream] = {}
        self._gate = gate
        self._arithmetic = Arithmetic(rank, jobs, gate)
        self._edges: dict[int, _Edge] = {}
        self._left = 0
        """Things that are not done."""
        self._awaited = 0
        """Bytes of operands that have not come."""
        self._operands_came = asyncio.Event()
        self._reduced = asyncio.Event()
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        for job in jobs:
            self._take(job)
        self._find_operands()

    def start(self) -> asyncio.Future[None]:
        """Begin; the future is done when nothing is read or written any more."""
        outgoing: dict[int, list[Route]] = {}
        incoming: dict[int, list[Route]] = {}
        for route in sorted({*self._out, *self._in}):  # a number on an edge means the same route at both of its ends
            if route in self._in:
                incoming.setdefault(route.parent(self._rank), []).append(route)
            for child in route.children(self._rank):
                outgoing.setdefault(child, []).append(route)
        self._left += 1  # this call itself
        for child, routes in outgoing.items():
            nbytes = sum((self._out.get(route) or self._in[route]).nbytes for route in routes)
            edge = self._edges[child] = _Edge(child, routes, nbytes)
            if not edge.small:
                self._do(partial(self._serve, edge))
        for parent, routes in incoming.items():
            self._left += 1
            inflow = _Inflow(self, routes, [self._in[route] for route in routes])
            self._flows.expect(parent, self._place, inflow, posted=inflow.left <= SMALL)
        self._post(results=False)
        if self._awaits_operands or self._arithmetic.long:
            self._do(self._compute)
        else:
            self._arithmetic.keep()
            self._arithmetic.reduce()
            self._reduced.set()
            self._post(results=True)
        self.finished()
        return self._done

    # ------------------------------------------------- what an inflow tells

    def arrived(self, route: Route, offset: int, data: memoryview) -> None:
        """Pass on some bytes of a route, which are where they belong here."""
        if route.kind == CONTRIBUTION:
            self._awaited -= len(data)
            if not self._awaited:
                self._operands_came.set()
            return
        for child in route.children(self._rank):
            edge = self._edges[child]
            if edge.small:
                self._flows.post(edge.child, self._place, _HEADER.pack(edge.numbers[route], offset), data)
                continue
            edge.queue.append((edge.numbers[route], offset, data))
            edge.woken.set()

    def finished(self) -> None:
        """Take note that one thing is done."""
        self._left -= 1
        if not self._left and not self._done.done():
            self._done.set_result(None)

    def fail(self, error: Exception) -> None:
        """Take note that this member cannot go on."""
        if not self._done.done():
            self._done.set_exception(error)

    # ---------------------------------------------------------------- set up

    def _take(self, job: Job) -> None:
        for route, boxes in job.part.sends.items():
            reduced = route.kind == RESULT
            array = job.result if reduced else job.source
            assert array is not None
            self._out.setdefault(route, Stream()).add(array, boxes, DST if reduced else SRC)
        for route, boxes in job.part.receives.items():
            assert job.result is not None
            self._in.setdefault(route, Stream()).add(job.result, boxes, DST)

    def _find_operands(self) -> None:
        for sender, memory in self._arithmetic.operands.items():
            stream = self._in[Route(CONTRIBUTION, sender, Ring((self._rank,)))] = Stream()
            stream.add_flat(memory)
            self._awaited += memory.nbytes
        if not self._awaited:
            self._operands_came.set()

    # -------------------------------------------------------------- movement

    def _do(self, task: Callable[[], Coroutine[Any, Any, bool]]) -> None:
        self._left += 1
        self._flows.spawn(self._guarded(task))

    async def _guarded(self, task: Callable[[], Coroutine[Any, Any, bool]]) -> None:
        try:
            ended = await task()
        except ExceptionGroup as errors:
            self.fail(errors.exceptions[0])
        except Exception as error:  # no memory, say: the others wait for this member
            self.fail(error)
        else:
            if ended:
                self.finished()

    async def _serve(self, edge: _Edge) -> bool:
        """Send to one rank all that goes there; return False where it ended the epoch or was lost."""
        ended = False
        try:
            async with asyncio.TaskGroup() as tasks:
                channel = await self._flows.open(edge.child, self._place)
                passing = tasks.create_task(self._pass_on(channel, edge))
                await self._feed(channel, edge)
                await passing
                self._flows.close(channel)
                ended = True
        except* CollectiveError:
            pass  # see `Flows.open`
        return ended

    async def _feed(self, channel: Channel, edge: _Edge) -> None:
        """Send what this rank takes out of its own memory: results of reductions at last, once there are any."""
        for route, number in edge.numbers.items():
            if route in self._out:
                if route.kind == RESULT:
                    await self._reduced.wait()
                for offset, data in self._out[route].messages(PACKED, PLAIN if route.ring.size == 1 else PACKED):
                    await channel.send(_HEADER.pack(number, offset), [data])

    async def _pass_on(self, channel: Channel, edge: _Edge) -> None:
        """Send what comes from others, as it comes."""
        left = sum(self._in[route].nbytes for route in edge.numbers if route in self._in)
        while left:
            while not edge.queue:
                edge.woken.clear()
                await edge.woken.wait()
            number, offset, data = edge.queue.popleft()
            await channel.send(_HEADER.pack(number, offset), [data])
            left -= len(data)

    def _post(self, *, results: bool) -> None:
        """Post what this rank takes out of its own memory for those to whom little goes."""
        for edge in self._edges.values():
            for route, number in edge.numbers.items() if edge.small else ():
                if route in self._out and (route.kind == RESULT) == results:
                    for offset, data in self._out[route].messages(SMALL):
                        self._flows.post(edge.child, self._place, _HEADER.pack(number, offset), data)

    @property
    def _awaits_operands(self) -> bool:
        return not self._operands_came.is_set()

    async def _compute(self) -> bool:
        """Copy what stays, and reduce once all operands have come."""
        run = offload if self._arithmetic.long else _at_once
        try:
            await run(self._arithmetic.keep)
            await self._operands_came.wait()
            await run(self._arithmetic.reduce)
        except asyncio.CancelledError:
            self._gate.shut()  # where it is cancelled otherwise than by the epoch's end
            raise
        self._reduced.set()
        self._post(results=True)
        return True


async def _at_once(function: Callable[[], None]) -> None:
    function()
