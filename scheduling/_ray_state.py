"""What Ray knows of its cluster: nodes, who holds what, and whether an autoscaler is at work.

Everything here works without Ray's dashboard. Where Ray has no public way, its private one is used here and nowhere
else. All functions block; call them in a thread.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import ray
from ray import PlacementGroupID, WorkerID
from ray._private import state
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.core.generated import autoscaler_pb2, gcs_pb2
from ray.experimental import internal_kv
from ray.util import placement_group_table
from ray.util.placement_group import PlacementGroup

from scheduling.types import FrozenMap, Holder, Node

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

# Untyped, or typed in part.
_ray: Any = ray
_state: Any = state
_internal_kv: Any = internal_kv
_autoscaler_pb2: Any = autoscaler_pb2
_gcs_pb2: Any = gcs_pb2

_NAMED = 3
"""Actors of a placement group that a message names."""


def connection() -> tuple[str, str] | None:
    """Return what tells this process's connection to Ray from later ones: session and job; None where there is none."""
    if not _ray.is_initialized():
        return None
    context = _ray.get_runtime_context()
    return context.get_session_name(), context.get_job_id()


def is_worker() -> bool:
    """Return whether this process runs Ray's tasks or actors, and is no driver."""
    return bool(_ray.get_runtime_context().worker.mode == _ray.WORKER_MODE)


def own_worker() -> tuple[str, str]:
    """Return by which ids Ray knows this process and its node."""
    context = _ray.get_runtime_context()
    return context.get_worker_id(), context.get_node_id()


def is_worker_alive(worker: str, node: str) -> bool:
    """Return whether Ray takes a process to be alive."""
    if not any(each["NodeID"] == node and each["Alive"] for each in _ray.nodes()):
        return False
    found = _state.state._connect_and_get_accessor().get_worker_info(WorkerID.from_hex(worker))
    return found is not None and bool(_gcs_pb2.WorkerTableData.FromString(found).is_alive)


def read_groups() -> list[tuple[str, PlacementGroup]]:
    """Return the placement groups that are not removed, with their names."""
    return [
        (group["name"], PlacementGroup(PlacementGroupID(bytes.fromhex(group["placement_group_id"]))))
        for group in placement_group_table().values()
        if group["state"] != "REMOVED"
    ]


def read_nodes() -> list[Node]:
    """Return the living nodes."""
    available = _state.available_resources_per_node()
    return [
        Node(
            node["NodeID"],
            node["NodeName"],
            FrozenMap(node["Resources"]),
            FrozenMap({name: available.get(node["NodeID"], {}).get(name, 0.0) for name in node["Resources"]}),
            FrozenMap(node["Labels"]),
        )
        for node in _ray.nodes()
        if node["Alive"]
    ]


def read_places(placement_group_id: str) -> set[str]:
    """Return the nodes that report resources of a placement group: from a report after it came to one after it went."""
    return {
        node_id
        for node_id, available in _state.available_resources_per_node().items()
        if any(placement_group_id in name for name in available)
    }


def read_holders() -> list[Holder]:
    """Return placement groups that are in place and the actors outside of any, with what each holds on which node."""
    inside: dict[str, list[str]] = {}
    actors: list[Holder] = []
    for serialized in _state.state._connect_and_get_accessor().get_actor_table(None, "ALIVE"):
        actor = _gcs_pb2.ActorTableData.FromString(serialized)
        what = f"actor {actor.class_name} (pid {actor.pid})"
        if actor.placement_group_id:
            inside.setdefault(actor.placement_group_id.hex(), []).append(what)
        else:
            actors.append(Holder(what, actor.address.node_id.hex(), FrozenMap(dict(actor.required_resources))))
    groups = [
        holder
        for group in placement_group_table().values()
        if group["state"] in ("CREATED", "RESCHEDULING")
        for holder in _group_holders(group, inside.get(group["placement_group_id"], []))
    ]
    return groups + sorted((actor for actor in actors if actor.amounts), key=lambda actor: actor.what)


def _group_holders(group: dict[str, Any], actors: list[str]) -> list[Holder]:
    named = actors[:_NAMED] + ([f"{len(actors) - _NAMED} more"] if len(actors) > _NAMED else [])
    what = f"placement group {group['name'] or group['placement_group_id']!r}" + (
        f" with {', '.join(named)}" if named else ""
    )
    per_node: dict[str, dict[str, float]] = {}
    for index, bundle in group["bundles"].items():
        held = per_node.setdefault(group["bundles_to_node_id"][index], {})
        for name, amount in bundle.items():
            held[name] = round(held.get(name, 0.0) + amount, 4)
    return [Holder(what, node_id, FrozenMap(held)) for node_id, held in per_node.items() if node_id]


def read_autoscaler() -> bool | None:
    """Return whether an autoscaler may add nodes to the cluster; None where it is too young to tell.

    Every cluster that `ray start --head` or `ray.init()` began runs Ray's monitor, which reports also where it manages
    nothing: its report tells the two apart. A cluster without a monitor never reports.
    """
    if _state.state.get_cluster_config() is not None:  # where the platform below scales, it says so here
        return True
    if is_autoscaler_v2(fetch_from_server=True):
        reply = _autoscaler_pb2.GetClusterStatusReply.FromString(
            _internal_kv.internal_kv_get_gcs_client().get_cluster_status(timeout_s=2)
        )
        return judge_v2(
            reply.autoscaling_state.autoscaler_state_version,
            [node.instance_id or node.ray_node_type_name for node in reply.cluster_resource_state.node_states],
        )
    report = _internal_kv._internal_kv_get("__autoscaling_status")
    return judge_v1(report, [node["NodeID"] for node in _ray.nodes()])


def judge_v2(version: int, instances: Collection[str]) -> bool | None:
    """Judge by what the second autoscaler reported: nodes that it manages have an instance id or a node type."""
    return any(instances) if version > 0 else None


def judge_v1(report: bytes | None, node_ids: Collection[str]) -> bool | None:
    """Judge by what the first autoscaler reported: where it manages nothing, it makes up a node type for each node."""
    summary: Mapping[str, Any] | None = json.loads(report).get("autoscaler_report") if report else None
    if summary is None:
        return None
    types = {*summary["node_type_mapping"].values(), *summary["active_nodes"], *summary["pending_launches"]}
    return not types or not types <= {f"node_{node_id}" for node_id in node_ids}
