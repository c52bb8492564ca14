"""``python -m benchmarks.gpu``: what it runs, with stand-ins for a GPU, and what it keeps."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import cases, parts, record, report, supervisor, tasks
from benchmarks.gpu.cases import Case, Key
from benchmarks.gpu.parts import PARTS, STAGE_SECONDS, Part, Seconds, Selection
from benchmarks.gpu.supervisor import CaseRun
from benchmarks.gpu.tasks import findings
from benchmarks.gpu.worker import MARK, decode, encode, keep_no_memory, key_of
from benchmarks.op_cases import OPS
from fastrnn.backend import BACKENDS, Dims
from fastrnn.bench import BenchResult, Contender, choose_contenders, provenance
from fastrnn.bench import Row as BenchRow
from tests.conftest import required_backends
from tests.emulator.build import cache_directory
from tests.emulator.require import require_emulator
from tests.test_cupy_stub import needs_cupy

BY_NAME = {part.name: part for part in PARTS}
PLANTED = "tests.gpu_planted:open_planted"
MACHINE = {"gpus": [{"name": "NVIDIA H100 80GB HBM3", "driver": "580.1"}], "cpu": "c", "cores": 2}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments],
        cwd=supervisor.ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip


def stored(folder: Path) -> dict[str, Any]:
    found = record.load(folder)
    assert found is not None
    return found


def rows_of(folder: Path, part: str) -> dict[tuple[str, str], dict[str, Any]]:
    rows = stored(folder)["parts"][part]["result"]["rows"]
    return {(row["op"], row["size"]): row for row in rows}


# --- What is chosen ----------------------------------------------------------------------------


def chosen(*words: str, stages: Sequence[int] = (1, 2, 3), backends: Sequence[str] = ()) -> Any:
    return {
        part.name: [case.key[2:] for case in rows]
        for part, rows in Selection(stages, words, backends).parts()
    }


def test_every_op_and_size_class_of_both_engines_is_checked() -> None:
    for backend, classes in cases.CLASSES.items():
        for toy in (False, True):
            found = {(case.op, case.size) for case in cases.smoke(backend, toy)}
            for size, which in classes.items():
                for op in which.ops or cases.SMOKE_OPS:
                    assert (op, size) in found, (backend, op, size)
    assert {case.op for case in cases.ops("cupy", False)} == {*OPS, *cases.NODES}
    assert set(cases.LARGE) == set(OPS) - {"recurrence", "recurrence_backward"}


def test_the_most_valuable_comes_first() -> None:
    names = [part.name for part in PARTS]
    assert [part.stage for part in PARTS] == sorted(part.stage for part in PARTS)
    assert names.index("smoke-cupy") < names.index("ops-cupy") < names.index("tests-cupy")
    assert {part.backend for part in PARTS if part.stage == 1} == {"", "cupy"}
    assert [case.op for case in cases.large("cupy", False)][-1] == "cross_entropy"
    assert cases.LARGE["cross_entropy"].T == 64
    assert max(cases.SANITIZED.dims.V, 0) == 1100
    assert all(part.seconds.limit <= 100 for part in PARTS)


def test_the_stages_are_estimated_to_fit() -> None:
    assert STAGE_SECONDS == {1: 165, 2: 175, 3: 150}
    text = (supervisor.ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for stage, limit in STAGE_SECONDS.items():
        parts = [part for part in PARTS if part.stage == stage]
        assert 0 < sum(part.seconds.estimate for part in parts) <= limit
        for part in parts:
            estimate, least, most = part.seconds
            assert 0 < estimate <= most, part.name
            assert least <= most, part.name
            assert f"| `{part.name}` | {estimate:g} |" in text, "the table in README.md"


def test_only_takes_parts_ops_and_sizes() -> None:
    assert list(chosen("probe")) == ["probe"]
    assert list(chosen("smoke")) == ["smoke-cupy", "engine-numba-cuda"]
    assert list(chosen("memcheck")) == ["memcheck-cupy"]
    assert chosen("smoke-cupy", "project", "odd") == {"smoke-cupy": [("project", "odd")]}
    found = chosen("large")
    assert list(found) == ["large-cupy"]
    assert len(found["large-cupy"]) == len(cases.LARGE)
    found = chosen("step", backends=["cupy"])
    assert list(found) == ["step-cupy"], "the part, not every row of an op of that name"
    assert {op for op, _ in found["step-cupy"]} > {cases.EPOCH, "character"}
    for name, keys in chosen("cross_entropy", "headline").items():
        assert keys == [("cross_entropy", "headline")] * len(keys), name
    assert set(chosen(backends=["numba-cuda"])) == {"device-numba-cuda", "engine-numba-cuda"}
    assert set(chosen(stages=[2])) == {part.name for part in PARTS if part.stage == 2}


def test_an_unknown_word_names_what_there_is() -> None:
    done = run("--only", "smoky", "--out", "nowhere")
    assert done.returncode == 2
    assert "unknown 'smoky': expected parts (probe, " in done.stderr
    assert "recurrence_backward" in done.stderr
    assert not Path("nowhere").exists()


def test_without_a_gpu_nothing_is_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "machine", lambda: {"gpus": []})
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert "no NVIDIA GPU found" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_required_backend_does_not_stand_for_another() -> None:
    assert required_backends("") == []
    assert required_backends("cupy") == ["cupy"]
    assert required_backends("1") == [name for name in BACKENDS if "cu" in name]
    with pytest.raises(ValueError, match="some of cupy, numba-cuda, got 'numba'"):
        required_backends("numba")


# --- Stand-ins ---------------------------------------------------------------------------------


def test_stage_1_on_the_emulator(tmp_path: Path) -> None:
    require_emulator()
    done = run("--emulate", "--stage", "1", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = stored(tmp_path)
    assert found["emulated"] is True
    statuses = {name: outcome["status"] for name, outcome in found["parts"].items()}
    torch = statuses.pop("torch-cupy")  # where torch is installed
    assert torch in ("ok", "absent")
    assert statuses == {
        "probe": "ok", "device-cupy": "ok", "compile-cupy": "absent", "smoke-cupy": "ok",
        "ops-cupy": "ok", "step-cupy": "ok", "tests-cupy": "ok",
    }  # fmt: skip
    for kind, part in (("smoke", "smoke-cupy"), ("ops", "ops-cupy"), ("step", "step-cupy")):
        wanted = getattr(cases, kind)("cupy", True)
        rows = rows_of(tmp_path, part)
        assert set(rows) == {(case.op, case.size) for case in wanted}
        assert {row["status"] for row in rows.values()} == {"right"}
    errors = rows_of(tmp_path, "smoke-cupy")["recurrence", "odd"]["errors"]["h"]
    assert 0 < errors[0] < 2e-6
    assert found["parts"]["tests-cupy"]["result"]["failed"] == []
    assert found["parts"]["tests-cupy"]["result"]["tests"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.log", "gpu.md"]
    text = (tmp_path / "gpu.md").read_text()
    assert "the times mean nothing" in text
    assert "## Goals" not in text


def test_stages_2_and_3_with_stand_ins(tmp_path: Path) -> None:
    require_emulator()
    pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
    done = run("--emulate", "--stage", "2", "3", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = stored(tmp_path)["parts"]
    assert {name for name, outcome in found.items() if outcome["status"] == "absent"} == {
        "memcheck-cupy", "racecheck-cupy", "peers-compiled", "profile-cupy",
    }  # fmt: skip
    rows = rows_of(tmp_path, "engine-numba-cuda")
    wanted = {(c.op, c.size) for c in BY_NAME["engine-numba-cuda"].cases(True)}  # type: ignore[misc]
    assert set(rows) == wanted
    assert {row["status"] for row in rows.values()} == {"right"}


@pytest.mark.parametrize("backend", ["cupy", "numba-cuda"])
def test_planted_faults_are_named_and_the_rest_goes_on(backend: str, tmp_path: Path) -> None:
    """A wrong kernel, a trap, an endless loop, and one that takes the process along."""
    require_emulator()
    if backend == "numba-cuda":
        pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
    done = run(
        "--emulate", PLANTED, "--stage", "1", "3", "--backend", backend, "--only", "smoke", "odd",
        "--row-limit", "8", "--out", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 1
    part = "smoke-cupy" if backend == "cupy" else "engine-numba-cuda"
    rows = {op: row for (op, _), row in rows_of(tmp_path, part).items()}
    crashing = {"sgd", "clip_by_global_norm"}
    if backend == "cupy":
        crashing |= {"recurrence", "recurrence_backward", cases.STEP}
        assert "SIGABRT" in rows["recurrence"]["reason"]
        assert "trap at clip_sgd.cu" in rows["sgd"]["reason"]
    else:
        assert "a planted trap" in rows["sgd"]["reason"]
    assert rows["clip_by_global_norm"]["reason"].startswith("hung: no end within")
    assert rows["gather"]["status"] == "wrong"
    assert "z: error" in rows["gather"]["reason"]
    assert {op for op, row in rows.items() if row["status"] == "crashed"} == crashing
    right = {op for op, row in rows.items() if row["status"] == "right"}
    assert right == set(cases.SMOKE_OPS) - crashing - {"gather"}
    outcome = stored(tmp_path)["parts"][part]
    assert outcome["status"] == "failed"
    assert "gather odd (wrong)" in outcome["reason"]
    assert "gather, odd: wrong: z: error" in done.stdout


@needs_cupy
def test_graphs_events_and_plans_through_real_cupy(tmp_path: Path) -> None:
    """What times a call on a device, with CuPy's own graphs, events and memory pool."""
    require_emulator()
    done = run(
        "--emulate", "tests.gpu_stand_ins:open_cupy_on_stub", "--backend", "cupy", "--only",
        "device", "ops", "step", "tuner", "--out", str(tmp_path),
        CUPY_CACHE_DIR=str(cache_directory() / "cupy"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = stored(tmp_path)["parts"]
    assert set(found) == {"device-cupy", "ops-cupy", "step-cupy", "tuner-cupy"}
    rows = rows_of(tmp_path, "ops-cupy")
    assert {row["status"] for row in rows.values()} == {"right"}
    # Between two events lies a millisecond there: two calls fit into what is timed, or 32.
    clip = rows.pop(("clip_by_global_norm", "headline"))
    assert clip["seconds"] == pytest.approx(1e-3 / 32)
    assert {row["seconds"] for row in rows.values()} == {0.5e-3}
    assert found["device-cupy"]["result"]["copy_bytes_per_second"] > 0
    sections = {row["section"] for row in found["tuner-cupy"]["result"]["plans"]["rows"]}
    assert sections == {"residency", "gap", "recurrence", "step", "product"}


# --- Crashes and hangs, without an emulator ------------------------------------------------------


def case(op: str, size: str = "odd", backend: str = "numpy") -> Case:
    return Case("smoke", backend, op, size, Dims(2, 2, 3, 5), toy=True)


def supervised(
    folder: Path, todo: list[Case], opener: str, seconds: float = 60.0, limit: float = 3.0
) -> tuple[CaseRun, dict[tuple[str, str], dict[str, Any]]]:
    """Run cases on NumPy with what ``opener`` in ``opened.py`` makes of it."""
    (folder / "opened.py").write_text(
        "import atexit, os, time\nfrom fastrnn.backends.numpy_ import NumpyBackend\n"
        "class Broken(NumpyBackend):\n"
        "    def sgd(self, *a): time.sleep(600)\n"
        "    def recurrence(self, *a, **k):\n        while True: print('x' * 10_000)\n"
        "    def gather(self, *a, **k): os.kill(os.getpid(), 11)\n"
        "    def clip_by_global_norm(self, *a, **k):\n        atexit.register(time.sleep, 600)\n"
        "        return super().clip_by_global_norm(*a, **k)\n"
        "    def sync(self):\n        if self.lost: raise RuntimeError('illegal address')\n"
        "    lost = False\n"
        "    def project(self, *a, **k):\n"
        "        self.lost = True\n        raise RuntimeError('illegal address')\n"
        "def broken(name): return Broken()\n"
        "def absent(name): raise ImportError('no such library')\n"
        "def silent(name): print('gone'), os._exit(0)\n"
    )
    with (folder / "log").open("ab") as log:
        made = CaseRun(
            todo, log, deadline=time.monotonic() + seconds, row_limit=limit,
            stand_in=f"opened:{opener}", env={"PYTHONPATH": f"{supervisor.ROOT}:{folder}"},
        )  # fmt: skip
        rows = made.run()
    return made, {(row["op"], row["size"]): row for row in rows}


def test_a_crash_and_a_hang_cost_a_process_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "START_LIMIT", 20.0)
    todo = [case("cross_entropy"), case("gather"), case("sgd"), case("clip_by_global_norm")]
    made, rows = supervised(tmp_path, todo, "broken")
    assert [row["status"] for row in rows.values()] == ["right", "crashed", "crashed", "right"]
    assert "killed by SIGSEGV: Fatal Python error" in rows["gather", "odd"]["reason"]
    assert rows["sgd", "odd"]["reason"].startswith("hung: no end within")
    assert len(made.exits) == 3
    assert "Current thread" in (tmp_path / "log").read_text(), "where it hung is in the log"


def test_an_op_that_ends_processes_is_not_tried_at_every_size(tmp_path: Path) -> None:
    todo = [case(op, size) for size in "abcde" for op in ("gather", "cross_entropy")]
    made, rows = supervised(tmp_path, todo, "broken")
    statuses = [rows["gather", size]["status"] for size in "abcde"]
    assert statuses == ["crashed", "crashed", "skipped", "skipped", "skipped"]
    assert rows["gather", "c"]["reason"] == "gather has ended 2 processes"
    assert {rows["cross_entropy", size]["status"] for size in "abcde"} == {"right"}
    assert len(made.exits) == 2


def test_an_op_that_has_ended_a_process_waits_for_the_others(tmp_path: Path) -> None:
    """A hang at every size may take the time of its part, but not that of the other ops."""
    todo = [
        case(op, size) for size in "abc" for op in ("gather", "cross_entropy", "project_backward")
    ]
    made, _ = supervised(tmp_path, todo, "broken")
    order = [(row["op"], row["size"]) for row in made.rows]
    assert order[0] == ("gather", "a")
    assert {op for op, _ in order[1:7]} == {"cross_entropy", "project_backward"}
    assert order[7:] == [("gather", "b"), ("gather", "c")]


def test_hung_rows_leave_time_for_the_others(tmp_path: Path) -> None:
    """The first row may hang, and another, before the limit of what says right or wrong."""
    for name in ("smoke-cupy", "ops-cupy"):
        assert 2 * BY_NAME[name].row_limit < BY_NAME[name].seconds.limit
    asked: list[float] = []

    class Asked(CaseRun):
        def __init__(self, *rest: Any, row_limit: float, **more: Any) -> None:
            asked.append(row_limit)
            super().__init__([], *rest[1:], row_limit=row_limit, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "CaseRun", Asked)
        for most in (45.0, 2.0):
            gpu.Run(tmp_path, row_limit=most).part(BY_NAME["smoke-cupy"], [], time.monotonic() + 60)
    assert asked == [15.0, 2.0]


def test_a_lost_context_is_left_behind(tmp_path: Path) -> None:
    made, rows = supervised(tmp_path, [case("project"), case("cross_entropy")], "broken")
    assert rows["project", "odd"]["status"] == "crashed"
    assert rows["project", "odd"]["reason"] == "RuntimeError: illegal address"
    assert rows["cross_entropy", "odd"]["status"] == "right"
    assert made.exits == [3, 0]


@pytest.mark.parametrize("opener", ["absent", "silent"])
def test_what_cannot_be_opened_ends_soon_and_says_why(opener: str, tmp_path: Path) -> None:
    todo = [case(op, size) for size in "ab" for op in OPS]
    made, rows = supervised(tmp_path, todo, opener)
    assert len(made.exits) == 2
    why = "no such library" if opener == "absent" else "exit status 0: gone"
    first, *rest = rows.values()
    assert first["status"] == "crashed"
    assert why in first["reason"]
    assert {row["status"] for row in rest} == {"skipped"}
    assert why in rest[0]["reason"]


def test_a_process_that_does_not_end_after_its_last_row_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "EXIT_LIMIT", 1.0)
    begin = time.monotonic()
    made, rows = supervised(tmp_path, [case("clip_by_global_norm")], "broken", limit=50.0)
    assert time.monotonic() - begin < 40
    assert rows["clip_by_global_norm", "odd"]["status"] == "right"
    assert made.exits == [-signal.SIGKILL]


