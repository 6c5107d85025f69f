"""What removes the placement groups of a Ray worker that has died, which Ray keeps for as long as the job lasts.

Ray removes those that a driver made when its job ends, but of an actor or a task they outlive the process (measured
with 2.60). So a process of Ray's own, one for each worker that holds placement groups of gangs, watches that worker.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from typing import TYPE_CHECKING, Any

import ray
from ray.util import remove_placement_group

from scheduling import _ray_state

if TYPE_CHECKING:
    from ray.actor import ActorHandle

_LOOK = 1.0
"""Seconds between looks at the worker: Ray has no event for its death that others can wait for."""
_NAMESPACE = "gangline"


class Guard:
    """Has the placement groups of this process removed when it dies. Safe in several threads."""

    def __init__(self) -> None:
        self.start_anew()

    def start_anew(self) -> None:
        """Hold nothing: in a forked child, all that there is is its parent's, and another thread of that's the lock."""
        self._lock = threading.Lock()
        self._mark = ""
        self._made_by: tuple[str, str] | None = None
        self._reaper: ActorHandle[Any] | None = None
        self._held = 0
        self._number = 0

    def hold(self, name: str) -> str:
        """Return a name, unique in Ray, for a placement group that is about to be made; `let_go` once it is removed."""
        with self._lock:
            connection = _ray_state.connection()
            if self._made_by != connection:
                self._made_by, self._mark = connection, secrets.token_hex(4)
                self._reaper, self._held = None, 0
            if self._reaper is None and _ray_state.is_worker():
                # All that it needs goes along with its creation: from then on it is Ray's, also without this process.
                options = _Reaper.options(name=f"reaper-{self._mark}-{self._number}", **_OPTIONS)
                self._reaper = options.remote(*_ray_state.own_worker(), self._mark)
            self._held += 1
            self._number += 1
            return f"{name}-{self._mark}-{self._number}"

    def let_go(self, name: str) -> None:
        """Take note that the placement group of this name is no more."""
        with self._lock:
            if _mark_of(name) != self._mark:
                return  # of an earlier connection to Ray
            self._held -= 1
            if not self._held and self._reaper is not None:
                reaper, self._reaper = self._reaper, None
                ray.kill(reaper)


guard = Guard()
os.register_at_fork(after_in_child=guard.start_anew)


class Reaper:
    """Lives until a worker has died; then removes the placement groups that have the worker's mark in their names."""

    def __init__(self, worker: str, node: str, mark: str) -> None:
        self._worker = worker
        self._node = node
        self._mark = mark
        threading.Thread(target=self._watch, name=f"reaper of {worker}", daemon=True).start()

    def _watch(self) -> None:
        try:
            while _ray_state.is_worker_alive(self._worker, self._node):
                time.sleep(_LOOK)
            while left := [group for name, group in _ray_state.read_groups() if _mark_of(name) == self._mark]:
                for group in left:
                    remove_placement_group(group)
                time.sleep(_LOOK)
        except BaseException:
            os._exit(1)  # Ray's head did not answer; Ray starts this actor again once it does
        ray.kill(ray.get_runtime_context().current_actor)


def _mark_of(name: str) -> str:
    return name.rpartition("-")[0].rpartition("-")[2]


_Reaper: Any = ray.remote(Reaper)
_OPTIONS = {"num_cpus": 0, "max_restarts": -1, "lifetime": "detached", "namespace": _NAMESPACE}
