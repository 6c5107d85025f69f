"""Refs as Ray's ObjectRefs.

`object_ref` puts a Box into Ray: whoever unpickles it gets the tensor, read from its owner's store on a loop of this
module's own, since Ray unpickles in threads that must wait. So the ObjectRef goes wherever Ray takes one.

When nobody has it any more Ray tells only its tensor transports, by a public hook. So a Box has a second ObjectRef in
it, of a Handed with the transport below, that nobody ever gets: Ray drops it with the Box, and garbage_collect hears.

The transport moves no tensors. Ray has a plain async actor receive them on the loop that unpickles the arguments. Where
it begins with the arguments, they wait for a transfer that waits for them, until Ray gives up after a minute. Nor has
it transfers for tasks, for `await`, and for actors that it made before it knew the transport.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import ray
from ray import cloudpickle
from ray.exceptions import RayError
from ray.experimental.rdt import (
    CommunicatorMetadata,
    TensorTransportManager,
    TensorTransportMetadata,
    register_tensor_transport,
)
from ray.experimental.rdt import util as transports
from ray.experimental.rdt.collective_tensor_transport import GLOOTensorTransport, NCCLTensorTransport
from ray.experimental.rdt.cuda_ipc_transport import CudaIpcTransport
from ray.experimental.rdt.nixl_tensor_transport import NixlTensorTransport

from collective import tensors
from collective._core.offload import in_thread
from collective._links import borrowing
from collective._store.refs import TensorRef
from collective._store.serving import books_here
from collective._store.trees import Spec, Summary
from collective.errors import RefLost

if TYPE_CHECKING:
    from collective._store.wire import Where

NAME: Final = "GANGLINE"
LONGEST: Final = float(os.environ.get("RAY_rdt_fetch_fail_timeout_milliseconds", "60000")) / 1000
"""Seconds that Ray waits for a tensor: as long as for a tensor of its own transports, and set in the same way."""
_LOOK = 0.1
"""Seconds after which a thread that waits for Ray looks whether anybody still waits for it."""
_THREAD = "gangline-ray"

Record: TypeAlias = "tuple[Where, bytes, tuple[Any, ...], tuple[Any, ...]]"
"""What says which entry of which store, and which part of it."""


class Handed:
    """The ref that this process keeps for an ObjectRef."""

    def __init__(self, ref: TensorRef) -> None:
        self.ref = ref._again()  # the caller may free() his own


class Box:
    """What is put into Ray. Unpickled, it is the tensor."""

    def __init__(self, handed: Handed, kept: Any) -> None:
        self._handed = handed
        self._kept = kept

    def __reduce__(self) -> tuple[object, ...]:
        # Ray keeps what it sees pickled within an object as long as that. It is not for unpickling: who does that is
        # counted once more, and has Ray's record of the tensor until his process ends.
        shown = cloudpickle.dumps(self._kept)  # type: ignore[no-untyped-call]
        return _unbox, (shown, self._kept.hex(), self._handed.ref._record())


class Asked(NamedTuple):
    """What a Box is to `from_object_ref`."""

    record: Record
    kept: TensorRef | None


class Keeper(NamedTuple):
    """The ObjectRef by which Ray counts a ref that travels in its serializer."""

    found: Any
    session: str


class Lost(RefLost, RayError):
    """A RefLost that Ray raises where it finds it instead of a value."""


class NoAnswer(TimeoutError, RayError):
    """The owner of a tensor let Ray wait for too long."""


class Transport(TensorTransportManager):
    """Hears of objects that nobody has any more."""

    def tensor_transport_backend(self) -> str:
        return NAME

    @staticmethod
    def is_one_sided() -> bool:
        return True

    @staticmethod
    def can_abort_transport() -> bool:
        return True

    def actor_has_tensor_transport(self, actor: Any) -> bool:
        return True

    def extract_tensor_transport_metadata(self, obj_id: str, rdt_object: list[Any]) -> TensorTransportMetadata:
        return TensorTransportMetadata([((), "object")], "cpu")  # type: ignore[list-item]

    def get_communicator_metadata(self, src_actor: Any, dst_actor: Any, backend: str | None = None) -> Any:
        return CommunicatorMetadata()

    def recv_multiple_tensors(self, *args: Any, **kwargs: Any) -> list[Any]:
        raise NotImplementedError("nobody has an ObjectRef of what this transport keeps")

    def send_multiple_tensors(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("nobody has an ObjectRef of what this transport keeps")

    def garbage_collect(self, obj_id: str, tensor_transport_meta: Any, tensors: list[Any]) -> None:
        handed = _kept.pop(obj_id, None)
        if handed is not None:
            handed.ref.free()  # also where Ray keeps something else by this id, of before it was shut down

    def abort_transport(self, obj_id: str, communicator_metadata: Any) -> None:
        """Nothing to do: nothing is transferred."""


class _Asking(threading.local):
    for_refs = False


_kept: dict[str, Handed] = {}
"""By the ids of their objects, what Ray holds by way of this process."""
_kept_for = ""
_asking = _Asking()
_starting = threading.Lock()
_serializing = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_left_behind: list[object] = []


async def object_ref(ref: TensorRef) -> Any:
    """See `TensorRef.object_ref`."""
    if not register():
        raise RuntimeError(f"{ref!r}.object_ref(): Ray does not run here; call ray.init first")
    await ref._confirm()
    return await in_thread(partial(_put, Handed(ref)), name=_THREAD)


async def from_object_ref(found: Any) -> TensorRef:
    """See `TensorStore.from_object_ref`."""
    if not isinstance(found, ray.ObjectRef):
        raise TypeError(f"from_object_ref takes a ray.ObjectRef, not {found!r}")
    if not register():
        raise RuntimeError(f"from_object_ref({found!r}): Ray does not run here; call ray.init first")
    loop = asyncio.get_running_loop()
    abandoned = threading.Event()
    try:
        asked = await in_thread(partial(_ask, found, abandoned), name=_THREAD)
    finally:
        abandoned.set()
    if isinstance(asked, TensorRef):
        return asked
    if not isinstance(asked, Asked):
        raise TypeError(f"{found!r} is no TensorRef's: it came from neither object_ref() nor Ray's serializer")
    if asked.kept is not None and asked.kept._held().source.loop is loop:
        return asked.kept._again()
    ref = _ref(asked.record)
    await ref._confirm()
    return ref


def register() -> bool:
    """Have refs pickled by Ray in this process, if it runs here; return whether it does. Idempotent."""
    if not ray.is_initialized():
        return False
    ray.util.register_serializer(TensorRef, serializer=_serialize, deserializer=_deserialize)
    return True


def _put(handed: Handed) -> Any:
    """Put a ref into Ray. Never within Ray's pickling of something else, whose ObjectRefs it would forget then."""
    global _kept_for
    with _starting:
        _spare_torch()
        with contextlib.suppress(ValueError):  # Ray knows it.
            register_tensor_transport(NAME, ["cpu"], Transport, Handed)
        if _kept_for != _session():
            # That Ray has been shut down, and says nothing any more; but it keeps what it had.
            for before in list(_kept.values()):
                before.ref.free()
            _kept.clear()
            _kept_for = _session()
    kept = ray.put(handed, _tensor_transport=NAME)
    _kept[kept.hex()] = handed
    return ray.put(Box(handed, kept))


