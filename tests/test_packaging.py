"""What is installed is what is in the tree."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ROOMS = ("actors", "collective", "scheduling")


def test_every_package_is_listed():
    found = {
        ".".join(path.parent.relative_to(ROOT).parts) for room in ROOMS for path in (ROOT / room).rglob("*.py")
    }
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(found)


def test_every_listed_package_has_an_init():
    # Without one it would be a namespace package, into which anybody could put modules.
    packages = PROJECT["tool"]["setuptools"]["packages"]
    assert [name for name in packages if not (ROOT / name.replace(".", "/") / "__init__.py").is_file()] == []


@pytest.mark.parametrize("room", ROOMS)
def test_types_are_shipped(room):
    assert (ROOT / room / "py.typed").is_file()
    assert PROJECT["tool"]["setuptools"]["package-data"][room] == ["py.typed"]


def test_constraints_hold_every_direct_dependency_exactly():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    held = {}
    for line in lines:
        name, version = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.]*)", line).groups()  # no local versions
        held[normalized(name)] = version
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *extras["dev"], *extras["bench"]]
    names = {normalized(re.match(r"[A-Za-z0-9._-]+", requirement)[0]) for requirement in wanted}
    assert names <= set(held)


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
