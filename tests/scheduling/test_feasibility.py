"""Feasibility: right on small cases by brute force, quick on large ones, and clear about why."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling import (
    Demand,
    Node,
    Request,
    Resources,
    Shortage,
    Template,
    colocate,
    find_shortages,
    on_labels,
    pack,
    spread,
    strict_pack,
    strict_spread,
)
from scheduling.feasibility import labels_match
from scheduling.types import FrozenMap


def node(id: str, labels: dict[str, str] | None = None, **total: float) -> Node:
    return Node(id, id, FrozenMap(total), labels=FrozenMap(labels))


def check(template: Template, demands: list[Demand], nodes: list[Node]) -> dict[str, str]:
    return {short.role: short.reason for short in find_shortages(demands, template.request(demands), nodes)}


def fits_by_trying(request: Request, nodes: list[Node]) -> bool:
    """Whether any assignment of bundles to nodes works."""
    for places in itertools.product(range(len(nodes)), repeat=len(request.bundles)):
        if request.strategy == "STRICT_PACK" and len(set(places)) > 1:
            continue
        if request.strategy == "STRICT_SPREAD" and len(set(places)) < len(places):
            continue
        if all(
            all(
                sum(bundle.resources.amounts().get(name, 0) for bundle in here) <= there.total[name]
                for name in there.total
            )
            and all(labels_match(bundle.labels, there.labels) for bundle in here)
            for index, there in enumerate(nodes)
            for here in [[b for b, place in zip(request.bundles, places, strict=True) if place == index]]
        ):
            return True
    return False


small = st.integers(0, 4)
node_lists = st.lists(st.tuples(small, small, st.sampled_from("ab")), max_size=3)
role_lists = st.lists(st.tuples(st.integers(1, 3), small, small, st.booleans()), min_size=1, max_size=2)
templates = st.sampled_from([pack(), spread(), strict_pack(), strict_spread()])


@settings(max_examples=400, deadline=None)
@given(node_lists, role_lists, templates, st.booleans())
def test_agrees_with_brute_force(
    node_list: list[tuple[int, int, str]],
    role_list: list[tuple[int, int, int, bool]],
    template: Template,
    together: bool,
) -> None:
    nodes = [node(str(i), {"zone": zone}, CPU=cpu, disk=disk) for i, (cpu, disk, zone) in enumerate(node_list)]
    demands = [
        Demand(f"r{i}", count, Resources(cpu=cpu, custom={"disk": disk}))
        for i, (count, cpu, disk, _) in enumerate(role_list)
    ]
    picky = [demand.role for demand, (*_, choosy) in zip(demands, role_list, strict=True) if choosy]
    if picky:
        template &= on_labels({"zone": "a"}, picky)
    if together and len(demands) == 2:
        template &= colocate("r0", "r1")
    request = template.request(demands)
    shortages = find_shortages(demands, request, nodes)
    assert (not shortages) == fits_by_trying(request, nodes)
    assert set(find_shortages(demands, request, nodes[::-1])) == set(shortages)


def test_what_no_node_has() -> None:
    reasons = check(pack(), [Demand("a", 1, Resources(cpu=3, gpu=1)), Demand("b", 1)], [node("x", CPU=4)])
    assert reasons == {"a": "no node has 1 GPU"}


def test_what_no_node_has_together() -> None:
    demands = [Demand("a", 1, Resources(cpu=2, custom={"disk": 1}))]
    assert check(pack(), demands, [node("x", CPU=2), node("y", CPU=1, disk=1)]) == {
        "a": "no node has 2 CPU, 1 disk together"
    }


def test_more_than_all_nodes_have() -> None:
    demands = [Demand("a", 3, Resources(cpu=1)), Demand("b", 2, Resources(cpu=1)), Demand("c", 1, Resources(cpu=0))]
    reasons = check(spread(), demands, [node("x", CPU=2), node("y", CPU=2)])
    assert reasons == dict.fromkeys("ab", "a and b together need 5 CPU; the nodes that can hold one have 4 CPU")


def test_not_enough_whole_places() -> None:
    assert check(pack(), [Demand("a", 3, Resources(cpu=2))], [node("x", CPU=3), node("y", CPU=3)]) == {
        "a": "there is room for 2 of 3 at once (a)"
    }


def test_places_that_only_a_search_rules_out() -> None:
    # 5 + 5 fill a node, and 4 + 4 + 2; no sum or count is short, but 5, 4, 4, 4, 3 leave a gap.
    nodes = [node("x", CPU=10), node("y", CPU=10)]
    demands = [Demand("a", 1, Resources(cpu=5)), Demand("b", 3, Resources(cpu=4)), Demand("c", 1, Resources(cpu=3))]
    reason = "each fits alone, but there is no way to place all of them at once"
    assert check(pack(), demands, nodes) == dict.fromkeys("abc", reason)
    demands[0] = Demand("a", 1, Resources(cpu=2))
    assert check(pack(), demands, nodes) == {}


def test_one_node_for_all() -> None:
    demands = [Demand("a", 2), Demand("b", 1, Resources(cpu=0.5))]
    assert check(strict_pack(), demands, [node("x", CPU=2.5)]) == {}
    reasons = check(strict_pack(), demands, [node("x", CPU=2), node("y", CPU=2)])
    assert reasons == dict.fromkeys("ab", "the gang needs one node with 2.5 CPU; no node has that")


def test_nodes_of_their_own() -> None:
    demands = [Demand("big", 2, Resources(cpu=2)), Demand("small", 1)]
    nodes = [node("x", CPU=2), node("y", CPU=2), node("z", CPU=1)]
    assert check(strict_spread(), demands, nodes) == {}
    assert check(strict_spread(), demands, nodes[1:]) == {"big": "big needs 2 different nodes; 1 could hold it"}
    assert check(strict_spread(), [Demand("small", 4)], nodes) == {
        "small": "small needs 4 different nodes; 3 could hold it"
    }


def test_shares_are_not_torn() -> None:
    demands = [Demand("reader", 6), Demand("trainer", 3)]
    assert check(colocate("reader", "trainer"), demands, [node("x", CPU=3), node("y", CPU=6)]) == {}
    reasons = check(colocate("reader", "trainer"), demands, [node("x", CPU=4), node("y", CPU=5)])
    assert reasons == dict.fromkeys(
        ("reader", "trainer"),
        "a share of 2 reader and 1 trainer takes 3 CPU on one node; there is room for 2 of 3 at once "
        "(reader and trainer)",
    )


def test_labels_that_no_node_has() -> None:
    demands = [Demand("a", 1), Demand("b", 1)]
    nodes = [node("x", {"zone": "a"}, CPU=2)]
    assert check(on_labels({"zone": "b"}, ["a"]), demands, nodes) == {"a": "no node has these labels"}
    (short,) = find_shortages(demands, on_labels({"zone": "b"}, ["a"]).request(demands), nodes)
    assert short == Shortage("a", 1, Resources(), FrozenMap({"zone": "b"}), "no node has these labels")
    assert str(short) == "a: 1 x (1 CPU) on nodes with labels {'zone': 'b'}: no node has these labels"


def test_no_node_at_all() -> None:
    assert check(pack(), [Demand("a", 1, Resources(cpu=0))], []) == {"a": "the cluster has no node"}


def test_actors_that_ask_for_nothing_fit_a_node_that_has_nothing() -> None:
    assert check(pack(), [Demand("a", 1000, Resources(cpu=0))], [node("x")]) == {}


def test_amounts_that_ray_rounds_still_fit() -> None:
    # A node started with 0.57 of something reports 0.5699, and an actor that asks for 0.57 fits it.
    assert check(pack(), [Demand("a", 1, Resources(custom={"disk": 0.57}))], [node("x", CPU=1, disk=0.5699)]) == {}


@pytest.mark.parametrize(
    ("wanted", "labels", "match"),
    [
        ("a", {"zone": "a"}, True),
        ("a", {"zone": "b"}, False),
        ("a", {}, False),
        ("!a", {"zone": "a"}, False),
        ("!a", {"zone": "b"}, True),
        ("!a", {}, True),
        ("in(a, b)", {"zone": "b"}, True),
        ("in(a,b)", {"zone": "c"}, False),
        ("!in(a, b)", {"zone": "b"}, False),
        ("!in(a, b)", {"zone": "c"}, True),
        ("in", {"zone": "in"}, True),
    ],
)
def test_labels(wanted: str, labels: dict[str, str], match: bool) -> None:
    assert labels_match({"zone": wanted}, labels) is match


@pytest.mark.parametrize("template", [pack(), spread(), strict_spread(), colocate("r0", "r1")])
def test_is_quick_for_thousands(template: Template) -> None:
    # Every node differs a little, as nodes do in memory; the roles fill the cluster, or miss by one.
    nodes = [node(str(i), CPU=2 + i % 3, memory=2e9 + i) for i in range(2000)]
    demands = [Demand(f"r{i}", 199, Resources(cpu=1 + i % 2, memory=10**8 * (i + 1))) for i in range(10)]
    too_many = [*demands, Demand("huge", 700, Resources(cpu=4))]
    started = time.process_time()
    assert check(template, demands, nodes) == {}
    assert set(check(template, too_many, nodes)) >= {"huge"}
    assert time.process_time() - started < 2
