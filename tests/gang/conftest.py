from __future__ import annotations

import os
import shutil
import tempfile
from typing import TYPE_CHECKING

import pytest
import ray
from gang_harness import actor_processes, live_placement_groups

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail a test that leaves files, placement groups or processes behind."""
    tmp_path_factory.getbasetemp()  # pytest's own goes elsewhere
    folder = tempfile.mkdtemp(prefix="gl-")
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", folder)
        yield
    assert os.listdir(folder) == []
    shutil.rmtree(folder)
    if ray.is_initialized():
        assert live_placement_groups() == []
        assert actor_processes() == {}
