"""The runtime `ray`: Ray places the actors' processes and supervises them; all else goes over links."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import tempfile
from typing import TYPE_CHECKING, Any, ClassVar

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from actors._host import own_process
from actors._pickling import dumps
from actors._runtimes._pidfd import PidWatch
from actors._runtimes._ray_host import RayActor, RayHost, Site, import_path, open_home
from actors._runtimes._ray_objects import refuse_object_refs
from actors.abc import Process, Runtime
from collective.links import default_host
from scheduling.background import in_thread, to_the_end
from scheduling.reserving import ensure_ray, reserve

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from actors.abc import Launch, ProcessId
    from actors.role import Role
    from collective.abc import Endpoint
    from scheduling._ray import Reservation
    from scheduling.abc import Placement

_KILL_SECONDS = 0.7
"""How long a process may take to die when Ray has been told to kill it, until it gets SIGKILL where it is in reach."""
_GONE_SECONDS = 0.7
"""How long it may take to be gone after that."""
_LARGE = 100 << 10
"""Bytes above which Ray would put an argument into its object store, once for each actor."""

_logger = logging.getLogger("actors")
_Actor: Any = ray.remote(max_restarts=0, max_task_retries=0)(RayHost)


class RayRuntime(Runtime):
    """Actors as Ray actors in one placement group."""

    name: ClassVar[str] = "ray"

    def __init__(self, *, roles: Sequence[Role[Any]], placement: Placement, gang: str) -> None:
        self._roles = {role.name: role for role in roles}
        self._payloads = {role.name: _take_apart(role) for role in roles}
        self._placement = placement
        self._gang = gang
        self._directory: str | None = None
        self._endpoint: Endpoint | None = None
        self._reservation: Reservation | None = None
        self._processes: list[_RayProcess] = []

    async def open(self, *, start_timeout: float) -> Endpoint:
        roles = self._roles.values()
        refuse_object_refs()
        await ensure_ray(sum(role.count * role.resources.cpu for role in roles))
        demands = [role.demand() for role in roles]
        self._reservation = await reserve(demands, self._placement, start_timeout=start_timeout, name=self._gang)
        self._directory = tempfile.mkdtemp(prefix="gangline-")
        self._endpoint = await open_home(self._directory)
        return self._endpoint

    async def launch(self, launches: Sequence[Launch]) -> Sequence[Process]:
        reservation = self._reservation
        assert reservation is not None
        assert self._directory is not None
        site = Site(default_host(), self._directory, import_path())
        options = [reservation.actor_options(launch.role, launch.rank) for launch in launches]

        def create() -> list[tuple[Any, Any, RayActor]]:
            payloads = {role: _share(payload) for role, payload in self._payloads.items()}
            actors = [
                _Actor.options(**each).remote(payloads[launch.role])
                for each, launch in zip(options, launches, strict=True)
            ]
            # The name of its only task is what Ray shows for the process.
            return [
                (
                    actor,
                    actor.run.options(name=str(launch)).remote(launch, site),
                    RayActor.of(actor),
                )
                for actor, launch in zip(actors, launches, strict=True)
            ]

        async def create_all() -> None:
            self._processes = [_RayProcess(reservation, *each) for each in await in_thread(create)]

        # Cut short, it would leave actors that nobody knows.
        await to_the_end(create_all())
        self._payloads = {}
        return self._processes

    async def aclose(self) -> None:
        processes, self._processes = self._processes, []
        reservation, self._reservation = self._reservation, None
        directory, self._directory = self._directory, None
        errors: list[Exception] = []
        try:
            async with asyncio.TaskGroup() as tasks:
                for process in processes:
                    tasks.create_task(self._see_off(process, errors), name=f"gang {self._gang} sees off {process}")
        finally:
            try:
                if reservation is not None:
                    await reservation.release()
            except Exception as error:
                errors.append(error)
            finally:
                if self._endpoint is not None:
                    await self._endpoint.aclose()
                if directory is not None:
                    shutil.rmtree(directory, ignore_errors=True)
        if errors:
            raise ExceptionGroup(f"ending the processes of gang {self._gang}", errors)

    async def _see_off(self, process: _RayProcess, errors: list[Exception]) -> None:
        """Kill a process and wait until it is gone; what goes wrong with that is for later, after the others."""
        try:
            async with asyncio.timeout(_KILL_SECONDS):
                try:
                    await process.kill()
                except Exception as error:
                    error.add_note(f"Ray was asked to kill process {process}")
                    errors.append(error)
                    process.kill_by_signal()
                await process.gone()
        except TimeoutError:
            process.kill_by_signal()
            try:
                async with asyncio.timeout(_GONE_SECONDS):
                    await process.gone()
            except TimeoutError:
                _logger.warning(
                    "gang %s: process %s was killed, but Ray has not said that it is gone", self._gang, str(process)
                )
        finally:
            process.close()


class _RayProcess(Process):
    """A Ray actor, as its gang sees it."""

    def __init__(self, reservation: Reservation, actor: Any, run: Any, native: RayActor) -> None:
        self.native: Callable[[], Any] | None = native
        self.ended = asyncio.get_running_loop().create_future()
        self._actor = actor
        self._reservation = reservation
        self._watch: PidWatch | None = None
        self._pid: int | None = None
        self._killed = False
        self._waiter = asyncio.get_running_loop().create_task(self._wait(run), name="Ray watches an actor")

    def identify(self, process: ProcessId) -> None:
        self._pid = process.pid
        if process.space == own_process().space and self._watch is None:
            with contextlib.suppress(OSError):  # No descriptor left for it: then Ray alone tells of its end.
                self._watch = PidWatch(process)

    @property
    def fate(self) -> asyncio.Future[str] | None:
        return self._watch.fate if self._watch is not None else None

    async def kill(self) -> None:
        if not self._killed and self._reservation.connected:
            self._killed = True
            await in_thread(lambda: ray.kill(self._actor, no_restart=True))

    def kill_by_signal(self) -> None:
        """End it without Ray, where it is in reach."""
        if self._watch is not None:
            self._watch.kill()

    async def gone(self) -> None:
        """Return when nothing is left of it, as far as can be known from here."""
        if self._watch is not None:
            await self._watch.gone()
        elif self._reservation.connected:
            await asyncio.shield(self._waiter)

    def close(self) -> None:
        """Stop watching."""
        self._waiter.cancel()
        if self._watch is not None:
            self._watch.close()

    async def _wait(self, run: Any) -> None:
        try:
            await run
        except RayActorError as error:
            cause: Exception = ConnectionError(_reason(error))
            cause.__cause__ = error
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
        except RayError as error:
            cause = error
        else:
            cause = ConnectionError("its process has ended")
        self.ended.set_result(cause)

    def __str__(self) -> str:
        return "(never seen)" if self._pid is None else str(self._pid)


def _reason(error: RayActorError) -> str:
    """Return what Ray knows of an actor's death, in a few words."""
    _, _, reason = str(error).partition("The actor is dead because ")
    first = reason.splitlines()[0] if reason else ""
    return f"Ray says that {first.rstrip('. ')}" if first else "Ray says that its process died"


def _take_apart(role: Role[Any]) -> tuple[bytes, list[bytes]]:
    blueprint = (role.cls, tuple(role.args), dict(role.kwargs))
    what = f"role {role.name!r}: the class or an argument of {role.cls.__qualname__}"
    data, buffers = dumps(blueprint, what, in_call=False)
    return data, [bytes(buffer) for buffer in buffers]


def _share(payload: tuple[bytes, list[bytes]]) -> Any:
    """Return what stands for a payload in the arguments of several actors."""
    data, buffers = payload
    size = len(data) + sum(len(buffer) for buffer in buffers)
    return ray.put(payload) if size > _LARGE else payload