def test_a_killed_process_that_does_not_go_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "END_LIMIT", 0.2)
    monkeypatch.setattr(os, "killpg", lambda *arguments: None)  # as if the driver kept it
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        supervisor.end(process)
        assert process.poll() is None
        process.kill()


def test_rows_are_skipped_when_the_time_is_up(tmp_path: Path) -> None:
    _, rows = supervised(tmp_path, [case("cross_entropy"), case("sgd")], "broken", 0.0)
    assert {row["status"] for row in rows.values()} == {"skipped"}
    assert rows["sgd", "odd"]["reason"] == "no time was left"


def python_part(name: str, code: str, **options: Any) -> Part:
    settings: dict[str, Any] = {"seconds": Seconds(1, 1, 20), **options}
    return Part(name, name.title(), 1, "cupy", task=code, **settings)


WRITES = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('{\"found\": 7}');"


def test_a_process_that_fails_hangs_or_dies_costs_only_its_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        gpu, "_command", lambda part, result, *_: [sys.executable, "-c", part.task, str(result)]
    )
    child = f"import time; time.sleep(3); open({str(tmp_path / 'late')!r}, 'w')"
    parts = [
        python_part("good", WRITES),
        python_part("bad", WRITES + "raise SystemExit('no such kernel')"),
        python_part("dead", WRITES + "import os; os.kill(os.getpid(), 11)"),
        python_part(
            "stuck",
            WRITES + "import subprocess, time;"
            f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)",
            seconds=Seconds(1, 1, 1),
        ),
        python_part("absent", "", absent=lambda stand_in: "no such tool"),
        python_part("short of time", WRITES, seconds=Seconds(1, 1e6, 1e6)),
        python_part("last", WRITES),
    ]
    begin = time.monotonic()
    made = gpu.Run(tmp_path / "out")
    made.run([(part, []) for part in parts], None)
    assert time.monotonic() - begin < 20
    found = made.found["parts"]
    assert {name: outcome["status"] for name, outcome in found.items()} == {
        "good": "ok", "bad": "failed", "dead": "failed", "stuck": "stopped", "absent": "absent",
        "short of time": "skipped", "last": "ok",
    }  # fmt: skip
    assert "no such kernel" in found["bad"]["reason"]
    assert found["stuck"]["reason"] == "no end within 1 s"
    assert found["absent"]["reason"] == "no such tool"
    assert "it needs 1000000" in found["short of time"]["reason"]
    # What a part had found before it ended badly is kept.
    assert {n for n, o in found.items() if o.get("result") == {"found": 7}} == {
        "good", "bad", "dead", "stuck", "last",
    }  # fmt: skip
    assert "no such kernel" in (tmp_path / "out" / "gpu.log").read_text()
    time.sleep(3.0)
    assert not (tmp_path / "late").exists(), "a child of a stopped part lives on"


