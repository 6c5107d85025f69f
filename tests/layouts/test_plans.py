"""Plans, carried out in one process, give every rank what slicing the whole tensor gives."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_harness import carry_out, pairs, spread

from collective import Layout, Partial, Replicate, Shard, plan
from collective._routes import GRAIN

HOSTS = [None, "aaaaaaaa", "aaaabbbb", "abcabcab"]


@settings(max_examples=600, deadline=None)
@given(pairs(), st.sampled_from([8, GRAIN]), st.sampled_from(HOSTS), st.booleans())
def test_a_plan_gives_every_rank_its_part(pair, itemsize, hosts, share):
    src, dst = pair
    made = plan(src, dst, itemsize=itemsize, hosts=hosts, share=share)
    held, whole = spread(src)
    for rank, result in carry_out(made, held).items():
        np.testing.assert_array_equal(result, dst.local(rank, whole))
    assert made.total == made.lower_bound == sum(made.traffic(rank).received for rank in made.ranks)
    difference, block = made.fairness
    if src.partial is None or not {*src.ranks} & {*dst.ranks}:
        assert difference <= block


@settings(max_examples=200, deadline=None)
@given(pairs(), st.sampled_from(["aaaabbbb", "abcabcab"]))
def test_a_host_gets_each_element_once_from_the_source(pair, hosts):
    src, dst = pair
    made = plan(src, dst, hosts=hosts)
    if src.partial is not None:
        return
    for rank in dst.ranks:
        mates = set(made.mates(rank))
        from_outside = sum(
            box.volume
            for mate in mates
            for route, boxes in made.part(mate).receives.items()
            for box in boxes
            if route.order[0] == mate
        )
        lacked = np.zeros(dst.local_shape(rank), bool)
        for mate in mates:
            for boxes in made.part(mate).receives.values():
                for box in boxes:
                    lacked[tuple(slice(at, at + n) for at, n in zip(box.dst, box.shape, strict=True))] = True
        assert from_outside == lacked.sum()


def test_a_plan_for_thousands_costs_what_one_rank_moves():
    shape = (1 << 16, 1 << 12)
    made = plan(Layout(shape, 1024, [Shard(0)]), Layout(shape, 512, [Shard(0)], range(1024, 1536)), itemsize=4)
    part = made.part(700)
    assert {route.order: [box.shape for box in boxes] for route, boxes in part.sends.items()} == {
        (1024 + 350,): [(64, 1 << 12)]
    }
    assert made.traffic(1024).received == 128 * 4096 * 4
    assert len(made._parts) == 2  # nobody else's was found out
    assert plan(made.src, made.dst, itemsize=4) is made


def test_a_plan_says_what_it_moves(tmp_path):
    src, dst = Layout((1024, 256), 3, [Shard(0)]), Layout((1024, 256), 2, [Shard(0)], (2, 5))
    made = plan(src, dst, itemsize=4)
    table = str(made)
    lines = [re.split(r"  +", line.strip()) for line in table.splitlines()]
    assert ["from \\ to", "2", "5", "sent"] in lines
    assert ["0", "342 KiB", ".", "342 KiB"] in lines
    assert ["1", "170 KiB", "172 KiB", "342 KiB"] in lines
    assert ["received", "512 KiB", "512 KiB", "1024 KiB"] not in lines  # rank 2 keeps nothing: its rows are 5's
    assert made.traffic(5).received == made.total - made.traffic(2).received
    file = tmp_path / "plan.svg"
    made.plot(file)
    drawn = file.read_text()
    assert drawn.startswith("<svg")
    assert "1 -&gt; 5: 172 KiB" in drawn
    with pytest.raises(ValueError, match=r"name it \.svg"):
        made.plot(tmp_path / "plan.png")


def test_what_stays_is_not_moved():
    layout = Layout((12, 5), (2, 2), [Shard(0), Replicate()])
    made = plan(layout, layout)
    assert made.total == 0
    assert made.traffic(3).kept == 30
    rows, columns = Layout((4, 4), 2, [Shard(0)]), Layout((4, 4), 2, [Shard(1)])
    assert plan(rows, columns).traffic(0) == (4, 4, 4)


@pytest.mark.parametrize(
    ("src", "dst", "said"),
    [
        (Layout((4,), 2, [Shard(0)]), Layout((5,), 2, [Shard(0)]), "global shape (4,) and dst (5,)"),
        (Layout((4,), 2, [Shard(0)]), Layout((4,), 2, [Partial()]), "only a source can be Partial"),
    ],
)
def test_layouts_that_do_not_fit(src, dst, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        plan(src, dst)


def test_hosts_that_do_not_fit():
    with pytest.raises(ValueError, match="2 hosts are given, and the layouts have ranks up to 2"):
        plan(Layout((4,), 3, [Shard(0)]), Layout((4,), 1, [Shard(0)]), hosts="ab")
    with pytest.raises(TypeError, match="dst is 3"):
        plan(Layout((4,), 3, [Shard(0)]), 3)
