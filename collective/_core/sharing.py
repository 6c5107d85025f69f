"""One copy for all ranks of a host: who has received it shows it to those that want the same.

Inside one process they get the array itself. Between processes it lies in memory that links of shared memory show in
place; any other link copies.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np

from collective._core.operands import as_bytes
from collective._links import borrowing
from collective._links.arena import arena
from collective._links.ring import usable
from collective.abc import LARGE
from collective.errors import LinkBroken

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from collective._core.flows import Flows
    from collective.abc import Channel, Message

_here: dict[int, Mapping[int, np.ndarray]] = {}
_numbers = itertools.count()


def shareable(shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray:
    """Return a new array that other processes of this host can be shown without a copy, where there is such memory."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes > LARGE and usable():
        with contextlib.suppress(MemoryError):  # the arena is full: then it is copied
            return np.frombuffer(arena().allocate(nbytes).memory, np.uint8).view(dtype).reshape(shape)
    return np.empty(shape, dtype)


async def show(arrays: Mapping[int, np.ndarray], mate: int, place: Any, *, flows: Flows) -> None:
    """Show arrays, each under its number, to another rank; return when it has them."""
    channel = await flows.open(mate, place)
    if channel.link.kind == "memory":
        await _hand_over(arrays, channel)
    else:
        for number, array in arrays.items():
            data = [as_bytes(array.reshape(-1)).data] if array.size else []
            await channel.send(pickle.dumps((number, array.shape)), data)
    flows.close(channel)


async def _hand_over(arrays: Mapping[int, np.ndarray], channel: Channel) -> None:
    key = next(_numbers)
    _here[key] = arrays
    try:
        await channel.send(pickle.dumps((None, key)))
        await channel.receive()
    except LinkBroken:
        pass  # it has taken them and closed the channel; a link that broke is told elsewhere
    finally:
        del _here[key]


class Shown:
    """The sink of a rank to which arrays are shown: `dtypes` has the numbers that come.

    The arrays are read-only, or this rank's own: where `private`, also those that others look at, too; then a write
    copies its page.
    """

    def __init__(self, dtypes: Mapping[int, np.dtype[Any]], *, private: bool) -> None:
        self.arrays: asyncio.Future[dict[int, np.ndarray]] = asyncio.get_running_loop().create_future()
        """All of them, by number."""
        self._dtypes = dtypes
        self._private = private
        self._came: dict[int, np.ndarray] = {}

    def allocate(self, header: bytes, sizes: Sequence[int]) -> None:
        """Take it where the link has it."""

    def take(self, message: Message) -> bool:
        try:
            self._take(message)
        except Exception as error:  # no memory, say: the others would wait for this member
            self.arrays.set_exception(error)
            return True
        complete = len(self._came) == len(self._dtypes)
        if complete:
            self.arrays.set_result(self._came)
        return complete

    def _take(self, message: Message) -> None:
        number, rest = pickle.loads(message.header)
        if number is None:
            for at, array in _here[rest].items():
                view = self._came[at] = array.view()
                view.flags.writeable = False
            return
        buffer = message.buffers[0] if message.buffers else memoryview(b"")
        data = np.frombuffer(borrowing.private(buffer) if self._private else buffer, np.uint8)
        self._came[number] = data.view(self._dtypes[number]).reshape(rest)
