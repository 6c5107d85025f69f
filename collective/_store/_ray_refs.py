"""Refs as Ray's ObjectRefs, by Ray's public hook for tensor transports.

`ray.put` keeps a Handed in the process that called `object_ref`: it holds the entry there until Ray's own counting says
that nobody has the ObjectRef any more. Who gets that reads the tensor from its owner's store over a link, on a loop of
its own, because Ray asks for it in threads that must wait.

Ray registers the transport in each actor that an ObjectRef is passed to.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import ray
from ray.experimental.rdt import (
    CommunicatorMetadata,
    TensorTransportManager,
    TensorTransportMetadata,
    register_tensor_transport,
)

from collective._store.refs import TensorRef
from collective._store.trees import Summary

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from collective._store.wire import Where

NAME: Final = "GANGLINE"


class Handed:
    """What Ray takes for a tensor: a ref, and what this process gets for it."""

    def __init__(self, ref: TensorRef, value: Any) -> None:
        self.ref = ref
        self.value = value


class Box:
    """What is put into Ray. Taken out, it is the tensor: in this process Ray has Handed for that, elsewhere itself."""

    def __init__(self, handed: Handed) -> None:
        self._handed = handed

    def __reduce__(self) -> tuple[object, ...]:
        return _unbox, (self._handed,)


def _unbox(content: Any) -> Any:
    return content.value if isinstance(content, Handed) else content


@dataclass
class Record(TensorTransportMetadata):
    """What travels beside an ObjectRef."""

    where: Where | None = None
    number: int = 0
    summary: tuple[Any, ...] = ()
    keys: tuple[Any, ...] = ()

    def ref(self) -> TensorRef:
        """Return a ref that holds nothing before its first use."""
        assert self.where is not None
        return TensorRef(self.where, self.number, Summary(*self.summary), keys=self.keys, expires=float("inf"))


class Transport(TensorTransportManager):
    """Reads from stores."""

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

    def extract_tensor_transport_metadata(self, obj_id: str, rdt_object: list[Any]) -> Record:
        (handed,) = rdt_object
        _kept[obj_id] = handed.ref
        return Record([((), "object")], "cpu", *handed.ref._record())  # type: ignore[list-item]

    def get_communicator_metadata(self, src_actor: Any, dst_actor: Any, backend: str | None = None) -> Any:
        return CommunicatorMetadata()

    def recv_multiple_tensors(
        self,
        obj_id: str,
        tensor_transport_metadata: Any,
        communicator_metadata: Any,
        target_buffers: list[Any] | None = None,
    ) -> list[Any]:
        if getattr(_asking, "for_refs", False):
            return [tensor_transport_metadata]
        return [_wait_for(_read(tensor_transport_metadata))]

    def send_multiple_tensors(self, tensors: Any, tensor_transport_metadata: Any, communicator_metadata: Any) -> None:
        raise NotImplementedError("readers read; nobody sends")

    def garbage_collect(self, obj_id: str, tensor_transport_meta: Any, tensors: list[Any]) -> None:
        _kept.pop(obj_id, None)

    def abort_transport(self, obj_id: str, communicator_metadata: Any) -> None:
        """Nothing to do: a read ends when its owner answers, or is gone."""


_kept: dict[str, TensorRef] = {}
"""By the ids of their objects, the refs that Ray holds by way of this process."""
_asking = threading.local()
_starting = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


async def object_ref(ref: TensorRef) -> Any:
    """See `TensorRef.object_ref`."""
    if not register():
        raise RuntimeError(f"{ref!r}.object_ref(): Ray does not run here; call ray.init first")
    handed = Handed(ref, await ref)
    # In a thread: at the first time Ray imports torch.
    return await asyncio.get_running_loop().run_in_executor(None, partial(_put, handed))


async def from_object_ref(found: Any) -> TensorRef:
    """See `TensorStore.from_object_ref`."""
    register()
    kept = _kept.get(found.hex())
    if kept is not None:
        return kept
    record = await asyncio.get_running_loop().run_in_executor(None, partial(_get_record, found))
    if isinstance(record, TensorRef):
        return record
    if not isinstance(record, Record):
        raise TypeError(f"{found!r} is no TensorRef's: it came from neither object_ref() nor Ray's serializer")
    ref = record.ref()
    await ref._confirm()
    return ref


def _put(handed: Handed) -> Any:
    return ray.put(Box(handed), _tensor_transport=NAME)


def register() -> bool:
    """Let Ray know of refs in this process, if it runs here; return whether it does. Idempotent."""
    if not ray.is_initialized():
        return False
    with _starting:
        with contextlib.suppress(ValueError):  # It knows, perhaps because an ObjectRef was passed here.
            register_tensor_transport(NAME, ["cpu"], Transport, Handed)
        ray.util.register_serializer(TensorRef, serializer=_serialize, deserializer=_deserialize)
    return True


def _serialize(ref: TensorRef) -> tuple[Any, tuple[Any, ...]]:
    """Have a ref travel in Ray's serializer as its ObjectRef, by which Ray counts it."""
    ref._held()
    return _put(Handed(ref, ref)), ref._record()


def _deserialize(state: tuple[Any, tuple[Any, ...]]) -> TensorRef:
    found, (where, number, summary, keys) = state
    return TensorRef(where, number, Summary(*summary), keys=keys, expires=float("inf"), keeper=found)


def _get_record(found: Any) -> Any:
    _asking.for_refs = True
    try:
        return ray.get(found)
    finally:
        _asking.for_refs = False


async def _read(record: Record) -> Any:
    return await record.ref()


def _wait_for(read: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run_coroutine_threadsafe(read, _reading_loop()).result()


def _reading_loop() -> asyncio.AbstractEventLoop:
    global _loop
    with _starting:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="gangline-ray-refs", daemon=True).start()
        return _loop
