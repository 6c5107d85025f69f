"""Resources and the other values: what they accept, and what they say."""

from __future__ import annotations

import copy
import pickle

import pytest

from scheduling import Demand, Resources
from scheduling.types import count_units, describe_amounts, units_lost


def test_default_is_one_cpu() -> None:
    assert Resources() == Resources(1, 0, 0, {})
    assert Resources().amounts() == {"CPU": 1.0}
    assert str(Resources()) == "1 CPU"


def test_nothing_is_allowed() -> None:
    assert Resources(cpu=0).amounts() == {}
    assert str(Resources(cpu=0)) == "0 CPU"


def test_says_what_it_asks_for() -> None:
    resources = Resources(cpu=0.5, gpu=1, memory=3 << 29, custom={"disk": 2})
    assert resources.amounts() == {"CPU": 0.5, "GPU": 1, "memory": 3 << 29, "disk": 2}
    assert str(resources) == "0.5 CPU, 1 GPU, 1.5 GiB memory, 2 disk"


@pytest.mark.parametrize(
    "arguments",
    [
        {"cpu": -1},
        {"cpu": float("nan")},
        {"cpu": float("inf")},
        {"cpu": 1e-5},
        {"gpu": -0.5},
        {"gpu": 1.5},
        {"memory": -1},
        {"memory": 0.5},
        {"custom": {"disk": -1}},
        {"custom": {"disk": float("nan")}},
        {"custom": {"CPU": 1}},
        {"custom": {"": 1}},
        {"custom": {"node:__internal_implicit_resource_x": 0.1}},  # kills Ray's node manager in a placement group
    ],
)
def test_refuses_bad_amounts(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="Resources"):
        Resources(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "arguments",
    [{"cpu": "1"}, {"cpu": None}, {"cpu": True}, {"memory": "1GB"}, {"custom": [("disk", 1)]}, {"custom": {1: 1}}],
)
def test_refuses_bad_types(arguments: dict[str, object]) -> None:
    with pytest.raises(TypeError, match="Resources"):
        Resources(**arguments)  # type: ignore[arg-type]


def test_hashes_copies_and_pickles_by_value() -> None:
    resources = Resources(custom={"a": 1, "b": 2})
    twin = Resources(custom={"b": 2.0, "a": 1.0, "zero": 0})
    assert resources == twin
    assert hash(resources) == hash(twin)
    assert pickle.loads(pickle.dumps(resources)) == copy.deepcopy(resources) == resources
    assert hash(pickle.loads(pickle.dumps(resources))) == hash(resources)


def test_later_changes_of_what_was_passed_do_not_count() -> None:
    custom = {"disk": 1.0}
    resources = Resources(custom=custom)
    custom["disk"] = 2.0
    assert resources.custom == {"disk": 1.0}


def test_amounts_are_whole_steps() -> None:
    assert Resources(cpu=1 / 3).cpu == 0.3333
    assert Resources(cpu=0.1 + 0.2) == Resources(cpu=0.3)


def test_units_are_exact_for_large_memory() -> None:
    assert count_units(2**50 + 1) == (2**50 + 1) * 10_000
    assert [count_units(amount) for amount in (0.57, 0.0003, 1.13, 4)] == [5_700, 3, 11_300, 40_000]


def test_units_lost_by_cutting() -> None:
    assert [units_lost(units) for units in (2_500, 5_000, 10_000, 5_700)] == [0, 0, 0, 1]
    assert max(units_lost(units) for units in range(200_000)) == 2


@pytest.mark.parametrize(("count", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_demand_refuses_bad_counts(count: int, error: type[Exception]) -> None:
    with pytest.raises(error, match="reader"):
        Demand("reader", count)


def test_describes_bytes_in_the_unit_that_fits() -> None:
    assert describe_amounts({"memory": 1}) == "1 B memory"
    assert describe_amounts({"memory": 1 << 20, "CPU": 2}) == "1 MiB memory, 2 CPU"
