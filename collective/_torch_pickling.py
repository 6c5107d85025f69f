"""How torch tensors in host memory are pickled: by their bytes, beside the pickle. Imported once torch is loaded."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable


def reduce_tensor(tensor: torch.Tensor) -> Any:
    """Reduce a plain tensor to its bytes, C-contiguous; leave every other one to torch."""
    if not _is_plain(tensor):
        return _as_torch_does(tensor)
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    content: Any = plain.reshape(-1).view(torch.uint8).numpy() if plain.numel() else b""
    return _rebuild_tensor, (pickle.PickleBuffer(content), tensor.dtype, tuple(tensor.shape), tensor.requires_grad)


def reduce_parameter(parameter: torch.nn.Parameter) -> Any:
    """Reduce a parameter like the tensor that it holds."""
    if not _is_plain(parameter):
        return _as_torch_does(parameter)
    return _rebuild_parameter, (parameter.detach(), parameter.requires_grad)


REDUCERS: Final[dict[type, Callable[[Any], Any]]] = {
    torch.Tensor: reduce_tensor,
    torch.nn.Parameter: reduce_parameter,
}


def _as_torch_does(tensor: Any) -> Any:
    return tensor.__reduce_ex__(pickle.HIGHEST_PROTOCOL)


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not tensor.is_quantized
        and not tensor.is_nested
        and not tensor.__dict__
        and not tensor._backward_hooks
    )


def _rebuild_tensor(content: Any, dtype: torch.dtype, shape: tuple[int, ...], requires_grad: bool) -> torch.Tensor:
    if not memoryview(content).nbytes:
        return torch.empty(shape, dtype=dtype, requires_grad=requires_grad)
    memory = np.frombuffer(content, np.uint8)
    # torch has no read-only tensors, and computes on aligned elements.
    if not memory.flags.writeable or memory.ctypes.data % dtype.itemsize:
        memory = memory.copy()
    return torch.from_numpy(memory).view(dtype).reshape(shape).requires_grad_(requires_grad)


def _rebuild_parameter(data: torch.Tensor, requires_grad: bool) -> torch.nn.Parameter:
    return torch.nn.Parameter(data, requires_grad)
