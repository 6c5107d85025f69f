"""Plans, carried out in one process, give every rank what slicing the whole tensor gives."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_harness import carry_out, pairs, spread, uneven

from collective import Layout, Partial, Replicate, Shard, plan, planning
from collective._relays import GRAIN
from collective._rings import CHAIN, CHAINED, LEFT, PLAIN, RIGHT, Ring, Route
from collective.planning import Plan

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
    assert uneven(made) * itemsize <= difference <= block


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
            if route.first == mate
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
    assert {route.first: [box.shape for box in boxes] for route, boxes in part.sends.items()} == {
        1024 + 350: [(64, 1 << 12)]
    }
    assert made.traffic(1024).received == 128 * 4096 * 4
    assert len(made._parts) == 2  # nobody else's was found out
    assert plan(made.src, made.dst, itemsize=4) is made


LARGE = (1 << 14, 1 << 12)
LATER = range(1024, 1536)


@pytest.mark.parametrize(
    ("src", "dst"),
    [
        (Layout(LARGE, 1024, [Shard(0)]), Layout(LARGE, 512, [Shard(1)], LATER)),
        (Layout(LARGE, 1024, [Shard(0)]), Layout(LARGE, 512, [Replicate()], LATER)),
        (Layout(LARGE, 1024, [Shard(0)]), Layout(LARGE, 512, [Replicate()])),
        (Layout(LARGE, 1024, [Replicate()]), Layout(LARGE, 512, [Shard(0)], LATER)),
        (Layout(LARGE, 1024, [Partial()]), Layout(LARGE, 512, [Replicate()], LATER)),
        (Layout(LARGE, (32, 32), [Shard(0), Partial()]), Layout(LARGE, (16, 32), [Shard(1), Replicate()])),
    ],
)
@pytest.mark.parametrize("hosts", [None, tuple(str(rank // 8) for rank in range(1536))])
def test_no_rank_plans_what_others_do(src, dst, hosts):
    """Calls of functions stand for time: some 50 for each of the 1,536 ranks, and no more for any of all pairs."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    for rank in (3, 1500):
        calls = 0
        sys.setprofile(count)
        try:
            Plan(src, dst, itemsize=4, hosts=hosts, share=False).part(rank)
        finally:
            sys.setprofile(None)
        assert calls < 100 * 1536


@pytest.mark.parametrize("size", [2, 3, 8, 9, 16, 21, 40])
def test_all_but_the_last_pass_on_what_they_get(size):
    ring = Ring(range(size + 2)).less([1, size])
    for last in range(size):
        for ways in [(CHAIN,), (LEFT, RIGHT)] if size > CHAINED else [(CHAIN,)]:
            passed = dict.fromkeys(ring.ranks, 0)
            for way in ways:
                route = Route(PLAIN, 99, ring, last, way)
                reached = [route.first]
                assert route.parent(route.first) == 99
                for rank in reached:
                    reached += route.children(rank)
                    passed[rank] += len(route.children(rank))
                    assert all(route.parent(child) == rank for child in route.children(rank))
                assert sorted(reached) == ring.ranks
            assert passed == {rank: (rank != ring[last]) * len(ways) for rank in ring.ranks}


def test_a_large_ring_is_a_shallow_tree_of_few_neighbours():
    ring, met, depth = Ring(range(512)), set(), 0
    for last in range(512):
        for way in (LEFT, RIGHT):
            route = Route(PLAIN, 999, ring, last, way)
            met |= {*route.children(7), route.parent(7)}
            rank, steps = 7, 0
            while rank != 999:
                rank, steps = route.parent(rank), steps + 1
            depth = max(depth, steps)
    assert depth <= 11
    assert len(met) <= 40


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


def test_plans_that_are_kept_have_few_ranks_together(monkeypatch):
    monkeypatch.setattr(planning, "CACHED", 100)
    monkeypatch.setattr(planning, "_plans", planning._Plans())
    small, large = [(Layout((n,), n, [Shard(0)]), Layout((n,), n, [Replicate()])) for n in (10, 40)]
    first, second = plan(*small), plan(*large)
    assert plan(*large) is second
    assert plan(*small) is first, "20 and 80 ranks are within the bound"
    third = plan(*large, itemsize=2)
    assert plan(*large, itemsize=2) is third
    assert plan(*small) is first, "the one that was not used for longest goes first"
    assert plan(*large) is not second


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