def processes_with(mark: str) -> list[str]:
    """Those in whose environment ``FASTRNN_TEST_MARK`` is ``mark``."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"FASTRNN_TEST_MARK={mark}".encode() in (folder / "environ").read_bytes():
                found.append(f"{folder.name}: {(folder / 'cmdline').read_text()}")
        except OSError:  # it has ended, or is another user's
            continue
    return found


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_a_run_that_is_ended_leaves_what_it_had_and_no_process(
    sent: signal.Signals, tmp_path: Path
) -> None:
    require_emulator()
    out, mark = tmp_path / "out", f"{tmp_path}"
    command = [sys.executable, "-m", "benchmarks.gpu", "--emulate", "--only", "smoke-cupy",
               "--out", str(out)]  # fmt: skip
    with subprocess.Popen(
        command, cwd=supervisor.ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env={**os.environ, "FASTRNN_TEST_MARK": mark}, text=True,
    ) as process:  # fmt: skip
        for _ in range(600):
            time.sleep(0.1)
            parts = stored(out)["parts"] if (out / "gpu.json").exists() else {}
            if len(parts.get("smoke-cupy", {}).get("result", {}).get("rows", [])) > 2:
                break
        assert len(processes_with(mark)) >= 2, "the run and its worker"
        process.send_signal(sent)
        time.sleep(0.01)
        process.send_signal(sent)  # timeout(1) sends its signal to the process and to the group
        printed, _ = process.communicate(timeout=20)
    outcome = stored(out)["parts"]["smoke-cupy"]
    assert outcome["status"] == "stopped"
    assert len(outcome["result"]["rows"]) > 2
    deadline = time.monotonic() + 20  # a compiler that the killed worker had started may finish
    while processes_with(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_with(mark) == []
    if sent != signal.SIGKILL:
        assert process.returncode == 128 + sent
        assert "the run was ended" in printed
        assert "the run was ended" in (out / "gpu.md").read_text()
        assert sorted(path.name for path in out.iterdir()) == ["gpu.json", "gpu.log", "gpu.md"]


def test_what_a_task_had_found_is_kept_when_the_run_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        gpu, "_command", lambda part, result, *_: [sys.executable, "-c", part.task, str(result)]
    )
    code = f"{WRITES} import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(9)"
    made = gpu.Run(tmp_path)
    chosen: Any = [(python_part("tuner", code), []), (python_part("next", WRITES), [])]
    before = {each: signal.getsignal(each) for each in gpu.ENDING}
    try:
        assert gpu._run_and_tell(made, chosen, None) == 143
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    found = stored(tmp_path)["parts"]
    assert set(found) == {"tuner"}
    assert found["tuner"]["result"] == {"found": 7}
    assert found["tuner"]["reason"] == "the run was ended"


def test_tests_that_hang_or_are_stopped_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that hangs costs its process; where pytest is stopped, its lines tell what it had."""
    (tmp_path / "test_some.py").write_text(
        "import ctypes, time\ndef test_right(): pass\ndef test_wrong(): assert False\n"
        "def test_stuck():\n    while True: ctypes.CDLL(None).pause()\n"
        "def test_long(): time.sleep(500)\n"
    )
    monkeypatch.setattr(gpu, "TEST_LIMIT", 3)
    real = gpu._command

    def few(*arguments: Any) -> list[str]:
        command = real(*arguments)
        command[command.index("-n") + 1] = "2"
        return command

    monkeypatch.setattr(gpu, "_command", few)
    monkeypatch.setattr(gpu.Run, "_env", lambda self, part: {})
    made = gpu.Run(tmp_path / "out")
    part = Part("tests-cupy", "", 1, "cupy", Seconds(1, 1, 60),
                tests=[str(tmp_path / "test_some.py")], keyword="not long")  # fmt: skip
    made.part(part, [], time.monotonic() + 60)
    monkeypatch.setattr(gpu, "TEST_LIMIT", 500)
    later = replace(part, name="later", keyword="not stuck", seconds=Seconds(1, 1, 20))
    made.part(later, [], time.monotonic() + 60)
    found = made.found["parts"]
    assert found["tests-cupy"]["status"] == "failed"
    assert len(found["tests-cupy"]["result"]["failed"]) == 2
    assert "test_stuck" in str(found["tests-cupy"]["result"]["failed"])
    assert found["later"]["status"] == "failed"
    assert found["later"]["reason"] == "no end within 20 s; 1 tests had failed"
    assert found["later"]["result"]["tests"] == 2
    assert [name.split("::")[1] for name in found["later"]["result"]["failed"]] == ["test_wrong"]


