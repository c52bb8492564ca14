"""The compile gate: every CUDA C kernel through every compiler, and that the gate can fail."""

from __future__ import annotations

import os
import tomllib
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastrnn.cuda.device import KERNELS, Kernel
from tests import compile_gate, nvrtc
from tests.compile_gate import INSTALLED, TOOLCHAINS, Row, Toolchain, compile_all, launchable

REQUIRED = bool(os.environ.get("FASTRNN_REQUIRE_GATE"))
REASONS = {toolchain: compile_gate.gate_unavailable(toolchain) for toolchain in TOOLCHAINS}
"""Why a toolchain cannot be used here, or None."""
BY_VERSION = {toolchain.version: toolchain for toolchain in TOOLCHAINS}


def needs(toolchain: Toolchain) -> None:
    """Skip where a toolchain is missing; fail where the gate is required."""
    reason = REASONS[toolchain]
    if reason and REQUIRED:
        pytest.fail(f"FASTRNN_REQUIRE_GATE is set, but the gate {reason}")
    if reason:
        pytest.skip(f"the compile gate {reason}")


def test_every_kernel_file_is_launched_from_somewhere() -> None:
    assert {k.file for k in launchable()} == {path.stem for path in KERNELS.glob("*.cu")}


def test_the_oldest_toolchains_are_those_that_the_extras_admit() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    for major in (12, 13):
        extra = project["project"]["optional-dependencies"][f"cuda{major}x"]
        (bound,) = (entry for entry in extra if entry.startswith("cuda-toolkit>="))
        lowest = bound.removeprefix("cuda-toolkit>=").split(",")[0].split(".")[:2]
        versions = [t.version.split(".") for t in TOOLCHAINS if t != INSTALLED]
        assert min(v[:2] for v in versions if v[0] == str(major)) == lowest
        assert f"<{major + 1}" in bound


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "toolchain",
    [
        pytest.param(toolchain, id=toolchain.version)
        for toolchain in TOOLCHAINS
        if toolchain.capabilities == (90,)
    ],
)
def test_every_variant_compiles_with_the_older_toolchains(toolchain: Toolchain) -> None:
    check(toolchain, launchable())


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("file", sorted({k.file for k in launchable()}))
@pytest.mark.parametrize(
    "toolchain",
    [
        pytest.param(toolchain, id=toolchain.version)
        for toolchain in TOOLCHAINS
        if toolchain.capabilities != (90,)
    ],
)
def test_every_variant_is_clean_on_every_architecture(toolchain: Toolchain, file: str) -> None:
    """No spills, no stack, registers and shared memory within the launch, the opcodes there."""
    check(toolchain, [k for k in launchable() if k.file == file])


def check(toolchain: Toolchain, kernels: list[Kernel]) -> None:
    needs(toolchain)
    rows = compile_all(kernels, toolchain=toolchain)
    assert {row.kernel for row in rows} == {
        k for k in kernels if any(k.runs_on(c) for c in toolchain.capabilities)
    }
    assert max(row.capability for row in rows) == max(toolchain.capabilities)
    wrong = [line for row in rows for line in row.lines(row.faults)]
    assert not wrong, "\n".join(wrong)
    print(*(line for row in rows for line in row.lines(row.notes)), sep="\n")


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


def compiled(kernel: Kernel, capability: int = 90, toolchain: Toolchain = INSTALLED) -> Row:
    needs(INSTALLED)
    (row,) = compile_all([kernel], [capability], toolchain)
    return row


@pytest.mark.usefixtures("source")
def test_a_clean_kernel_passes_and_its_resources_are_read() -> None:
    row = compiled(replace(plain(), opcodes=("FFMA", "BAR")))
    assert row.faults == ()
    assert row.resources
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
    needs(INSTALLED)
    rows = compile_all([kernel])
    assert sorted(row.capability for row in rows) == [80, 86, 90, 100, 120]


@pytest.mark.usefixtures("source")
def test_a_source_that_does_not_compile_is_an_error_with_the_log() -> None:
    needs(INSTALLED)
    with pytest.raises(RuntimeError, match=r"plain\.cu for sm_90: .*THREADS"):
        compile_gate.compile_module("plain", (), 90)


@pytest.mark.usefixtures("source")
def test_what_an_older_toolchain_makes_of_a_kernel_is_only_reported() -> None:
    row = compiled(plain(1024, 200), toolchain=replace(INSTALLED, judged=False))
    assert row.faults == ()
    assert any("bytes spilled" in note for note in row.notes)
    assert "bytes spilled (only reported)" in compile_gate.table([row])


OFFSETOF = """
struct Pair { float a, b; };
extern "C" __global__ void offset_kernel(float* x) { x[__builtin_offsetof(Pair, b)] = 0.0f; }
"""


def test_a_source_that_only_the_newest_takes_is_refused_by_file_toolchain_and_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "offset.cu").write_text(OFFSETOF)
    monkeypatch.setattr(compile_gate, "KERNELS", tmp_path)
    kernel = Kernel("offset", "offset_kernel", 32)
    toolchain = BY_VERSION["13.0.88"]
    needs(toolchain)
    assert compiled(kernel).faults == ()
    row = compiled(kernel, toolchain=toolchain)
    (line,) = row.lines(row.faults)
    assert line.startswith("NVRTC 13.0.88, sm_90, offset: offset_kernel: offset.cu is refused: ")
    assert "type name is not allowed" in line
    assert line in compile_gate.table([row])


@pytest.mark.parametrize("fetched", [True, False])
def test_a_toolchain_that_is_missing_is_named(
    fetched: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    compile_gate.path_of.cache_clear()
    if fetched:
        monkeypatch.setenv(compile_gate.FOLDER, str(tmp_path))
    else:
        monkeypatch.delenv(compile_gate.FOLDER, raising=False)
    where = f"not in {tmp_path}" if fetched else "FASTRNN_NVRTC names no folder"
    assert compile_gate.main(["--toolchain", "13.0.88", "--toolchain", "12.9.86"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in said] == [
        f"the compile gate needs NVRTC {version} ({where})" for version in ("13.0.88", "12.9.86")
    ]


def test_a_fetched_toolchain_is_its_libraries_under_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(command: list[str], check: bool) -> None:
        assert check
        assert command[-1] == "nvidia-cuda-nvrtc==13.0.88"
        with zipfile.ZipFile(Path(command[-2]) / "nvrtc.whl", "w") as wheel:
            for name in ("libnvrtc.so.13", "libnvrtc-builtins.so.13.0", "libnvrtc.alt.so.13"):
                wheel.writestr(f"nvidia/cu13/lib/{name}", name)
            wheel.writestr("nvidia/cu13/include/nvrtc.h", "")

    monkeypatch.setattr(nvrtc, "subprocess", SimpleNamespace(run=download))
    assert nvrtc.unpacked(tmp_path, "13.0.88") is None
    (tmp_path / "13.0.88.partial").mkdir()  # of a download that broke off
    (tmp_path / "13.0.88.partial" / "libnvrtc.so.13").touch()
    nvrtc.fetch(tmp_path, "nvidia-cuda-nvrtc", "13.0.88")
    library = nvrtc.unpacked(tmp_path, "13.0.88")
    assert library == str(tmp_path / "13.0.88" / "libnvrtc.so.13")
    assert Path(library).read_text() == "libnvrtc.so.13"
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "13.0.88", "libnvrtc-builtins.so.13.0", "libnvrtc.so.13",
    ]  # fmt: skip
