"""Whether the cluster has an autoscaler: by what its reports say, and on a Ray that runs one."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import TYPE_CHECKING

import pytest
import ray
from ray.cluster_utils import Cluster

from scheduling import Demand, GangTimeout, Resources, pack, reserve
from scheduling import _ray_state as ray_state

if TYPE_CHECKING:
    from pathlib import Path


def report(types: dict[str, str], active: dict[str, int], launching: dict[str, int] | None = None) -> bytes:
    """What Ray's monitor keeps in the cluster's store, as far as it matters here."""
    summary = {"node_type_mapping": types, "active_nodes": active, "pending_launches": launching or {}}
    return json.dumps({"time": 1.0, "autoscaler_report": summary}).encode()


def test_no_report_yet() -> None:
    assert ray_state.judge_v1(None, ["aa"]) is None
    assert ray_state.judge_v1(json.dumps({"time": 1.0}).encode(), ["aa"]) is None
    assert ray_state.judge_v2(0, ["", ""]) is None


def test_a_cluster_that_nobody_scales() -> None:
    made_up = report({"aa": "node_aa", "bb": "node_bb"}, {"node_aa": 1, "node_bb": 1})
    assert ray_state.judge_v1(made_up, ["aa", "bb", "cc"]) is False
    assert ray_state.judge_v2(3, ["", ""]) is False


def test_a_cluster_that_is_scaled() -> None:
    assert ray_state.judge_v1(report({"10.0.0.1": "ray.head.default"}, {"ray.head.default": 1}), ["aa"]) is True
    assert ray_state.judge_v1(report({"aa": "node_aa"}, {"node_aa": 1}, {"small": 2}), ["aa"]) is True
    assert ray_state.judge_v1(report({}, {}), ["aa"]) is True
    assert ray_state.judge_v2(3, ["", "i-0123"]) is True


@pytest.mark.usefixtures("private_ray")
def test_a_real_autoscaler_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {
        "cluster_name": "fake",
        "max_workers": 1,
        "provider": {"type": "fake_multinode", "disable_node_updaters": True, "disable_launch_config_check": True},
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "small": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 1},
        },
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 1,
        **{key: {} for key in ("auth", "docker", "file_mounts")},
        **{key: [] for key in ("initialization_commands", "setup_commands", "cluster_synced_files", "rsync_exclude")},
        **{key: [] for key in ("head_setup_commands", "worker_setup_commands", "rsync_filter")},
        **{key: [] for key in ("head_start_ray_commands", "worker_start_ray_commands")},
        "file_mounts_sync_continuously": False,
    }
    (tmp_path / "cluster.yaml").write_text(json.dumps(config))
    monkeypatch.setenv("RAY_FAKE_CLUSTER", "1")
    monkeypatch.setenv("AUTOSCALER_UPDATE_INTERVAL_S", "1")
    cluster = Cluster()
    try:
        cluster.add_node(num_cpus=1, include_dashboard=False, autoscaling_config=str(tmp_path / "cluster.yaml"))
        ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)

        async def main() -> None:
            with pytest.raises(GangTimeout, match="autoscaler added no node") as caught:
                await reserve([Demand("a", 1, Resources(cpu=64))], pack(), start_timeout=4, name="g")
            assert [short.role for short in caught.value.shortages] == ["a"]

        asyncio.run(main())
        assert ray_state.read_autoscaler() is True
    finally:
        ray.shutdown()
        cluster.shutdown()
