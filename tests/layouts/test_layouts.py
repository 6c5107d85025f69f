"""Layouts: what each rank holds, as torch's DTensor has it, and what does not fit together."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_harness import layouts, meshes, shapes
from torch.distributed import tensor as dtensor
from torch.distributed.tensor import placement_types
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

from collective import Layout, Partial, ReduceOp, Replicate, Shard
from collective.layouts import StridedShard

STRIDED = placement_types._StridedShard


class Mesh:
    """What a DeviceMesh says of itself, without a process group."""

    def __init__(self, shape: tuple[int, ...], first: int = 0) -> None:
        count = int(np.prod(shape))
        self.mesh = torch.arange(first, first + count).reshape(shape)


class Tensor:
    """What a DTensor says of itself."""

    def __init__(self, shape: tuple[int, ...], device_mesh: Mesh, placements: tuple[object, ...]) -> None:
        self.shape = torch.Size(shape)
        self.device_mesh = device_mesh
        self.placements = placements


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_parts_are_those_of_torch(data):
    shape = data.draw(shapes.filter(len))
    mesh = data.draw(meshes())
    dims = st.integers(0, len(shape) - 1)
    placements = data.draw(
        st.lists(
            st.one_of(
                dims.map(dtensor.Shard),
                st.builds(lambda dim, factor: STRIDED(dim, split_factor=factor), dims, st.integers(1, 4)),
                st.just(dtensor.Replicate()),
            ),
            min_size=len(mesh),
            max_size=len(mesh),
        )
    )
    ours = [StridedShard(each.dim, each.split_factor) if isinstance(each, STRIDED) else each for each in placements]
    layout = Layout.of(Tensor(shape, Mesh(mesh, 3), tuple(ours)))
    assert layout == Layout(shape, Mesh(mesh, 3), ours)
    whole = np.arange(np.prod(shape)).reshape(shape)
    for place, rank in enumerate(layout.ranks):
        at = [int(each) for each in np.unravel_index(place, mesh)]
        length, _ = _compute_local_shape_and_global_offset(shape, mesh, at, placements)
        part = torch.from_numpy(whole)
        for number, placement in enumerate(placements):
            if not isinstance(placement, dtensor.Replicate):
                part = placement._split_tensor(part, mesh[number], with_padding=False)[0][at[number]]
        assert layout.local_shape(rank) == length == tuple(part.shape)
        np.testing.assert_array_equal(layout.local(rank, whole), part.numpy())


def _cut(array: np.ndarray, parts: int, dim: int) -> list[np.ndarray]:
    length = -(-array.shape[dim] // parts) if array.shape[dim] else 0
    return np.split(array, [min(array.shape[dim], number * length) for number in range(1, parts)], dim)


def _by_the_book(layout: Layout, rank: int, part: np.ndarray) -> np.ndarray:
    """Cut a rank's part out of the whole, one mesh dimension after the other."""
    at = np.unravel_index(list(layout.ranks).index(rank), layout.mesh)
    for number in layout.order:
        placement, parts = layout.placements[number], layout.mesh[number]
        if isinstance(placement, StridedShard):
            pieces = _cut(part, placement.split_factor, placement.dim)
            part = np.concatenate([_cut(piece, parts, placement.dim)[at[number]] for piece in pieces], placement.dim)
        elif isinstance(placement, Shard) and placement.splits is not None:
            part = np.split(part, np.cumsum(placement.splits)[:-1], placement.dim)[at[number]]
        elif isinstance(placement, Shard):
            part = _cut(part, parts, placement.dim)[at[number]]
    return part


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_parts_are_those_of_cutting_in_order(data):
    """Kind: what a rank holds, in any order of cutting, with splits, strides, empty parts and ranks in any order."""
    layout = data.draw(layouts(data.draw(shapes), partial=True))
    whole = np.arange(np.prod(layout.shape, dtype=int)).reshape(layout.shape)
    for rank in layout.ranks:
        part = _by_the_book(layout, rank, whole)
        assert layout.local_shape(rank) == part.shape
        np.testing.assert_array_equal(layout.local(rank, whole), part)


