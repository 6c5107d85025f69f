"""What each package exports: a name that comes or goes is a decision, not an accident."""

import importlib

import pytest

EXPORTS = {
    "actors": """
        Actor ActorClosed ActorError CallDeadlock Gang GangHandle GangStartError GroupHandle Handle Handles NotPicklable
        NotReady RemoteCancelled RemoteError RemoteTraceback Role Stream Streams TensorRef TensorStore from_thread lend
    """,
    "collective": """
        BackendError Batch CollectiveError CollectiveMismatch CollectiveTimeout ConsumerLeft EntryStatistics Group
        GroupBroken GroupClosed GroupError GroupSpec GroupStatistics HandshakeError Layout LinkBroken LinkClosed
        LinkError Member OutOfResources Partial PeerLost Plan PortRefused ProducerFailed ReduceOp RefLost Replicate
        RowBatch RowState RowStream RowStreamError RowsLeftOver RowsMismatch ScopeEnded ScopedGroup Shard StoreError
        StoreFull StoreStatistics StreamClosed TensorRef TensorStore Work WouldBlock WrongThread plan
    """,
    "collective.testing": "CHECKS MIXES Case Check World check conformance_cases world",
    "scheduling": """
        Bundle Claim Cluster CpusOversubscribed Demand GangInfeasible GangTimeout Holder Node Placement RayUnavailable
        Request ReservationLost Resources SchedulingError Shortage Template colocate ensure_ray find_shortages
        on_labels pack reserve spread strict_pack strict_spread
    """,
}


@pytest.mark.parametrize("package", EXPORTS)
def test_exports(package):
    assert importlib.import_module(package).__all__ == EXPORTS[package].split()


@pytest.mark.parametrize("package", EXPORTS)
def test_everything_exported_is_there_and_documented(package):
    module = importlib.import_module(package)
    assert [name for name in module.__all__ if not getattr(module, name).__doc__] == []