def test_what_a_part_needs_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "find_spec", lambda name: None if name == "xdist" else name)
    assert BY_NAME["tests-cupy"].absent(False) == "not installed: xdist"
    assert BY_NAME["torch-cupy"].absent(False) is None


def test_every_row_is_stored_as_soon_as_it_is_there(tmp_path: Path) -> None:
    """The last one before a long row too."""
    (tmp_path / "slow.py").write_text(
        "import time\nfrom fastrnn.backends.numpy_ import NumpyBackend\n"
        "class Slow(NumpyBackend):\n    def sgd(self, *a): time.sleep(4)\n"
        "def opened(name): return Slow()\n"
    )
    todo = [case("gather"), case("project"), case("sgd")]
    part = Part("smoke-cupy", "", 1, "cupy", Seconds(1, 1, 30), cases=lambda toy: todo)
    made = gpu.Run(tmp_path / "out", "slow:opened", row_limit=2.0)
    seen: list[int] = []
    save = made.save

    def noted(markdown: bool = True) -> record.Record:
        joined = save(markdown)
        rows = stored(tmp_path / "out")["parts"]["smoke-cupy"].get("result", {}).get("rows", [])
        seen.append(len(rows))
        return joined

    made.save = noted  # type: ignore[method-assign]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        made.run([(part, todo)], None)
    assert seen == [1, 2, 3, 3]


