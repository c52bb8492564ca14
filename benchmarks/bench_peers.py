"""Every peer at a toy size, as a test: it runs here and agrees with the oracle, or says why not.

Peers are timed by ``python -m benchmarks``, in processes of their own, taking turns with ours.
"""

from __future__ import annotations

import pytest

from fastrnn.bench import PEERS, Contender, measure

PAIRS = [
    pytest.param(peer, workload, id=f"{peer.name}-{workload}")
    for peer in PEERS
    for workload in peer.workloads
    if workload != "generate64" and not (peer.slow_start and workload == "recurrence")
]


@pytest.mark.parametrize(("peer", "workload"), PAIRS)
def test_peer(peer: Contender, workload: str) -> None:
    (row,) = measure([peer], workload, "tiny", rounds=1, turn_seconds=0.01).rows
    if row.status == "missing":
        pytest.skip(f"{peer.label} is missing: {row.reason}")
    assert row.status == "ok", row.reason
    assert row.seconds is not None
    assert row.seconds > 0
