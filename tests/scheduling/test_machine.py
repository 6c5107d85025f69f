"""How many CPUs there really are."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from scheduling.machine import count_cpus

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_counts_by_affinity_and_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert count_cpus(tmp_path) == 8
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert count_cpus(tmp_path) == 8
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    assert count_cpus(tmp_path) == 2
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert count_cpus(tmp_path) == 1
    (tmp_path / "cpu.max").write_text("9900000 100000\n")
    assert count_cpus(tmp_path) == 8


def test_counts_by_the_older_cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    assert count_cpus(tmp_path) == 8
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("300000\n")
    assert count_cpus(tmp_path) == 3