def test_a_flood_of_output_ends_its_process_and_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        gpu, "_command", lambda part, result, *_: [sys.executable, "-c", part.task, str(result)]
    )
    monkeypatch.setattr(supervisor, "PRINTED_LIMIT", 1 << 20)
    monkeypatch.setattr(gpu, "LOG_BYTES", 1 << 16)
    flood = f"{WRITES}\nwhile True: sys.stdout.buffer.write(bytes(range(256)) * 1000)"
    made = gpu.Run(tmp_path)
    parts = [python_part("loud", flood), python_part("next", WRITES + "print('still there')")]
    made.run([(part, []) for part in parts], None)
    found = stored(tmp_path)["parts"]
    assert found["loud"]["status"] == "stopped"
    assert "it printed more than" in found["loud"]["reason"]
    assert found["loud"]["result"] == {"found": 7}
    assert found["next"]["status"] == "ok"
    text = (tmp_path / "gpu.log").read_bytes()
    assert len(text) < 1 << 17
    assert b"bytes left out" in text
    assert text.endswith(b"still there\n")


def test_a_row_that_floods_the_log_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "PRINTED_LIMIT", 1 << 20)
    _, rows = supervised(tmp_path, [case("recurrence"), case("cross_entropy")], "broken")
    assert rows["recurrence", "odd"]["status"] == "crashed"
    assert "it printed more than" in rows["recurrence", "odd"]["reason"]
    assert rows["cross_entropy", "odd"]["status"] == "right"


def test_a_full_disk_and_a_failing_supervisor_cost_a_part_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = gpu.Run(tmp_path)

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record, "save", full)
    monkeypatch.setattr(gpu, "_command", lambda part, *_: 1 / 0 if part.name == "bad" else ["true"])
    chosen: Any = [(python_part("bad", ""), []), (BY_NAME["probe"], [])]
    assert gpu._run_and_tell(made, chosen, None) == 1
    told = capsys.readouterr()
    assert told.err.count("No space left on device") == 1
    assert made.found["parts"]["bad"]["reason"] == "ZeroDivisionError: division by zero"
    assert made.found["parts"]["probe"]["status"] == "ok"
    assert "Versions and tools" in told.out


# --- The record ----------------------------------------------------------------------------------


def row(op: str, status: str = "right", size: str = "odd", **more: Any) -> dict[str, Any]:
    reason = {} if status == "right" else {"reason": "why"}
    return {**encode(case(op, size, "cupy")), "status": status, "errors": {}, **reason, **more}


def made_record(rows: list[dict[str, Any]], date: str, **more: Any) -> record.Record:
    status, reason = record.judge(rows)
    outcome = {"status": status, "stage": 1, "result": {"rows": rows}, "commit": date}
    outcome |= {"reason": reason} if reason else {}
    return {
        "machine": MACHINE, "commit": {"id": "c" * 40}, "date": date, "emulated": False,
        "parts": {"smoke-cupy": outcome}, **more,
    }  # fmt: skip


def test_a_case_survives_json() -> None:
    one = case("gather")
    assert decode(json.loads(json.dumps(encode(one)))) == one
    assert key_of(encode(one)) == one.key == Key("smoke", "numpy", "gather", "odd")


def test_a_mended_row_replaces_the_wrong_one_and_nothing_else() -> None:
    first = made_record([row("gather"), row("sgd", "wrong"), row("project", "crashed")], "1")
    assert first["parts"]["smoke-cupy"]["status"] == "failed"
    second = made_record([row("sgd"), row("project", "skipped")], "2")
    joined = record.join(first, second)
    found = {r["op"]: r["status"] for r in joined["parts"]["smoke-cupy"]["result"]["rows"]}
    assert found == {"gather": "right", "sgd": "right", "project": "crashed"}
    assert joined["parts"]["smoke-cupy"]["status"] == "failed"
    third = record.join(joined, made_record([row("project")], "3"))
    assert third["parts"]["smoke-cupy"]["status"] == "ok"
    assert "reason" not in third["parts"]["smoke-cupy"]
    # The order in which they are given does not matter, their dates do.
    assert record.join(second, first)["parts"] == joined["parts"]


