"""What tests of several folders share: one private Ray, and the runtimes."""

from __future__ import annotations

import gc
import logging
import shutil
import tempfile
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CPUS = 8


class PrivateRay:
    """A one-machine Ray for the tests of one folder at a time; those of another may bring a Ray of their own."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.users: Path | None = None

    def connect(self, users: Path) -> None:
        import ray

        self.users = users
        if self.folder is not None:
            return
        self.folder = tempfile.mkdtemp(prefix="gl-", dir="/tmp")  # other paths are too long for Ray's sockets
        ray.init(
            address="local",
            num_cpus=CPUS,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=128 << 20,
            _temp_dir=self.folder,
        )

    def close(self) -> None:
        if self.folder is None:
            return
        import ray

        ray.shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)  # Ray's last processes may still write there
        self.folder = None


_ray = PrivateRay()


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Spare what has been imported from garbage collections: many tests make one, and torch and Ray are most of it."""
    gc.collect()
    gc.freeze()  # here, not later: what a test leaves behind must stay collectable


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.path.parent != _ray.users:
        _ray.close()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish() -> None:
    _ray.close()


@pytest.fixture
def ray_session(request: pytest.FixtureRequest) -> None:
    """Connect to the private Ray, which has CPUS CPUs; it is started at the first use in a folder."""
    _ray.connect(request.path.parent)


@pytest.fixture(params=["inproc", "ray"])
def runtime(request: pytest.FixtureRequest) -> str:
    """The name of a runtime that is ready for gangs."""
    if request.param == "ray":
        request.getfixturevalue("ray_session")
    return str(request.param)


@pytest.fixture(scope="module")
def private_ray() -> Iterator[None]:
    """Keep Ray's files, and the address of the last Ray started, apart from those of other programs."""
    folder = tempfile.mkdtemp(prefix="gl-")  # pytest's own paths are too long for Ray's sockets
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        patch.delenv("RAY_ADDRESS", raising=False)
        yield
    shutil.rmtree(folder)