def _unbox(_: bytes, made: str, record: Record) -> Any:
    """Return the tensor, or the error that Ray raises then; in any thread of Ray's.

    Ray unpickles one thing after another, so that nothing else is unpickled in this process meanwhile.
    """
    if _asking.for_refs:
        handed = _kept.get(made)
        # It may be of a Ray that has been shut down: the next one begins with the same ids.
        return Asked(record, handed.ref if handed is not None and handed.ref._record() == record else None)
    try:
        return _read(record)
    except RefLost as error:
        return Lost(error.ref, error.owner, error.cause)
    except TimeoutError:
        return NoAnswer(
            f"{_ref(record)!r}: its owner has not answered in {LONGEST:g} s, which is what Ray waits; set "
            "RAY_rdt_fetch_fail_timeout_milliseconds for the process that reads it; or pass it the TensorRef, or get "
            "that by `await store.from_object_ref(found)`: its await has no such limit"
        )


class _TorchTransport(transports.TransportManagerInfo):
    """What Ray knows of one of its own transports."""

    __slots__ = ()

    @property
    def data_type(self) -> type:
        tensors.load("torch")
        tensor: type = sys.modules["torch"].Tensor
        return tensor


_TORCH_TRANSPORTS: Final = {
    "NIXL": _TorchTransport(NixlTensorTransport, ["cuda", "cpu"], object),
    "GLOO": _TorchTransport(GLOOTensorTransport, ["cpu"], object),
    "NCCL": _TorchTransport(NCCLTensorTransport, ["cuda"], object),
    "CUDA_IPC": _TorchTransport(CudaIpcTransport, ["cuda"], object),
}
"""Ray 2.60's, as `_ensure_default_transports_registered` there has them."""