def test_a_part_that_was_not_run_again_keeps_its_result() -> None:
    first = made_record([row("gather")], "1")
    for status in ("skipped", "absent"):
        second = made_record([], "2")
        second["parts"] = {"smoke-cupy": {"status": status, "reason": "no time"}, "probe": {}}
        joined = record.join(first, {**second, "parts": {**second["parts"]}})
        assert joined["parts"]["smoke-cupy"]["status"] == "ok"


def test_records_of_different_devices_are_not_joined() -> None:
    one = made_record([row("gather")], "1")
    with pytest.raises(ValueError, match="different stand-in or device"):
        record.join(one, {**one, "emulated": True})
    other = {**MACHINE, "gpus": [{"name": "NVIDIA H200", "driver": "1"}]}
    with pytest.raises(ValueError, match=r"different GPUs cannot be joined.*H100.*H200"):
        record.join(one, {**one, "machine": other})


def test_what_is_not_finite_is_null_and_strict_json(tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    rows = [row("gather", "wrong", errors={"z": [nan, 1e-8], "h": [inf, None]}), row("sgd")]
    record.save(made_record(rows, "1"), tmp_path)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    text = (tmp_path / "gpu.json").read_text()
    found = json.loads(text, parse_constant=refuse)
    stored_rows = found["parts"]["smoke-cupy"]["result"]["rows"]
    assert stored_rows[0]["errors"] == {"z": [None, 1e-8], "h": [None, None]}
    assert "gather, odd: wrong: why" in report.markdown(found)
    found["parts"]["ops-cupy"] = found["parts"]["smoke-cupy"]
    assert "not measured" in report.markdown(found)


def test_two_runs_do_not_write_into_one_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with record.alone(tmp_path):
        assert gpu.main(["--emulate", "--only", "probe", "--out", str(tmp_path)]) == 2
        assert f"{tmp_path}: another run writes there" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert gpu.main(["--emulate", "--only", "probe", "--out", str(tmp_path)]) == 0


def test_a_choice_of_nothing_and_a_folder_that_is_a_file_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(["--emulate", "--stage", "2", "--only", "smoke", "--out", str(tmp_path)]) == 2
    assert "nothing to run: no part of those stages" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert gpu.main(["--emulate", "--only", "probe", "--out", str(tmp_path / "file")]) == 2
    assert "File exists" in capsys.readouterr().err


def test_merge_joins_folders_and_draws_the_report(tmp_path: Path) -> None:
    for name, rows in (("a", [row("gather"), row("sgd", "wrong")]), ("b", [row("sgd")])):
        (tmp_path / name).mkdir()
        record.save(made_record(rows, name), tmp_path / name)
        (tmp_path / name / "gpu.log").write_text(f"log {name}\n")
    out = tmp_path / "out"
    folders = [str(tmp_path / name) for name in "ab"]
    assert gpu.main(["--merge", *folders, "--out", str(out)]) == 0
    assert stored(out)["parts"]["smoke-cupy"]["status"] == "ok"
    assert (out / "gpu.log").read_text() == "log a\nlog b\n"
    assert "NVIDIA H100 80GB HBM3, driver 580.1" in (out / "gpu.md").read_text()
    assert len(list(out.iterdir())) <= 8


def test_parts_and_rows_are_joined_by_their_own_dates() -> None:
    """A record of yesterday and tomorrow does not outdo one of today for what it ran yesterday."""

    def at(date: str, name: str, rows: list[dict[str, Any]]) -> record.Record:
        made = made_record([row | {"date": date} for row in rows], date)
        made["parts"] = {name: made["parts"]["smoke-cupy"] | {"date": date}}
        return made

    both = record.join(
        at("1", "smoke-cupy", [row("gather", "wrong"), row("sgd", "wrong")]),
        at("3", "ops-cupy", [row("gather")]),
    )
    today = at("2", "smoke-cupy", [row("gather")])
    for pair in ((both, today), (today, both)):
        rows = record.join(*pair)["parts"]["smoke-cupy"]["result"]["rows"]
        assert {r["op"]: r["status"] for r in rows} == {"gather": "right", "sgd": "wrong"}
    mended = record.join(both, at("4", "smoke-cupy", [row("sgd")]))  # gather is of "1" there
    for pair in ((mended, today), (today, mended)):
        joined = record.join(*pair)["parts"]["smoke-cupy"]
        assert {r["op"]: r["status"] for r in joined["result"]["rows"]} == {
            "gather": "right", "sgd": "right",
        }  # fmt: skip
        assert joined["status"] == "ok"


def test_merging_again_changes_nothing(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "ab"]
    for folder, op in zip(folders, ("gather", "sgd"), strict=True):
        folder.mkdir()
        record.save(made_record([row(op)], folder.name), folder)
        (folder / "gpu.log").write_text(f"log {op}\n")
    out = gpu.merge(folders, tmp_path / "out")
    first = {path.name: path.read_text() for path in out.iterdir()}
    gpu.merge([*folders, folders[0]], out)
    gpu.merge([*reversed(folders), out], out)
    for path in out.iterdir():
        assert path.read_text() == first[path.name], path.name


@pytest.mark.parametrize("text", ["", '{"parts": {}}', '{"parts": {"probe": {"sta', "\xff"])
def test_a_broken_record_is_named(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gpu.json").write_text(text, encoding="latin-1")
    for arguments in (["--merge", str(tmp_path)], ["--emulate", "--out", str(tmp_path)]):
        assert gpu.main(arguments) == 2
        assert f"{tmp_path / 'gpu.json'}: expected a record of" in capsys.readouterr().err
    assert (tmp_path / "gpu.json").read_text(encoding="latin-1") == text


def test_merge_without_a_record_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--merge", str(tmp_path)]) == 2
    assert "no gpu.json there" in capsys.readouterr().err
    (tmp_path / "gpu.json").write_text("[]")
    assert gpu.main(["--merge", str(tmp_path)]) == 2
    assert "expected a record of `python -m benchmarks.gpu`" in capsys.readouterr().err


def test_a_run_joins_what_lies_in_its_folder(tmp_path: Path) -> None:
    first = run("--emulate", "--only", "probe", "--out", str(tmp_path), FASTRNN_COMMIT="f00d")
    second = run("--emulate", "--only", "device-cupy", "--out", str(tmp_path))
    assert first.returncode == 0, first.stderr
    assert second.returncode == 0, second.stderr
    assert set(stored(tmp_path)["parts"]) == {"probe", "device-cupy"}
    log = (tmp_path / "gpu.log").read_text()
    assert "===== probe" in log
    assert "===== device-cupy" in log


def test_the_commit_is_named_where_there_is_no_git(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTRNN_COMMIT", "f00d")
    assert provenance.commit() == {"id": "f00d"}, "a copy may lie in another repository"
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path / "fastrnn")
    assert provenance.commit() == {"id": "f00d"}
    monkeypatch.delenv("FASTRNN_COMMIT")
    assert provenance.commit() == {}


def test_a_sanitizers_findings_belong_to_the_case_that_ran() -> None:
    log = (
        f"{MARK}smoke cupy gather odd\n========= COMPUTE-SANITIZER\n"
        f"{MARK}smoke cupy sgd odd\n========= Invalid __global__ write of size 4 bytes\n"
        "=========     at sgd_kernel+0x1\n========= Invalid __global__ read of size 4 bytes\n"
        "========= ERROR SUMMARY: 2 errors\n"
    )
    found = findings(log, MARK)
    assert found == {"smoke cupy sgd odd": "Invalid __global__ write of size 4 bytes"}
    rows = [row("gather"), row("sgd")]
    gpu._blame(rows, dict(found))
    assert [r["status"] for r in rows] == ["right", "wrong"]
    assert "Invalid __global__ write" in rows[1]["reason"]


def test_a_sanitizers_findings_are_kept_when_the_run_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ended(CaseRun):
        def run(self) -> list[dict[str, Any]]:
            self.on_row(row("sgd"))
            self.log.write(f"{MARK}smoke cupy sgd odd\n========= Invalid write\n".encode())
            raise SystemExit(143)

    monkeypatch.setattr(gpu, "CaseRun", Ended)
    made = gpu.Run(tmp_path)
    part = replace(BY_NAME["memcheck-cupy"], absent=lambda stand_in: None, prefix=lambda: ["true"])
    with pytest.raises(SystemExit):
        made.part(part, [], time.monotonic() + 60)
    [kept] = made.found["parts"]["memcheck-cupy"]["result"]["rows"]
    assert kept["status"] == "wrong"
    assert kept["reason"] == "Invalid write"


# --- The report ----------------------------------------------------------------------------------


def timed(kind: str, op: str, seconds: float, **more: Any) -> dict[str, Any]:
    found = row(op, size="headline", seconds=seconds, flop=1.0, bytes=1.0, **more)
    return {**found, "kind": kind}


def peers_part(name: str, workload: str, times: dict[str, float | None]) -> dict[str, Any]:
    result = BenchResult(
        machine=MACHINE, commit={}, date="", dims={"headline": {"T": 1, "B": 1, "H": 1, "V": 1}},
        rows=[
            BenchRow(
                workload, "headline", peer, peer, peer == "cupy", "cuda", seconds=value,
                mode="graph" if "graph" in peer else "eager",
                status="ok" if value else "missing", reason="" if value else "not installed",
            )
            for peer, value in times.items()
        ],
    )  # fmt: skip
    return {name: {"status": "ok", "result": {"bench": json.loads(result.to_json())}}}


def test_goals_are_judged_by_what_was_measured() -> None:
    rows = [
        timed("ops", "recurrence", 11e-6, errors={"h": [3e-7, 1e-7]}),
        timed("ops", "node: BPTT", 15e-6, errors={"dz": [1e-7, 1e-7]}),
        timed("step", cases.STEP, 60e-6),
    ]
    found = made_record(rows, "1")
    found["parts"]["ops-cupy"] = found["parts"].pop("smoke-cupy")
    lines = {line.split("|")[1].strip(): line for line in report.goals(found)}
    assert "11 µs" in lines["recurrence forward"]
    assert "met" in lines["recurrence forward"]
    assert "missed" in lines["BPTT"]
    assert "60 µs" in lines["captured training step"]
    assert "3 ×" in lines["largest error by plain float32's"]
    assert "missed" in lines["largest error by plain float32's"]
    assert "not measured" in lines["20,000 training steps"]
    assert "not measured" in lines["recurrence, cuDNN by ours, graphs"]

    # Graph against graph: ours of the ops, cuDNN's of the peers.
    names = {"cudnn": 200e-6, "cudnn-graph": 55e-6, "cupy": 50e-6}
    found["parts"] |= peers_part("peers-recurrence", "recurrence", dict(names))
    found["parts"] |= peers_part("peers-step", "step", {"cudnn": 1.0, "cudnn-graph": 240e-6})
    lines = {line.split("|")[1].strip(): line for line in report.goals(found)}
    assert "5 ×" in lines["recurrence, cuDNN by ours, graphs"]
    assert "4 ×" in lines["captured step, best peer's graph by ours"]
    text = report.markdown(found)
    assert "| recurrence" in text
    assert "13.5 µs" in text, "the prediction stands beside it"


def test_a_peer_that_cannot_be_had_is_absent_and_only_our_own_failure_fails() -> None:
    def verdict(times: dict[str, float | None], **statuses: str) -> tuple[str, str]:
        result = peers_part("peers-step", "step", times)["peers-step"]["result"]
        for row in result["bench"]["rows"]:
            if row["name"] in statuses:
                row |= {"status": statuses[row["name"]], "reason": "why", "seconds": None}
        return report.verdict(result)

    absent = "no peer could be had: flashrnn: not installed"
    assert verdict({"flashrnn": None, "cupy": 1.0}) == ("absent", absent)
    assert verdict({"flashrnn": None, "cudnn": 1.0, "cupy": 1.0}) == ("ok", "")
    peer_wrong = verdict({"cudnn": 1.0, "cupy": 1.0}, cudnn="wrong")
    assert peer_wrong == ("ok", "cudnn: wrong: why")
    assert verdict({"cudnn": 1.0, "cupy": 1.0}, cupy="failed") == ("failed", "cupy: failed: why")
    assert report.verdict({"packages": {}}) == ("ok", "")
    plans = {"plans": {"rows": [{"section": "gap"}, {"section": "product", "failed": "no"}]}}
    assert report.verdict(plans) == ("failed", "1 rows, product: no")


def test_peers_are_known_contenders_started_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, list[Contender], dict[str, Any]]] = []

    def run_bench(workloads: Any, sizes: Any, *, peers: Any, backends: Any, **rest: Any) -> Any:
        calls.append((workloads[0], choose_contenders(peers, backends), rest))
        return BenchResult(machine=MACHINE, commit={}, date="", dims={}, rows=[])

    monkeypatch.setattr(tasks, "run_bench", run_bench)
    saved: list[dict[str, Any]] = []
    task = tasks.Task(saved.append, lambda name: None, "cupy", toy=False)  # type: ignore[arg-type, return-value]
    wanted = [part.task for part in PARTS if part.task and "peers" in part.task]
    for name in filter(None, wanted):
        assert "bench" in tasks.TASKS[name](task)
    assert {workload for workload, *_ in calls} >= {"step", "recurrence", "generate"}
    for workload, contenders, rest in calls:
        assert rest["parallel"] > 1 or os.cpu_count() == 1
        assert rest["limit"] <= 60
        assert all(workload in one.workloads for one in contenders if not one.ours), workload
    assert saved, "slow ones are saved one by one"