def test_a_dtensor_has_a_layout():
    from torch import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", store=FakeStore(), rank=3, world_size=6)
    try:
        mesh = distributed.init_device_mesh("cpu", (2, 3))
        placements = [dtensor.Replicate(), dtensor.Shard(-1)]
        spread = dtensor.distribute_tensor(torch.zeros(4, 7), mesh, placements)
        layout = Layout.of(spread)
        assert layout == Layout((4, 7), (2, 3), [Replicate(), Shard(1)])
        assert layout == Layout((4, 7), mesh, placements)
        assert layout.local_shape(3) == tuple(spread.to_local().shape)
        assert Layout.of(spread, ranks=range(10, 16)).local_shape(12) == (4, 1)
    finally:
        distributed.destroy_process_group()


def test_torch_reductions():
    assert Layout((4,), 2, [dtensor.Partial("product")]).placements == (Partial(ReduceOp.PROD),)
    assert Layout((4,), 2, [Partial("avg")]).partial is ReduceOp.AVG
    assert Layout((4,), 2, [Replicate()]).partial is None


def test_explicit_splits():
    layout = Layout((9, 2), (2, 2), [Shard(0, (3, 6)), Shard(-1, [0, 2])], ranks=[[5, 6], [8, 7]])
    assert [layout.local_shape(rank) for rank in (5, 6, 8, 7)] == [(3, 0), (3, 2), (6, 0), (6, 2)]


def test_a_layout_is_a_value():
    layout = Layout([8, 4], [2, 2], [Shard(0), Replicate()], np.arange(4).reshape(2, 2))
    assert layout == Layout((8, 4), (2, 2), (Shard(-2), Replicate()))
    assert pickle.loads(pickle.dumps(layout)) == layout
    assert len({layout, Layout((8, 4), (2, 2), (Shard(0), Replicate()), range(1, 5))}) == 2
    assert "ranks=range(0, 4)" in repr(layout)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (((4,), 2, [Shard(1)]), "Shard(1) cuts dimension 1 of a tensor that has 1"),
        (((4,), 2, [Shard(-2)]), "cuts dimension -2"),
        (((4,), (2, 2), [Shard(0)]), "1 placements for 2 mesh dimensions"),
        (((4,), 2, [Shard(0)], [0, 1, 2]), "3 ranks for a mesh of 2"),
        (((4,), 2, [Shard(0)], [1, 1]), "name rank 1 twice"),
        (((4,), 2, [Shard(0)], [-1, 0]), "rank -1"),
        (((4,), 0, [Shard(0)]), "at least one rank"),
        (((4,), -1, [Shard(0)]), "negative"),
        (((-4,), 1, [Shard(0)]), "shape is [-4]"),
        (((4,), 2, [Shard(0, (1, 2))]), "splits (1, 2) sum to 3, and cut 4"),
        (((4,), 2, [Shard(0, (1, 1, 2))]), "3 splits for mesh dimension 0, which has 2"),
        (((5,), (2, 2), [Shard(0), Shard(0, (1, 2))]), "sum to 3, and cut 2"),
        (((4,), (2, 2), [Partial("sum"), Partial("max")]), "reduce in different ways"),
        (((4,), 2, [placement_types._MaskPartial()]), "_MaskPartial is not known"),
        (((4,), 2, [dtensor.Partial("band")]), "'band'"),
    ],
)
def test_what_does_not_fit_is_named(arguments, said):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (each says what)
        Layout(*arguments)
    assert said in str(error.value)


@pytest.mark.parametrize("placements", [["rows"], [0], [None], Shard])
def test_what_is_no_placement_is_a_type_error(placements):
    with pytest.raises(TypeError, match="is no placement"):
        Layout((4,), 1, placements)


def test_other_types_that_are_refused():
    for call in (lambda: Shard("x"), lambda: Shard(True), lambda: Partial(3), lambda: Layout(4, 1, [Replicate()])):
        with pytest.raises(TypeError):
            call()
    with pytest.raises(TypeError, match=r"takes a torch DTensor, not torch\.Tensor"):
        Layout.of(torch.zeros(2))
    with pytest.raises(ValueError, match="has no rank 2"):
        Layout((4,), 2, [Shard(0)]).local_shape(2)
