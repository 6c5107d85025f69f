"""Placement templates: each places every actor once, in the way that its name says."""

from __future__ import annotations

import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling import (
    Demand,
    Resources,
    Template,
    colocate,
    on_labels,
    pack,
    spread,
    strict_pack,
    strict_spread,
)

GANG = [Demand("reader", 4, Resources(cpu=0.25)), Demand("trainer", 2, Resources(cpu=0.5)), Demand("logger", 1)]


@pytest.mark.parametrize(
    ("template", "strategy"),
    [(pack(), "PACK"), (spread(), "SPREAD"), (strict_pack(), "STRICT_PACK"), (strict_spread(), "STRICT_SPREAD")],
)
def test_one_bundle_an_actor(template: Template, strategy: str) -> None:
    request = template.request(GANG)
    assert request.strategy == strategy
    assert [bundle.members for bundle in request.bundles] == [
        *(((("reader", rank)),) for rank in range(4)),
        *(((("trainer", rank)),) for rank in range(2)),
        (("logger", 0),),
    ]
    assert request.bundles[0].resources == Resources(cpu=0.25)
    assert request.bundle_of("trainer", 1) == 5
    with pytest.raises(KeyError):
        request.bundle_of("trainer", 2)


def test_colocated_roles_share_in_equal_shares() -> None:
    request = colocate("reader", "trainer").request(GANG)
    assert [bundle.members for bundle in request.bundles] == [
        (("reader", 0), ("reader", 1), ("trainer", 0)),
        (("reader", 2), ("reader", 3), ("trainer", 1)),
        (("logger", 0),),
    ]
    assert [bundle.resources for bundle in request.bundles] == [Resources(cpu=1), Resources(cpu=1), Resources(cpu=1)]
    assert request.strategy == "PACK"


def test_sums_of_a_share_are_exact() -> None:
    demands = [
        Demand("a", 3, Resources(cpu=0.1, memory=100, custom={"disk": 0.1})),
        Demand("b", 1, Resources(cpu=0, memory=(1 << 53) + 1)),
    ]
    (bundle,) = colocate("a", "b").request(demands).bundles
    assert bundle.resources == Resources(cpu=0.3, memory=(1 << 53) + 301, custom={"disk": 0.3})


@pytest.mark.parametrize(
    ("a", "b", "gpus"),
    [
        ((3, 0.25), (1, 0.25), 1),  # one GPU shared by all
        ((1, 0.25), (1, 0.5), 0.75),
        ((3, 0.6), (1, 0), 3),  # 0.6 + 0.6 does not fit one GPU
        ((3, 0.5), (1, 1), 3),
        ((1, 2), (1, 0.5), 3),
    ],
)
def test_parts_of_gpus_do_not_straddle(a: tuple[int, float], b: tuple[int, float], gpus: float) -> None:
    demands = [Demand("a", a[0], Resources(gpu=a[1])), Demand("b", b[0], Resources(gpu=b[1]))]
    (bundle,) = colocate("a", "b").request(demands).bundles
    assert bundle.resources.gpu == gpus


def test_labels_hold_for_all_or_for_some() -> None:
    everywhere = on_labels({"zone": "a"}).request(GANG)
    assert [bundle.labels for bundle in everywhere.bundles] == [{"zone": "a"}] * 7
    readers = on_labels({"disk": "ssd"}, ["reader"]).request(GANG)
    assert [bundle.labels for bundle in readers.bundles] == [{"disk": "ssd"}] * 4 + [{}] * 3
    assert everywhere.strategy == readers.strategy == "PACK"


def test_templates_combine() -> None:
    template = colocate("reader", "trainer") & strict_spread() & on_labels({"disk": "ssd"}, ["reader"])
    request = (template & on_labels({"zone": "in(a, b)"})).request(GANG)
    assert request.strategy == "STRICT_SPREAD"
    assert [bundle.labels for bundle in request.bundles] == [{"disk": "ssd", "zone": "in(a, b)"}] * 2 + [
        {"zone": "in(a, b)"}
    ]
    assert pack() & pack() == pack()
    assert pickle.loads(pickle.dumps(template)) == template
    assert hash(template) == hash(pickle.loads(pickle.dumps(template)))


def test_contradictions_are_refused() -> None:
    with pytest.raises(ValueError, match="PACK & SPREAD"):
        _ = pack() & spread()
    with pytest.raises(ValueError, match="'b' is named twice"):
        _ = colocate("a", "b") & colocate("b", "c")
    both = on_labels({"zone": "a"}, ["reader"]) & on_labels({"zone": "b"}, ["trainer"])
    assert both.request(GANG)
    with pytest.raises(ValueError, match="'zone' must be 'a' and 'b'"):
        (both & colocate("reader", "trainer")).request(GANG)
    with pytest.raises(TypeError):
        pack() & {"zone": "a"}  # type: ignore[operator]


def test_roles_must_exist() -> None:
    for template in (colocate("reader", "writer"), on_labels({"zone": "a"}, ["writer"])):
        with pytest.raises(ValueError, match="'writer'; the gang has 'reader', 'trainer', 'logger'"):
            template.request(GANG)


@pytest.mark.parametrize("roles", [(), ("a",), ("a", "b", "a")])
def test_colocate_refuses(roles: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="colocate"):
        colocate(*roles)


def test_colocate_refuses_a_list() -> None:
    with pytest.raises(TypeError, match="strings"):
        colocate(["a", "b"])  # type: ignore[arg-type]


@pytest.mark.parametrize("labels", [{}, {"zone": ""}, {"zone": "a b"}, {"zone": "in()"}, {"zone": "-a"}])
def test_on_labels_refuses(labels: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="on_labels"):
        on_labels(labels)


def test_on_labels_refuses_bad_types() -> None:
    with pytest.raises(TypeError, match="strings"):
        on_labels({"zone": 1})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="not one string"):
        on_labels({"zone": "a"}, "reader")
    with pytest.raises(ValueError, match="names no role"):
        on_labels({"zone": "a"}, [])


def test_a_gang_needs_roles_that_differ() -> None:
    with pytest.raises(ValueError, match="at least one role"):
        pack().request([])
    with pytest.raises(ValueError, match="'a' is named twice"):
        pack().request([Demand("a", 1), Demand("a", 2)])


amounts = st.sampled_from([0.0, 0.1, 0.25, 0.57, 1.0, 3.0])
gangs = st.lists(st.tuples(st.integers(1, 12), amounts), min_size=3, max_size=5)


@given(gangs, st.sampled_from([pack(), spread(), colocate("0", "1"), colocate("2", "0") & strict_spread()]))
def test_every_actor_is_placed_once_with_what_it_asks_for(gang: list[tuple[int, float]], template: Template) -> None:
    demands = [Demand(str(role), count, Resources(cpu=cpu)) for role, (count, cpu) in enumerate(gang)]
    request = template.request(demands)
    members = [member for bundle in request.bundles for member in bundle.members]
    assert sorted(members) == sorted((d.role, rank) for d in demands for rank in range(d.count))
    cpu = {demand.role: demand.resources.cpu for demand in demands}
    for bundle in request.bundles:
        assert bundle.resources.cpu == pytest.approx(sum(cpu[role] for role, _ in bundle.members), abs=1e-9)
    for roles in template.shares:
        counts = [demand.count for demand in demands if demand.role in roles]
        shares = [bundle for bundle in request.bundles if bundle.members[0][0] in roles]
        assert len(shares) == math.gcd(*counts)
        assert len({tuple(role for role, _ in bundle.members) for bundle in shares}) == 1
