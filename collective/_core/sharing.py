"""One copy for all ranks of a host: who has received it shows it to those that want the same.

Inside one process they get the array itself. Between processes it travels as one message, which a link of shared memory
shows in place, and any other copies.
"""

from __future__ import annotations

import itertools
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np

from collective._core.operands import as_bytes
from collective.errors import LinkBroken

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from collective._core.flows import Flows
    from collective.abc import Channel, Message

_here: dict[int, Mapping[int, np.ndarray]] = {}
_numbers = itertools.count()


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
    """The sink of a rank to which arrays are shown: `dtypes` has the numbers that come."""

    def __init__(self, dtypes: Mapping[int, np.dtype[Any]], then: Callable[[dict[int, np.ndarray]], None]) -> None:
        self._dtypes = dtypes
        self._then = then
        self._arrays: dict[int, np.ndarray] = {}

    def allocate(self, header: bytes, sizes: Sequence[int]) -> None:
        """Take it where the link has it."""

    def take(self, message: Message) -> bool:
        number, rest = pickle.loads(message.header)
        if number is None:
            self._arrays.update(_here[rest])
        else:
            data = np.frombuffer(message.buffers[0] if message.buffers else b"", np.uint8)
            self._arrays[number] = data.view(self._dtypes[number]).reshape(rest)
        complete = len(self._arrays) == len(self._dtypes)
        if complete:
            self._then(self._arrays)
        return complete

