"""What a Gang refuses when it is made, before anything moves."""

from __future__ import annotations

from abc import ABC, abstractmethod

import pytest

from actors import Actor, Gang, NotReady, Role
from collective import GroupSpec
from scheduling import colocate, spread


class Reader(Actor):
    def __init__(self, path: str, *, limit: int = 0) -> None:
        self.path = path


class Abstract(Actor, ABC):
    @abstractmethod
    async def read(self) -> int: ...


def reader(name: str = "reader", count: int = 2, **options) -> Role[Reader]:
    options.setdefault("args", ("data",))
    return Role(name, Reader, count, **options)


@pytest.mark.parametrize(
    ("roles", "options", "error", "says"),
    [
        ([], {}, ValueError, "at least one role"),
        ([reader(), reader()], {}, ValueError, "role 'reader' is there twice"),
        ([reader("")], {}, ValueError, "not empty"),
        ([reader(count=0)], {}, ValueError, "role 'reader': count is 0; it must be at least 1"),
        ([reader(count=-1)], {}, ValueError, "count is -1"),
        ([reader(count=1.5)], {}, TypeError, "count is 1.5"),
        ([reader(count=True)], {}, TypeError, "count is True"),
        ([reader(threads=0)], {}, ValueError, "threads is 0"),
        ([reader()], {"placement": "pack"}, TypeError, r"is 'pack', .* placement=pack\(\)"),
        ([reader()], {"placement": spread}, TypeError, r"no Placement; .* placement=spread\(\)"),
        ([reader()], {"placement": None}, TypeError, r"is None, .* placement=scheduling\.pack\(\)"),
        ([reader()], {"groups": GroupSpec("g", roles=("reader",))}, TypeError, r"groups=\[GroupSpec\(\.\.\.\)\]"),
        ([reader(args=())], {}, TypeError, "'reader': the arguments do not fit Reader: missing .*'path'"),
        ([reader(args=("a", "b"))], {}, TypeError, "too many positional"),
        ([reader(kwargs={"limits": 3})], {}, TypeError, "unexpected keyword argument 'limits'"),
        ([reader(args="data")], {}, TypeError, "args is 'data'; it must be a tuple"),
        ([reader(resources=1)], {}, TypeError, "resources is 1; it must be a scheduling.Resources"),
        ([Role("x", int, 1)], {}, TypeError, "'x': <class 'int'> is no subclass of Actor"),
        ([Role("x", Reader("a"), 1)], {}, TypeError, "no subclass of Actor"),
        ([Role("x", Abstract, 1)], {}, TypeError, "Abstract leaves read abstract"),
        (["reader"], {}, TypeError, "not a Role"),
        ([reader()], {"groups": [GroupSpec("g", ("reader", "trainer"))]}, ValueError, "no role 'trainer'"),
        ([reader()], {"groups": [GroupSpec("g", ("readr",))]}, ValueError, "did you mean 'reader'"),
        ([reader()], {"groups": [GroupSpec("g", ("reader",))] * 2}, ValueError, "group 'g' is there twice"),
        ([reader()], {"groups": [GroupSpec("g", ("reader",), backend="glo")]}, ValueError, "did you mean 'gloo'"),
        ([reader()], {"groups": [GroupSpec("g", ("reader",), backend="memory")]}, ValueError, "actors of one process"),
        ([reader()], {"groups": ["g"]}, TypeError, "it must be a sequence of GroupSpec"),
        ([reader()], {"runtime": "rai"}, ValueError, "unknown runtime 'rai'; did you mean 'ray'"),
        ([reader()], {"start_timeout": 0}, ValueError, "start_timeout is 0"),
        ([reader()], {"start_timeout": "1"}, TypeError, "start_timeout is '1'"),
        ([reader()], {"placement": colocate("reader", "trainer")}, ValueError, "trainer"),
    ],
)
def test_a_gang_that_cannot_be_is_refused_when_it_is_made(roles, options, error, says):
    with pytest.raises(error, match=says):
        Gang(*roles, **options)


def test_handles_are_there_once_it_has_started():
    readers = reader()
    gang = Gang(readers, name="team")
    with pytest.raises(NotReady, match=r"gang 'team' has not started: use `async with`"):
        gang["reader"]
    with pytest.raises(NotReady):
        gang[readers]
    with pytest.raises(KeyError, match="no role 'readr'; did you mean 'reader'"):
        gang["readr"]
    with pytest.raises(KeyError, match="no role of gang 'team'"):
        gang[reader()]
    assert repr(gang) == "<Gang 'team': reader x 2; on ray>"


@pytest.mark.parametrize("key", [1.5, True, None, ["a"], ("a", 1.5)])
def test_a_scope_refuses_at_the_call_what_is_no_key(key: object) -> None:
    with pytest.raises(TypeError, match="a scope's key is"):
        Gang(reader()).scope(key)
