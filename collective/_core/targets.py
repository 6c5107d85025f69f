"""The arrays of a caller's that several results of an operation are written into: `out`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from collective import tensors
from collective._core.operands import describe

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from collective._core.operands import Spec


def check_target(out: Any, where: str, shape: tuple[int, ...]) -> Spec:
    """Return what an array is that shall take a part of that shape.

    Raises:
        TypeError: it is no array. ValueError: it has another shape, or is read-only.
    """
    spec = describe(out, where)
    if spec.shape != shape:
        raise ValueError(f"{where} has shape {spec.shape}, and the part of this rank in dst {shape}")
    if not tensors.is_writable(out):
        raise ValueError(f"{where} is read-only")
    return spec


def check_overlaps(outs: Sequence[tuple[str, Any]], locals_: Sequence[tuple[str, Any]]) -> set[str]:
    """Return the names of the locals that are an out themselves: these are read before anything is written.

    Raises:
        ValueError: an out overlaps another, or a local partially.
    """
    known = [(*tensors.extent(array), True, where, array) for where, array in outs]
    known += [(*tensors.extent(array), False, where, array) for where, array in locals_]
    same: set[str] = set()
    reaching: list[tuple[int, int, bool, str, Any]] = []
    for each in sorted(known, key=lambda each: each[:2]):
        reaching = [other for other in reaching if other[1] > each[0]]
        for other in reaching:
            if (each[2] or other[2]) and tensors.may_overlap(each[4], other[4]):
                same.add(_pair(each, other))
        reaching.append(each)
    return same


def result_in(out: Any, shape: Sequence[int]) -> np.ndarray | None:
    """Return the memory of an array to write a part of that shape into; None where it has to be filled afterwards."""
    memory = tensors.direct_target(out)
    return None if memory is None else memory.reshape(shape)


def _pair(one: tuple[int, int, bool, str, Any], other: tuple[int, int, bool, str, Any]) -> str:
    """Return the name of the local, where one of the two is the other itself."""
    out, local = (one, other) if one[2] else (other, one)
    if local[2] or not tensors.same_memory(out[4], local[4]):
        raise ValueError(f"{out[3]} overlaps {local[3]}; pass separate memory, or as out just what is passed as input")
    return local[3]
