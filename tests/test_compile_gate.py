"""The compile gate: every CUDA C kernel for every architecture, and that the gate can fail."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from fastrnn.cuda.device import KERNELS, Kernel
from tests import compile_gate
from tests.compile_gate import ARCHITECTURES, Row, compile_all, launchable

reason = compile_gate.gate_unavailable()
if reason and not os.environ.get("FASTRNN_REQUIRE_GATE"):
    pytest.skip(f"the compile gate {reason}", allow_module_level=True)


def test_the_gate_can_run_where_it_is_required() -> None:
    assert reason is None, f"FASTRNN_REQUIRE_GATE is set, but the gate {reason}"


def test_every_kernel_file_is_launched_from_somewhere() -> None:
    assert {k.file for k in launchable()} == {path.stem for path in KERNELS.glob("*.cu")}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("file", sorted({k.file for k in launchable()}))
def test_every_variant_is_clean_on_every_architecture(file: str) -> None:
    """No spills, no stack, registers and shared memory within the launch, the opcodes there."""
    rows = compile_all([k for k in launchable() if k.file == file])
    assert rows
    assert max(row.capability for row in rows) == max(ARCHITECTURES)
    wrong = [
        f"sm_{row.capability} {row.label}: {', '.join(row.faults)}" for row in rows if row.faults
    ]
    assert not wrong, "\n".join(wrong)


# --- The gate itself ---------------------------------------------------------------------------

SOURCE = """
extern "C" __global__ void __launch_bounds__(THREADS) plain_kernel(float* x, int n) {
    __shared__ float s[SHARED];
    float w[KEPT];
    for (int i = 0; i < KEPT; ++i) w[i] = x[i * n + threadIdx.x];
    s[threadIdx.x] = w[0];
    __syncthreads();
    for (int t = 0; t < n; ++t)
        for (int i = 0; i < KEPT; ++i) w[i] = w[i] * s[(t + i) % 32] + w[(i + 1) % KEPT];
    for (int i = 0; i < KEPT; ++i) x[i * n + threadIdx.x] = w[i];
}
"""


def plain(threads: int = 128, kept: int = 4, shared: int = 128) -> Kernel:
    defines = (("THREADS", threads), ("KEPT", kept), ("SHARED", shared))
    return Kernel("plain", "plain_kernel", threads, defines)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plain.cu").write_text(SOURCE)
    monkeypatch.setattr(compile_gate, "KERNELS", tmp_path)


def compiled(kernel: Kernel, capability: int = 90) -> Row:
    (row,) = compile_all([kernel], [capability])
    return row


@pytest.mark.usefixtures("source")
def test_a_clean_kernel_passes_and_its_resources_are_read() -> None:
    row = compiled(replace(plain(), opcodes=("FFMA", "BAR")))
    assert row.faults == ()
    assert row.resources.shared == 512
    assert 8 <= row.resources.registers <= 64
    assert "plain_kernel" in compile_gate.table([row])


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize(
    ("kernel", "capability", "message"),
    [
        pytest.param(plain(1024, 200), 90, "bytes spilled", id="spills"),
        pytest.param(
            replace(plain(256, 100), blocks=3), 90, "registers, 80 allow 3", id="registers"
        ),
        pytest.param(replace(plain(), shared_bytes=100 << 10), 86, "99 KiB are there", id="shared"),
        pytest.param(replace(plain(), opcodes=("HMMA",)), 90, "no HMMA", id="opcode"),
    ],
)
def test_what_a_gpu_would_regret_is_reported(kernel: Kernel, capability: int, message: str) -> None:
    row = compiled(kernel, capability)
    assert any(message in fault for fault in row.faults), row


@pytest.mark.usefixtures("source")
def test_an_architecture_that_cannot_run_a_kernel_is_left_out() -> None:
    kernel = replace(plain(), min_capability=80, without=(89,))
    rows = compile_all([kernel])
    assert sorted(row.capability for row in rows) == [80, 86, 90, 100, 120]


@pytest.mark.usefixtures("source")
def test_a_source_that_does_not_compile_is_an_error_with_the_log() -> None:
    with pytest.raises(RuntimeError, match="THREADS"):
        compiled(replace(plain(), defines=()))
