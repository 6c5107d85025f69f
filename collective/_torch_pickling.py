"""How torch tensors in host memory are pickled: by their bytes, beside the pickle. Imported once torch is loaded."""

from __future__ import annotations

import copyreg
import pickle
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

_CARRIERS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""By item size, a dtype that numpy has too."""
_OWN: Final = ("__reduce__", "__reduce_ex__", "__setstate__", "__torch_dispatch__")
"""What a class of tensors defines that are more than their elements and attributes."""


def reducer(kind: type) -> Callable[[Any], Any] | None:
    """Return how tensors of a class are reduced; None where it is no class of tensors, or says so itself."""
    if kind is torch.nn.Parameter:
        return _reduce_parameter
    if kind is torch.Tensor:
        return _reduce_tensor
    plain = issubclass(kind, torch.Tensor) and all(getattr(kind, each) is getattr(torch.Tensor, each) for each in _OWN)
    return _reduce_subclass if plain and not copyreg._slotnames(kind) else None  # type: ignore[attr-defined]


def _reduce_tensor(tensor: torch.Tensor) -> Any:
    """Reduce a tensor to its elements, C-contiguous, and what it has been given as attributes."""
    if not _is_plain(tensor):
        return _as_torch_does(tensor)
    torch.utils.hooks.warn_if_has_hooks(tensor)
    arguments = pickle.PickleBuffer(_content(tensor)), tensor.dtype, tuple(tensor.shape), tensor.requires_grad
    return _with_attributes(tensor, _rebuild_tensor, arguments)


def _reduce_subclass(tensor: torch.Tensor) -> Any:
    """Reduce a tensor of a class of somebody's likewise; its methods and functions are not asked."""
    kind = type(tensor)
    with torch._C.DisableTorchFunctionSubclass():
        if not _is_plain(tensor):
            return _as_torch_does(tensor)
        _, (content, *rest), *_ = _reduce_tensor(tensor)
    return _with_attributes(tensor, _rebuild_as, (content, *rest, kind))


def _with_attributes(tensor: torch.Tensor, rebuild: Callable[..., torch.Tensor], arguments: tuple[Any, ...]) -> Any:
    attributes = tensor.__dict__
    return (rebuild, arguments, attributes, None, None, _give_attributes) if attributes else (rebuild, arguments)


def _reduce_parameter(parameter: torch.nn.Parameter) -> Any:
    """Reduce a parameter like the tensor that it holds."""
    if not _is_plain(parameter):
        return _as_torch_does(parameter)
    torch.utils.hooks.warn_if_has_hooks(parameter)
    return _with_attributes(parameter, _rebuild_parameter, (parameter.detach(), parameter.requires_grad))


def _content(tensor: torch.Tensor) -> Any:
    """Return the bytes of a tensor in C order; they are its own where they lie so."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    if not plain.numel():
        return np.empty(0, np.uint8)
    if not plain.data_ptr():
        raise ValueError(f"a tensor of shape {tuple(plain.shape)} has no memory: its storage was resized to nothing")
    # As numbers of numpy's: those have any stride in a dimension of one element, which torch does not view as bytes.
    return np.ascontiguousarray(plain.view(_CARRIERS[plain.dtype.itemsize]).numpy()).reshape(-1).view(np.uint8)


def _as_torch_does(tensor: Any) -> Any:
    if tensor.is_quantized and tensor.untyped_storage().nbytes() > tensor.numel() * tensor.itemsize:
        tensor = tensor.clone()  # torch would pickle all that it is a view of
    return tensor.__reduce_ex__(pickle.HIGHEST_PROTOCOL)


def _is_plain(tensor: Any) -> bool:
    plain: bool = (
        tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not tensor.is_quantized
        and not tensor.is_nested
    )
    return plain


def _rebuild_tensor(content: Any, dtype: torch.dtype, shape: tuple[int, ...], requires_grad: bool) -> torch.Tensor:
    if not memoryview(content).nbytes:
        return torch.empty(shape, dtype=dtype, requires_grad=requires_grad)
    memory = np.frombuffer(content, np.uint8)
    # torch has no read-only tensors, and computes on aligned elements.
    if not memory.flags.writeable or memory.ctypes.data % dtype.itemsize:
        memory = memory.copy()
    return torch.from_numpy(memory).view(dtype).reshape(shape).requires_grad_(requires_grad)


def _rebuild_as(
    content: Any, dtype: torch.dtype, shape: tuple[int, ...], requires_grad: bool, kind: type[torch.Tensor]
) -> torch.Tensor:
    return _rebuild_tensor(content, dtype, shape, requires_grad=False).as_subclass(kind).requires_grad_(requires_grad)


def _rebuild_parameter(data: torch.Tensor, requires_grad: bool) -> torch.nn.Parameter:
    return torch.nn.Parameter(data, requires_grad)


def _give_attributes(tensor: torch.Tensor, attributes: dict[str, Any]) -> None:
    tensor.__dict__.update(attributes)