def _spare_torch() -> None:
    """Have Ray know its own transports without importing torch, which it would do within the put that comes first.

    That takes seconds, in which the loop stands that pickles a ref for Ray: no thread can import for it, since the
    dynamic linker holds the GIL for tenths of a second. They import torch where somebody uses them.
    """
    if "torch" in sys.modules or importlib.util.find_spec("torch") is None:
        return
    if getattr(transports, "DEFAULT_TRANSPORTS", None) != list(_TORCH_TRANSPORTS):
        return  # another Ray, which may take its time
    with transports.transport_managers_lock:
        if not transports._default_transports_registered:
            transports._default_transports_registered = True
            transports.transport_manager_info.update(_TORCH_TRANSPORTS)


def _ask(found: Any, abandoned: threading.Event) -> Any:
    """Wait for an object, as long as somebody waits for that, and return what `from_object_ref` makes a ref of."""
    while not ray.wait([found], timeout=_LOOK)[0]:
        if abandoned.is_set():
            return None
    _asking.for_refs = True
    try:
        return ray.get(found)
    finally:
        _asking.for_refs = False


def _serialize(ref: TensorRef) -> tuple[Any, Record, float]:
    """Have a ref travel in Ray's serializer as its ObjectRef, by which Ray counts it."""
    with _serializing:
        keeper = ref._keeper
        if keeper is None or keeper.session != _session():
            if keeper is None and ref._hold is None and ref._expires is not None and ref._expires > 0:  # a lease
                return None, ref._record(), ref._expires
            with ThreadPoolExecutor(1) as thread:
                found = thread.submit(_put, Handed(ref)).result()
            # Kept by the ref: Ray counts what a call's arguments hold only when it has pickled them and let them go.
            keeper = ref._keeper = Keeper(found, _session())
        return keeper.found, ref._record(), inf


def _deserialize(state: tuple[Any, Record, float]) -> TensorRef:
    found, record, expires = state
    return _ref(record, expires=expires, keeper=None if found is None else Keeper(found, _session()))


def _session() -> str:
    """Return what names this process's connection to Ray."""
    return str(ray.get_runtime_context().get_worker_id())


def _ref(record: Record, *, expires: float = inf, keeper: Any = None) -> TensorRef:
    """Return a ref that holds nothing before its first use."""
    where, entry, summary, keys = record
    return TensorRef(where, entry, Summary(*summary), keys=keys, expires=expires, keeper=keeper)


def _read(record: Record) -> Any:
    """Return the tensor. Raises: RefLost: the entry is gone. TimeoutError: its owner does not answer."""
    where, entry, _, keys = record
    books = books_here(where.uid)
    if books is not None:  # whose loop may be what waits here
        found = books.take(entry, keys, repr(_ref(record)))
        spec = Spec.loads(found.spec)
        for kind in {leaf.kind for leaf in spec.leaves}:
            tensors.load(kind)
        return spec.assemble(found.parts, borrowing.private)
    reading = asyncio.run_coroutine_threadsafe(_await(record), _reading_loop())
    try:
        return reading.result(LONGEST)
    finally:
        reading.cancel()


async def _await(record: Record) -> Any:
    return await _ref(record)


def _reading_loop() -> asyncio.AbstractEventLoop:
    global _loop
    with _starting:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="gangline-ray-refs", daemon=True).start()
        return _loop


def _in_child() -> None:
    global _starting, _serializing, _loop
    # Other threads of the parent may have held the locks, and the loop's own thread stayed there. The loop is kept:
    # what ends it would go through descriptors that both share.
    _starting, _serializing = threading.Lock(), threading.Lock()
    _left_behind.append(_loop)
    _loop = None


os.register_at_fork(after_in_child=_in_child)
