"""Links inside one process and event loop. The specification of a carrier: all is copied, nothing is shared."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from collective._links.carrier import Carrier, FrameSource, Kind
from collective.errors import LinkBroken, WrongLoop

if TYPE_CHECKING:
    from collections.abc import Callable

    from collective.types import Address

_PIPE = 256 << 10
"""Bytes that a pipe holds before its writer has to wait; one frame may exceed it."""

_listening: dict[str, MemoryKind] = {}
os.register_at_fork(after_in_child=_listening.clear)


class MemoryCarrier(Carrier):
    """One end of a pair of pipes. Each turn of the loop moves what the pipe holds."""

    kind = "memory"

    def __init__(self, where: str) -> None:
        self.where = where
        self._loop = asyncio.get_running_loop()
        self._source: FrameSource | None = None
        self._arrived = bytearray()
        self._scheduled = False
        self._over = False
        """Whether the other end sends nothing more."""
        self._closed = False
        self._taker: asyncio.Future[None] | None = None
        self._peer: MemoryCarrier

    @staticmethod
    def pair(here: str, there: str) -> tuple[MemoryCarrier, MemoryCarrier]:
        """Return two ends; the first is the one that dialed."""
        one, other = MemoryCarrier(there), MemoryCarrier(here)
        one._peer, other._peer = other, one
        return one, other

    def put(self, data: bytes) -> None:
        if self._peer._closed:
            raise LinkBroken(f"{self.where}: connection ended")
        self._peer._take_in(data)

    async def take(self, count: int) -> bytes:
        while len(self._arrived) < count:
            if self._over:
                raise LinkBroken(f"{self.where}: connection ended")
            self._taker = self._loop.create_future()
            await self._taker
        data = bytes(self._arrived[:count])
        del self._arrived[:count]
        return data

    def start(self, source: FrameSource) -> None:
        self._source = source
        self._schedule()

    def flush(self) -> None:
        if self._source is None or self._closed:
            return
        while len(self._peer._arrived) < _PIPE and (frame := self._source.next_frame()) is not None:
            for piece in frame.pieces:
                self._peer._take_in(piece)
            if frame.owner is not None:
                frame.owner.written()

    def detach(self) -> None:
        """Nothing to do: the pipe holds copies."""

    @property
    def idle(self) -> bool:
        return True

    def finish(self) -> None:
        self._peer._over = True
        self._peer._schedule()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._arrived.clear()
            if not self._loop.is_closed():
                self.finish()

    def _take_in(self, data: bytes | memoryview) -> None:
        if not self._closed:
            self._arrived += data
            self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._deliver)

    def _deliver(self) -> None:
        self._scheduled = False
        if self._source is None:
            if self._taker is not None and not self._taker.done():
                self._taker.set_result(None)
            return
        data, self._arrived = memoryview(self._arrived), bytearray()
        while len(data) and not self._source.stopped:
            count = 0
            for target in self._source.targets():
                part = data[count : count + len(target)]
                target[: len(part)] = part
                count += len(part)
            data = data[count:]
            self._source.received(count)
        if self._source.stopped:
            return
        if self._over and not self._arrived:
            self._source.carrier_ended("connection ended")
        else:
            self._peer.flush()


class MemoryKind(Kind):
    """Finds the endpoints of this process."""

    name = "memory"

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._accept: Callable[[Carrier], None] | None = None
        self._endpoint = ""

    def listen(self, accept: Callable[[Carrier], None], address: Address) -> Address:
        self._accept = accept
        self._endpoint = address.endpoint
        _listening[address.endpoint] = self
        return replace(address)

    def reaches(self, address: Address) -> bool:
        listener = _listening.get(address.endpoint)
        elsewhere = any(way is not None for way in (address.shm, address.unix, address.tcp))
        return listener is not None and (listener._loop is self._loop or not elsewhere)

    async def dial(self, address: Address) -> Carrier:
        listener = _listening[address.endpoint]
        if listener._loop is not self._loop:
            raise WrongLoop(
                f"endpoint {address.endpoint} belongs to event loop {listener._loop!r}, this one to {self._loop!r}; "
                "memory links stay within one loop"
            )
        assert listener._accept is not None
        carrier, other = MemoryCarrier.pair(f"endpoint {self._endpoint}", f"endpoint {address.endpoint}")
        listener._accept(other)
        return carrier

    def close(self) -> None:
        if _listening.get(self._endpoint) is self:
            del _listening[self._endpoint]
