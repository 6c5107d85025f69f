"""The layout of a real DTensor says what its local tensors hold, whoever made it and however torch writes that down."""

from __future__ import annotations

import contextlib
import math
import pickle
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed
from torch.distributed import tensor as dtensor
from torch.distributed._local_tensor import LocalTensorMode
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import placement_types
from torch.distributed.tensor._dtensor_spec import DTensorSpec, ShardOrderEntry, TensorMeta
from torch.testing._internal.distributed.fake_pg import FakeStore

from collective import Layout, Shard
from collective.layouts import StridedShard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

STRIDED = placement_types._StridedShard
RANKS = 24


@contextlib.contextmanager
def process_group(rank: int, size: int) -> Iterator[None]:
    """torch.distributed as one rank sees it, without any other."""
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        distributed.destroy_process_group()


@st.composite
def cuttings(draw: Callable) -> tuple[tuple[int, ...], tuple[int, ...], list[object]]:
    """Draw a shape, a mesh of one to four dimensions, and placements of torch."""
    shape = tuple(draw(st.lists(st.integers(0, 13), min_size=1, max_size=2)))
    mesh: list[int] = []
    for _ in range(draw(st.integers(1, 4))):
        mesh.append(draw(st.integers(1, min(4, RANKS // math.prod(mesh)))))
    dims = [draw(st.sampled_from([None, 0, 0, *range(len(shape))])) for _ in mesh]
    order = draw(st.permutations(range(len(mesh))))
    loose = draw(st.sampled_from([False, False, True]))  # any factors, which no order need explain
    placements: list[object] = []
    for number, dim in enumerate(dims):
        earlier = [each for each in order[: order.index(number)] if each > number and dims[each] == dim]
        factor = draw(st.integers(1, 6)) if loose else math.prod(mesh[each] for each in earlier)
        if dim is None:
            placements.append(dtensor.Replicate())
        else:
            placements.append(dtensor.Shard(dim) if factor == 1 else STRIDED(dim, split_factor=factor))
    return shape, tuple(mesh), placements


def locals_of(tensor: dtensor.DTensor, size: int) -> dict[int, torch.Tensor]:
    """Return each rank's local tensor, where one process simulates all."""
    local = tensor.to_local()
    return getattr(local, "_local_tensors", None) or dict.fromkeys(range(size), local)


@settings(max_examples=100, deadline=None)
@given(cuttings())
def test_what_redistribute_makes(cutting):
    """Kind: a layout is what the local tensors hold, in whatever order torch cut: not one reading of the placements."""
    shape, mesh, placements = cutting
    size, whole = math.prod(mesh), torch.arange(math.prod(shape)).reshape(shape)
    with process_group(0, size):
        with LocalTensorMode(size):
            known = dtensor.init_device_mesh("cpu", mesh)
            spread = dtensor.distribute_tensor(whole, known, [dtensor.Replicate()] * len(mesh))
            spread = spread.redistribute(known, placements)
            layout = Layout.of(spread)
            held = {rank: part.clone() for rank, part in locals_of(spread, size).items()}
        assert layout == Layout(shape, known, placements) == Layout(shape, mesh, placements)
    assert pickle.loads(pickle.dumps(layout)) == layout
    for rank in range(size):
        assert torch.equal(layout.local(rank, whole), held[rank])


def sharded_by_fsdp(rows: int, dims: dict[str, int], cut: Sequence[str]) -> Iterator[tuple[torch.Tensor, Layout, int]]:
    """Yield what fully_shard over "dp" (and "rep") leaves each rank of a tensor that `cut` cut before."""
    whole = torch.arange(rows * 2.0).reshape(rows, 2)
    rest = [name for name in dims if name not in ("rep", "dp")]
    for rank in range(math.prod(dims.values())):
        with process_group(rank, math.prod(dims.values())):
            mesh = distributed.init_device_mesh("cpu", tuple(dims.values()), mesh_dim_names=tuple(dims))
            at, part = dict(zip(dims, (mesh.mesh == rank).nonzero()[0].tolist(), strict=True)), whole
            for name in cut:
                part = [*part.chunk(dims[name]), *[part[:0]] * dims[name]][at[name]]
            placements = [dtensor.Shard(0) if name in cut else dtensor.Replicate() for name in rest]
            module = torch.nn.Module()
            module.w = torch.nn.Parameter(
                dtensor.DTensor.from_local(
                    part.clone(), mesh[tuple(rest)], placements, run_check=False, shape=whole.shape, stride=(2, 1)
                )
            )
            fully_shard(module, mesh=mesh[tuple(name for name in dims if name in ("rep", "dp"))])
            yield module.w.to_local().detach().clone(), Layout.of(module.w), rank


@pytest.mark.parametrize(
    ("dims", "cut"),
    [
        ({"dp": 2, "tp": 2}, ["tp"]),
        ({"dp": 3, "tp": 2}, ["tp"]),
        ({"dp": 4, "tp": 2}, []),
        ({"rep": 2, "dp": 2, "tp": 3}, ["tp"]),
        ({"dp": 2, "ep": 3, "tp": 2}, ["ep", "tp"]),
        ({"dp": 2, "ep": 3, "tp": 2}, ["tp"]),
        ({"rep": 2, "dp": 2, "ep": 2, "tp": 2}, ["ep", "tp"]),
    ],
)
def test_what_fully_shard_holds_of_a_sharded_parameter(dims, cut):
    for rows in (1, 5, 7, 8, 9, 13, 31):
        parts = list(sharded_by_fsdp(rows, dims, cut))
        whole, layouts = torch.arange(rows * 2.0).reshape(rows, 2), {layout for _, layout, _ in parts}
        assert len(layouts) == 1
        for held, layout, rank in parts:
            assert torch.equal(layout.local(rank, whole), held)


@pytest.mark.parametrize(
    ("shape", "placements", "viewed"),
    [
        ((6, 4), [dtensor.Shard(1), dtensor.Replicate()], (24,)),
        ((4, 6), [dtensor.Shard(1), dtensor.Shard(0)], (24,)),
        ((2, 4, 4), [dtensor.Shard(1), dtensor.Shard(0)], (8, 4)),
        ((2, 4, 4), [dtensor.Shard(2), dtensor.Shard(1)], (32,)),
    ],
)
def test_what_a_view_leaves(shape, placements, viewed):
    """A view's _StridedShard means what it says, though its factor may also be read as an order."""
    whole = torch.arange(math.prod(shape)).reshape(shape)
    for rank in range(4):
        with process_group(rank, 4):
            mesh = dtensor.init_device_mesh("cpu", (2, 2))
            view = dtensor.distribute_tensor(whole, mesh, placements, src_data_rank=None).view(viewed)
            assert any(isinstance(each, STRIDED) for each in view.placements)
            assert torch.equal(Layout.of(view).local(rank, whole.view(viewed)), view.to_local())


def test_an_order_of_cutting_that_torch_keeps_beside_its_placements():
    whole = torch.arange(7)
    with process_group(0, 6):
        mesh = dtensor.init_device_mesh("cpu", (3, 2))
        spec = DTensorSpec(
            mesh,
            (dtensor.Shard(0), dtensor.Shard(0)),
            TensorMeta(whole.shape, (1,), whole.dtype),
            shard_order=(ShardOrderEntry(tensor_dim=0, mesh_dims=(1, 0)),),
        )
        layout = Layout.of(dtensor.DTensor(torch.arange(2), spec, requires_grad=False))
    parts = [layout.local(rank, whole).tolist() for rank in range(6)]
    assert parts == [[0, 1], [4], [2, 3], [5], [], [6]]
    assert layout == Layout((7,), (3, 2), [STRIDED(0, split_factor=2), dtensor.Shard(0)])
    assert layout != Layout((7,), (3, 2), [Shard(0), Shard(0)])
    assert "order=[1, 0]" in repr(layout)


def test_a_local_tensor_of_another_shape_is_refused():
    """distribute_tensor cuts uneven _StridedShards otherwise than torch reads them."""
    refused = 0
    for rank in range(6):
        with process_group(rank, 6):
            mesh = dtensor.init_device_mesh("cpu", (3, 2))
            placements = [STRIDED(0, split_factor=2), dtensor.Shard(0)]
            spread = dtensor.distribute_tensor(torch.arange(7), mesh, placements, src_data_rank=None)
            if tuple(spread.to_local().shape) != Layout((7,), (3, 2), placements).local_shape(rank):
                refused += 1
                with pytest.raises(ValueError, match="distribute it as Replicate"):
                    Layout.of(spread)
    assert refused
    with process_group(1, 2):
        mesh = dtensor.init_device_mesh("cpu", (2,))
        uneven = dtensor.DTensor.from_local(
            torch.zeros(2), mesh, [dtensor.Shard(0)], shape=torch.Size([9]), stride=(1,), run_check=False
        )
        with pytest.raises(ValueError, match=r"say \(4,\) for torch's rank 1, which holds \(2,\).*splits="):
            Layout.of(uneven)


def test_an_order_is_a_value():
    shape, both = (12, 7), [Shard(0), Shard(1), Shard(0)]
    assert Layout(shape, (2, 2, 3), both, order=[2, 1, 0]) == Layout(shape, (2, 2, 3), both, order=[1, 2, 0])
    assert Layout(shape, (2, 2, 3), both, order=[0, 2, 1]) == Layout(shape, (2, 2, 3), both)
    assert Layout((7,), (3, 2), [StridedShard(0, 2), Shard(0)]) != Layout((7,), (3, 2), [Shard(0)] * 2, order=[1, 0])
    with pytest.raises(ValueError, match=r"order is \[0, 0, 1\]; it names each of the 3"):
        Layout(shape, (2, 2, 3), both, order=[0, 0, 1])
    with pytest.raises(TypeError, match="mesh dimension in order"):
        Layout(shape, (2, 2, 3), both, order=["dp"])
