"""What Ray runs for each actor: a Ray actor whose loop is the actor's."""

from __future__ import annotations

import asyncio
import os
import pickle
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import ray

from actors._host import Host
from actors._pickling import loads
from actors._runtimes import _heap
from actors._runtimes._ray_objects import refuse_object_refs
from collective.links import default_host, open_endpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from actors._host import Blueprint
    from actors.abc import Launch
    from collective.abc import Endpoint

KINDS = ("memory", "shm", "tcp")
"""What a host listens on; memory is for gangs of the runtime `inproc` that its actor may start."""


class Site(NamedTuple):
    """What the hosts of a gang are told of where it was started.

    :param host: where the gang's endpoint is.
    :param directory: where unix sockets go on that host; removed with the gang, also when an actor was killed.
    :param path: where Python modules are found, as multiprocessing hands it to the processes that it spawns.
    """

    host: str
    directory: str
    path: tuple[str, ...]


class RayHost:
    """The Ray actor behind an actor of a gang. `run` lasts as long as the actor, and with it what it is given.

    So the payload, which may be large, is given to the constructor: Ray keeps arguments until their task has ended.

    :param payload: the class and the arguments of the actor, taken apart.
    """

    def __init__(self, payload: tuple[bytes, Sequence[bytes]]) -> None:
        self._payloads = [payload]
        _heap.forget_pages(of_file="plasma")  # Ray's object store: the payload is a copy

    async def run(self, launch: Launch, site: Site) -> None:
        """Serve the gang until killed by it; never returns.

        Raises:
            LinkError: the gang could not be reached.
        """
        _heap.keep_warm()
        refuse_object_refs()
        for entry in site.path:
            if entry not in sys.path:
                sys.path.append(entry)
        directory = site.directory if default_host() == site.host else None
        endpoint = await open_endpoint(kinds=KINDS, directory=directory, interface=_interface())
        ordered = await Host(launch, endpoint, self._make).serve()
        if not ordered:
            ray.actor.exit_actor()  # type: ignore[no-untyped-call]  # the gang is gone, and cannot kill it any more
        await asyncio.get_running_loop().create_future()

    def _make(self) -> Blueprint:
        data, buffers = self._payloads.pop()
        blueprint: Blueprint = loads(
            data, [memoryview(bytearray(buffer)) for buffer in buffers], "the class or an argument of its constructor"
        )
        return blueprint


@dataclass(frozen=True)
class RayActor:
    """Returns a Ray actor handle, where Ray runs. Picklable everywhere: unlike the handle itself."""

    _data: bytes = field(repr=False)

    @staticmethod
    def of(actor: Any) -> RayActor:
        """Keep a Ray actor handle."""
        return RayActor(pickle.dumps(actor))

    def __call__(self) -> Any:
        return pickle.loads(self._data)


async def open_home(directory: str) -> Endpoint:
    """Open the endpoint that hosts report to."""
    return await open_endpoint(kinds=("shm", "tcp"), directory=directory, interface=_interface())


def _interface() -> str:
    """Return the address by which other nodes reach this one."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def import_path() -> tuple[str, ...]:
    """Return this process's import path, for others with another working directory."""
    return tuple(dict.fromkeys(os.path.abspath(entry) for entry in sys.path))