def test_a_table_that_cannot_be_drawn_loses_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = gpu.Run(tmp_path)
    made.found["parts"]["probe"] = {"status": "ok", "result": {"packages": {}}}
    monkeypatch.setattr(report, "_table", lambda *arguments: 1 / 0)
    made.save()
    assert stored(tmp_path)["parts"]["probe"]["status"] == "ok"
    assert "ZeroDivisionError" in (tmp_path / "gpu.md").read_text()


def test_what_is_printed_at_the_end_is_short() -> None:
    long = "backend 'cupy' needs this\n" * 40
    rows = [row(f"op{i}", "crashed") | {"reason": long} for i in range(50)]
    found = made_record(rows, "1")
    found["parts"]["smoke-cupy"]["reason"] = long
    lines = report.short(found, ["smoke-cupy"])
    assert max(map(len, lines)) <= 220
    assert sum(map(len, lines)) < 10_000
    assert "- and 30 more" in lines
    assert not any("\n" in line for line in lines)
    text = report.markdown(found)
    assert text.count(" ".join(long.split())) == 51, "the report has all, a line each"


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon"])
def test_a_limit_that_is_none_is_refused(
    value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option in ("--minutes", "--row-limit"):
        with pytest.raises(SystemExit):
            gpu.main(["--emulate", "--only", "probe", option, value, "--out", str(tmp_path / "o")])
        assert option in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_the_table_of_verdicts_names_what_is_not_right() -> None:
    rows = [row("gather", errors={"z": [1e-8, None]}), row("gather", "wrong", "H100"), row("sgd")]
    text = "\n".join(report._row_tables(rows, None))
    assert "| gather" in text
    assert "1.0e-08" in text
    assert "- cupy: gather, H100: wrong: why" in text
    rows = [row("gather", "skipped", size) for size in "abc"] + [row("sgd", "crashed")]
    lines = report._row_tables(rows, None)
    assert lines[-3:] == ["", "- cupy: sgd, odd: crashed: why", "- 3 skipped: why"]


def test_every_part_has_a_name_of_its_own_and_a_way_to_run() -> None:
    assert len({part.name for part in PARTS}) == len(PARTS)
    for part in PARTS:
        ways = [bool(part.cases), bool(part.task), bool(part.tests), bool(part.profiler)]
        assert sum(ways) == 1, part.name
    assert replace(BY_NAME["smoke-cupy"], name="x-cupy").short == "x"


@needs_cupy
def test_under_a_sanitizer_cupy_keeps_no_memory() -> None:
    """In the pool's blocks, which are larger than what was asked for, small overruns are legal."""
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    assert cupy.cuda.get_allocator() == cupy.get_default_memory_pool().malloc
    try:
        keep_no_memory()
        assert cupy.cuda.get_allocator() != cupy.get_default_memory_pool().malloc
    finally:
        cupy.cuda.set_allocator(cupy.get_default_memory_pool().malloc)
        cupy.cuda.set_pinned_memory_allocator(cupy.get_default_pinned_memory_pool().malloc)
    assert all(part.pool is (part.prefix is None) for part in PARTS)


def test_readmes_figures_are_those_of_the_committed_record(tmp_path: Path) -> None:
    """None is typed by hand: the table is drawn anew from each record and must not change."""
    text = (supervisor.ROOT / "README.md").read_text(encoding="utf-8")
    (place,) = re.findall(r"\[All of it\]\((benchmarks/results/[^)]+)/gpu\.md\)", text)
    found = stored(supervisor.ROOT / place)
    assert not found["emulated"]
    block = report.readme_block(found, place)
    assert block in text
    copy = tmp_path / "README.md"
    copy.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n", encoding="utf-8")
    gpu.write_readme(copy, supervisor.ROOT / place)
    assert copy.read_text(encoding="utf-8").startswith(f"before\n{report.BEGIN}\n| at V=1027")
    assert copy.read_text(encoding="utf-8").endswith(f"{report.END}\nafter\n")
    copy.write_text("no place", encoding="utf-8")
    with pytest.raises(ValueError, match="expected <!-- gpu:begin -->"):
        gpu.write_readme(copy, supervisor.ROOT / place)
