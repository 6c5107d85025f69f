"""ObjectRefs of Ray in the calls of actors: refused, since nobody there would count them."""

from __future__ import annotations

import copyreg
from typing import Any

import ray

from collective import freight


def refuse_object_refs() -> None:
    """Have calls refuse `ray.ObjectRef`, which arrives without its owner, so that `ray.get` waits. Idempotent."""
    copyreg.pickle(ray.ObjectRef, _reduce)


def _reduce(found: Any) -> Any:
    if freight.is_leaving():
        raise TypeError(
            f"{found!r} goes by Ray alone: pass its value, or a TensorRef, as `store.put` and `store.from_object_ref` "
            "give it"
        )
    return found.__reduce__()
