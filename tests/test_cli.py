"""The command line as a user meets it: runs, resumption, signals, pipes, and no traceback ever."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import fastrnn
from fastrnn.checkpoint import load_checkpoint, save_checkpoint
from fastrnn.cli import app

SIZES = ["--hidden-size", "8", "--batch-size", "4", "--num-steps", "9"]
SMALL = [*SIZES, "--backend", "numpy"]
TEXT = "the wind took your hat and the sea gave it back, wet and happy. " * 12


@pytest.fixture(autouse=True)
def in_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)


def run(*arguments: str | Path) -> Any:
    """Run a command in this process; no exception may come out of it."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result


def train(*arguments: str | Path) -> Any:
    return run("train", "text.txt", *SMALL, *arguments)


def spawn(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    """Run a command as a process of its own."""
    root = str(Path(fastrnn.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, "PYTHONUNBUFFERED": "1"}
    environment |= options.pop("env", {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(
        [sys.executable, "-m", "fastrnn", *map(str, arguments)], text=True, env=environment, **pipes
    )


# --- train ---


def test_train_reports_saves_and_draws() -> None:
    result = train("--epochs", "4", "--pred-period", "2", "--plot", "c.png", "--json", "m.jsonl")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith("text.txt: 768 characters, ")
    assert sum(line.startswith("epoch ") for line in lines) == 2
    assert any(line.startswith(" - the w") for line in lines), "continues the text's own start"
    (saved,) = (line for line in lines if line.startswith("saved to fastrnn.safetensors; try: "))
    hint = shlex.split(saved.partition("try: fastrnn ")[2])
    continued = run(*hint)
    assert continued.exit_code == 0, continued.output
    assert continued.output.startswith(hint[-1])
    assert Path("c.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in Path("m.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["perplexity"] < rows[0]["perplexity"]
    assert fastrnn.load("fastrnn.safetensors", "numpy").hidden_size == 8


def test_text_like_markup_is_shown_as_it_is() -> None:
    Path("[b].txt").write_text("[/b] [bold]x[red] :smile: 'q' \n" * 100)
    result = run("train", "[b].txt", "--epochs", "1", "--hidden-size", "4", "--out", "[i].st")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("[b].txt: ")
    assert "\n - [/b] " in result.output
    assert "saved to [i].st; try: fastrnn generate '[i].st' --prefix '[/b] '" in result.output


def test_bundled_lyrics_without_arguments() -> None:
    result = run("train", "--epochs", "1", "--hidden-size", "4", "--pred-len", "3")
    assert result.exit_code == 0, result.output
    assert "bundled lyrics: 10,000 characters, 1,027 distinct" in result.output
    assert " - 不分开" in result.output


def test_json_on_standard_output_is_only_json() -> None:
    process = spawn("train", "text.txt", *SMALL, "--epochs", "3", "--json", "-")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert [json.loads(line)["epoch"] for line in out.splitlines()] == [1, 2, 3]
    assert "saved to" in err


def test_resume_is_exact_through_the_command_line() -> None:
    constant = ["--lr-schedule", "constant", "--sampling", "random", "--save-period", "0"]
    assert train("--epochs", "6", "--out", "whole", *constant).exit_code == 0
    assert train("--epochs", "3", "--out", "half", *constant).exit_code == 0
    result = run("train", "--resume", "half", "--epochs", "6", "--backend", "numpy")
    assert result.exit_code == 0, result.output
    (whole, _), (half, header) = load_checkpoint("whole"), load_checkpoint("half")
    assert len(header["trainer"]["history"]) == 6
    for name, array in whole.items():
        np.testing.assert_array_equal(array, half[name], err_msg=name)


def test_resume_needs_something_to_do_and_refuses_contradictions() -> None:
    assert train("--epochs", "2").exit_code == 0
    done = run("train", "--resume", "fastrnn.safetensors", "--backend", "numpy")
    assert done.exit_code == 2
    assert "has already done 2 of 2 epochs" in done.output
    more = ["train", "--resume", "fastrnn.safetensors", "--epochs", "4"]
    clash = run(*more, "--hidden-size", "9")
    assert clash.exit_code == 2
    want = "--hidden-size 9 cannot be given with --resume: fastrnn.safetensors has 8"
    assert want in clash.output
    assert run(*more, "--hidden-size", "8", "--sampling", "consecutive").exit_code == 0


def test_one_config_file_starts_a_run_and_goes_on_with_it() -> None:
    Path("run.toml").write_text(
        '\ufeffepochs = 2\nhidden-size = 8\nbatch_size = 4\nnum_steps = 9\nbackend = "numpy"\n'
        'prefix = "the w"\n'
    )
    assert run("train", "text.txt", "--config", "run.toml").exit_code == 0
    again = ["--config", "run.toml", "--resume", "fastrnn.safetensors", "--epochs", "4"]
    result = run("train", *again)
    assert result.exit_code == 0, result.output
    assert "\n - the w" in result.output
    assert len(load_checkpoint("fastrnn.safetensors")[1]["trainer"]["history"]) == 4


def test_resume_takes_another_rate_and_a_shorter_run() -> None:
    assert train("--epochs", "20").exit_code == 0
    shorter = run("train", "--resume", "fastrnn.safetensors", "--epochs", "10")
    assert "has already done 20 of 10 epochs" in shorter.output
    longer = ["--epochs", "24", "--lr", "7", "--lr-schedule", "constant", "--out", "b"]
    assert run("train", "--resume", "fastrnn.safetensors", *longer).exit_code == 0
    _, header = load_checkpoint("b")
    assert header["trainer"]["lr_schedule"]["lr"] == 7
    assert header["trainer"]["history"][-1][6] == 7
    save_checkpoint("c", *stopped_early(epochs=100))
    result = run("train", "--resume", "c", "--epochs", "40", "--out", "d")
    assert result.exit_code == 0, result.output


def stopped_early(epochs: int) -> tuple[Any, Any]:
    """The run of above as if it had been planned for more epochs."""
    tensors, header = load_checkpoint("fastrnn.safetensors")
    del header["format"]
    header["trainer"]["lr_schedule"] |= {"epochs": epochs, "hold": epochs * 3 // 5}
    header["trainer"]["notes"]["epochs"] = epochs
    return tensors, header


@pytest.mark.parametrize("change", [{"cursor": 99_999}, {"notes": None}, {"lr_schedule": {}}])
def test_a_damaged_header_is_named(change: dict[str, Any]) -> None:
    assert train("--epochs", "2").exit_code == 0
    tensors, header = load_checkpoint("fastrnn.safetensors")
    header["trainer"] |= change
    save_checkpoint("damaged", tensors, header)
    result = run("train", "--resume", "damaged", "--epochs", "4")
    assert result.exit_code == 1
    assert "does not hold a complete trainer" in result.output


def test_the_file_of_another_run_is_kept() -> None:
    assert train("--epochs", "3").exit_code == 0
    result = train("--epochs", "2")
    assert "is now fastrnn.safetensors.bak" in result.output
    assert len(load_checkpoint("fastrnn.safetensors.bak")[1]["trainer"]["history"]) == 3
    assert len(load_checkpoint("fastrnn.safetensors")[1]["trainer"]["history"]) == 2


def test_no_kept_file_is_lost_to_the_next_run() -> None:
    for epochs in "432":
        assert train("--epochs", epochs).exit_code == 0
    names = [f"fastrnn.safetensors{end}" for end in (".bak", ".bak2", "")]
    done = [len(load_checkpoint(name)[1]["trainer"]["history"]) for name in names]
    assert done == [4, 3, 2]


def test_a_resumed_run_keeps_a_file_that_it_does_not_come_from() -> None:
    assert train("--epochs", "2").exit_code == 0
    Path("notes").write_text("precious")
    more = ["--resume", "fastrnn.safetensors", "--epochs", "3", "--out", "notes"]
    result = run("train", *more)
    assert "the notes that was there is now notes.bak" in result.output
    assert Path("notes.bak").read_text() == "precious"
    assert run("train", "--resume", "notes", "--epochs", "4").exit_code == 0
    assert not Path("notes.bak2").exists()


def test_a_save_that_fails_leaves_the_files_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    assert train("--epochs", "2").exit_code == 0
    before = {p: p.read_bytes() for p in Path.cwd().iterdir()}

    def full(self: Any, path: Path, notes: Any = None) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(fastrnn.Trainer, "save", full)
    result = train("--epochs", "3")
    assert result.exit_code == 1
    assert "No space left on device: fastrnn.safetensors" in result.output
    assert "is now" not in result.output
    assert {p: p.read_bytes() for p in Path.cwd().iterdir()} == before


def test_memory_that_runs_out_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> Any:
        raise fastrnn.DeviceMemoryError(3 << 30)

    monkeypatch.setattr(fastrnn.Trainer, "advance", full)
    result = train("--epochs", "1")
    assert result.exit_code == 1
    line = "fastrnn: error: out of memory on the device: 3.0 GiB more is needed\n"
    assert result.output.endswith(line), result.output


def test_files_are_kept_without_hard_links_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(source: Any, name: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    test_no_kept_file_is_lost_to_the_next_run()


def test_a_file_that_is_protected_is_refused_before_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("out").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may write anywhere
    result = train("--out", "out")
    assert result.exit_code == 1
    assert "cannot write out: it is read-only" in result.output


def test_what_was_stopped_goes_on_with_the_options_it_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    advance = fastrnn.Trainer.advance

    def and_stop(self: fastrnn.Trainer) -> Any:
        stats = advance(self)
        if self.epoch in stops:
            signal.raise_signal(signal.SIGINT)
        return stats

    monkeypatch.setattr(fastrnn.Trainer, "advance", and_stop)
    stops = {1}
    options = ["--backend", "numpy", "--prefix", "the w", "--pred-len", "3", "--json", "m"]
    result = run("train", "text.txt", *SIZES, "--epochs", "3", *options)
    (hint,) = (line for line in result.output.splitlines() if line.startswith("stopped in epoch"))
    words = shlex.split(hint.partition("go on with: fastrnn ")[2])
    assert words[:3] == ["train", "--resume", "fastrnn.safetensors"]
    assert sorted(words[3:]) == sorted(options)
    stops = {3}  # as it ends: there is nothing to go on with
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert "saved to fastrnn.safetensors; try:" in result.output
    assert "go on with" not in result.output
    assert len(Path("m").read_text().splitlines()) == 3


def test_what_cannot_be_printed_or_written_keeps_what_was_learnt() -> None:
    Path("song.txt").write_text("分开我们不分开 " * 90)
    arguments = ["train", "song.txt", *SMALL, "--epochs", "3", "--pred-period", "1"]
    process = spawn(*arguments, env={"PYTHONIOENCODING": "ascii"})
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "\\u5206" in output
    result = train("--epochs", "5", "--json", "/dev/full", "--out", "full.st")
    assert result.exit_code == 1
    assert "what was learnt is in full.st" in result.output
    assert len(load_checkpoint("full.st")[1]["trainer"]["history"]) == 1


def test_names_and_endings_are_checked_before_the_work() -> None:
    assert "expected a name that ends in one of" in train("--plot", "curve.foo").output
    assert "temperature must be" in train("--temperature", "inf").output
    strange = os.fsdecode(b"we\xffird.txt")
    Path(strange).write_text(TEXT)
    process = spawn("train", strange, *SMALL, "--epochs", "1")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert load_checkpoint("fastrnn.safetensors")[1]["trainer"]["notes"]["corpus"].endswith(strange)


def test_config_file_is_below_the_flags() -> None:
    Path("run.toml").write_text('epochs = 3\nlr-schedule = "constant"\njson = "m.jsonl"\n')
    assert train("--config", "run.toml", "--epochs", "2").exit_code == 0
    assert len(Path("m.jsonl").read_text().splitlines()) == 2
    _, header = load_checkpoint("fastrnn.safetensors")
    assert header["trainer"]["lr_schedule"]["kind"] == "constant"


def test_divergence_keeps_the_best_weights() -> None:
    result = train("--epochs", "3", "--out", "good", "--lr-schedule", "constant")
    assert result.exit_code == 0
    tensors, header = load_checkpoint("good")
    tensors["W_hq"] = tensors["W_hq"].copy()
    tensors["W_hq"][0, 0] = np.nan
    save_checkpoint("bad", tensors, header)
    result = run("train", "--resume", "bad", "--epochs", "6", "--backend", "numpy")
    assert result.exit_code == 1
    assert "the best weights are in bad" in result.output
    for name, array in fastrnn.load("bad", "numpy").params.items():
        np.testing.assert_array_equal(array, tensors[f"best.{name}"])


def test_a_run_that_learns_nothing_leaves_the_file_of_another() -> None:
    assert train("--epochs", "2").exit_code == 0
    before = Path("fastrnn.safetensors").read_bytes()
    result = train("--epochs", "2", "--lr", "1e300")
    assert result.exit_code == 1
    assert "weights from before training" in result.output
    assert "the best weights are in" not in result.output
    assert Path("fastrnn.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "none.txt"], 1, "no such corpus: none.txt"),
        (["train", "."], 1, "is a directory"),
        (["train", "empty.txt"], 1, "is empty"),
        (["train", "one.txt"], 1, "the text is too short"),
        (["train", "gbk.txt"], 1, "is not UTF-8: byte 0xb7 at offset 0"),
        (["train", "text.txt", "--batch-size", "700"], 1, "the text is too short"),
        (["train", "text.txt", "--val-fraction", "0.95"], 1, "with val_fraction=0.95 of it held"),
        (["train", "text.txt", *SMALL, "--prefix", "海"], 1, "'海' (U+6D77)"),
        (["train", "text.txt", "--out", "no/where"], 1, "there is no directory no"),
        (["train", "text.txt", "--json", "no/where"], 1, "there is no directory no"),
        (["train", "--resume", "text.txt"], 1, "not a readable checkpoint"),
        (["train", "text.txt", "--resume", "text.txt"], 2, "--out and the text are the same file"),
        (["train", "text.txt", "--out", "./text.txt"], 2, "--out and the text are the same file"),
        (["train", "text.txt", "--json", "a", "--out", "a"], 2, "--out and --json are the same"),
        (["train", "text.txt", "--plot", "a.svg", "--out", "a.svg"], 2, "--out and --plot are the"),
        (["train", "text.txt", "--plot", "a.pgf"], 2, "ends in one of"),
        (["train", "text.txt", "--config", "text.txt", "--json", "text.txt"], 2, "is not TOML"),
        (["train", "half.zip"], 1, "half.zip is no text: it looks like a damaged zip"),
        (["train", "text.gz"], 1, "text.gz is no text: it looks like a gzip file; unpack it first"),
        (["train", "text.txt", "--lr", "-1"], 2, "lr must be finite and > 0, got -1.0"),
        (["train", "text.txt", "--epochs", "0"], 2, "--epochs"),
        (["train", "text.txt", "--sampling", "shuffled"], 2, "--sampling"),
        (["train", "text.txt", "--config", "typo.toml"], 2, "unknown batch_siz"),
        (["train", "text.txt", "--config", "bad.toml"], 2, "is not TOML"),
        (["train", "text.txt", "--config", "word.toml"], 2, "word.toml: hidden_size: "),
        (["train", "text.txt", "--config", "zero.toml"], 2, "zero.toml: epochs: "),
        (["train", "text.txt", "--config", "yes.toml"], 2, "yes.toml: epochs: expected a value"),
        (["train", "text.txt", "--config", "twice.toml"], 2, "batch-size is there twice"),
        (["generate", "none", "--prefix", "a"], 1, "no such checkpoint: none"),
        (["generate", "text.txt", "--prefix", "a"], 1, "not a readable checkpoint"),
        (["generate"], 2, ""),
        (["nonsense"], 2, "nonsense"),
    ],
)
def test_bad_input(arguments: list[str], code: int, message: str) -> None:
    Path("empty.txt").touch()
    Path("one.txt").write_text("x")
    Path("gbk.txt").write_bytes(b"\xb7\xd6\xbf\xaa")
    Path("typo.toml").write_text("batch-siz = 4\n")
    Path("bad.toml").write_text("epochs = \n")
    Path("word.toml").write_text('hidden_size = "many"\n')
    Path("zero.toml").write_text("epochs = 0\n")
    Path("yes.toml").write_text("epochs = true\n")
    Path("twice.toml").write_text("batch-size = 4\nbatch_size = 5\n")
    Path("half.zip").write_bytes(b"PK\x03\x04\x14\x00\x08\xa5")
    Path("text.gz").write_bytes(b"\x1f\x8b\x08\x00")
    before = set(Path.cwd().iterdir())
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert message in " ".join(result.output.replace("│", " ").split())
    assert set(Path.cwd().iterdir()) == before, "nothing may be left behind"


def test_the_smallest_and_the_strangest_texts_train() -> None:
    Path("cats.txt").write_text("🐈🐕" * 30)
    tiny = ["--hidden-size", "1", "--batch-size", "1", "--num-steps", "1", "--backend", "numpy"]
    assert run("train", "cats.txt", "--epochs", "2", *tiny).exit_code == 0
    result = run("generate", "fastrnn.safetensors", "--prefix", "🐈", "--length", "4")
    assert result.exit_code == 0
    assert len(result.output.strip()) == 5


def on_terminal(*arguments: str) -> str:
    """What a command that succeeds writes to a terminal."""
    terminal, end = os.openpty()
    process = spawn(*arguments, stdout=end)
    os.close(end)
    written = b""
    with contextlib.suppress(OSError):  # Linux: the other end is closed
        while piece := os.read(terminal, 4096):
            written += piece
    os.close(terminal)
    assert process.wait(60) == 0
    return written.decode()


def test_a_terminal_does_not_obey_what_a_text_has() -> None:
    Path("escapes.txt").write_text("\x1b[2J" * 40)
    tiny = ["--hidden-size", "8", "--batch-size", "2", "--num-steps", "4", "--backend", "numpy"]
    assert run("train", "escapes.txt", "--epochs", "2", *tiny).exit_code == 0
    generate = ["generate", "fastrnn.safetensors", "--prefix", "\x1b[2", "--length", "5"]
    assert "\x1b[2" in run(*generate).output, "what is read by a program is as it is"
    shown = on_terminal(*generate)
    assert shown.startswith("\\x1b[2")
    assert "\x1b" not in shown
    shown = on_terminal("train", "escapes.txt", "--epochs", "2", *tiny, "--prefix", "\x1b[2J")
    assert " - \\x1b[2J" in shown
    assert "\x1b[2J" not in shown


# --- signals, pipes, disks ---


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_leaves(signum: int) -> None:
    arguments = ["text.txt", *SMALL, "--epochs", "1000000", "--json", "m.jsonl"]

    def listen() -> None:  # nohup, under which tests may run, has SIGHUP ignored
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    process = spawn("train", *arguments, preexec_fn=listen)
    deadline = time.monotonic() + 60
    while not (Path("m.jsonl").exists() and Path("m.jsonl").stat().st_size):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "go on with: fastrnn train --resume fastrnn.safetensors" in out
    _, header = load_checkpoint("fastrnn.safetensors")
    assert len(header["trainer"]["history"]) >= 1
    assert not list(Path.cwd().glob("*.tmp"))


def test_a_reader_that_leaves_is_no_error() -> None:
    assert train("--epochs", "1").exit_code == 0
    process = spawn(
        "generate", "fastrnn.safetensors", "--prefix", "the", "--length", "200000",
        "--backend", "numpy",
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.read(10).startswith("the")
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr is not None
    assert process.stderr.read() == ""


def test_a_full_disk_loses_nothing() -> None:
    """A limit on file sizes stands for the full disk: writing fails in the middle of the file."""
    assert train("--epochs", "1").exit_code == 0
    before = Path("fastrnn.safetensors").read_bytes()
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "from fastrnn.cli import main\n"
        "sys.argv = ['fastrnn', 'train', '--resume', 'fastrnn.safetensors', '--epochs', '2']\n"
        "main()\n"
    )
    root = str(Path(fastrnn.__file__).parent.parent)
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": root, "FASTRNN_BACKEND": "numpy"},
    )
    assert result.returncode == 1
    path = Path("fastrnn.safetensors").resolve()
    assert f"fastrnn: error: File too large: {path}" in result.stderr
    assert "Traceback" not in result.stderr
    assert Path("fastrnn.safetensors").read_bytes() == before
    assert not list(Path.cwd().glob(".*.tmp"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"], ["info"]])
def test_words_that_cannot_be_written_are_an_error(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        process = spawn(*arguments, stdout=full)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors == "fastrnn: error: No space left on device\n"


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell closes the output")
def test_generate_without_a_standard_output() -> None:
    assert train("--epochs", "1").exit_code == 0
    command = shlex.join([sys.executable, "-m", "fastrnn", "generate", "fastrnn.safetensors"])
    root = str(Path(fastrnn.__file__).parent.parent)
    result = subprocess.run(
        f"{command} --prefix the --backend numpy >&-",
        shell=True,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_an_interrupted_start_is_quiet() -> None:
    code = (
        "import sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'typer':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from fastrnn.__main__ import main\n"
        "main()\n"
    )
    root = str(Path(fastrnn.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert (result.returncode, result.stderr) == (1, "fastrnn: interrupted\n")


# --- generate, info, help ---


def test_generate_streams_what_the_model_generates() -> None:
    assert train("--epochs", "3").exit_code == 0
    model = fastrnn.load("fastrnn.safetensors", "numpy")
    one = run("generate", "fastrnn.safetensors", "--prefix", "the ", "--length", "20")
    assert one.output == model.generate("the ", 20) + "\n"
    how = ["--temperature", "0.9", "--top-k", "5", "--seed", "3"]
    two = run("generate", "fastrnn.safetensors", "--prefix", "sea", "--prefix", "hat", *how)
    want = model.generate(["sea", "hat"], 50, temperature=0.9, top_k=5, seed=3)
    assert two.output.splitlines() == want
    best = run("generate", "fastrnn.safetensors", "--prefix", "the", "--best")
    assert best.output == fastrnn.load("fastrnn.safetensors", best=True).generate("the", 50) + "\n"
    unknown = run("generate", "fastrnn.safetensors", "--prefix", "THE")
    assert unknown.exit_code == 1
    assert "'T' (U+0054)" in unknown.output


def test_info() -> None:
    plain = run("info")
    assert plain.exit_code == 0
    assert "auto chooses" in plain.output
    facts = json.loads(run("info", "--json").output)
    assert facts["backends"]["numpy"] is None
    assert facts["fastrnn"] == fastrnn.__version__


def test_a_wrong_choice_of_backend_is_no_other_ones_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    assert train("--epochs", "2").exit_code == 0
    monkeypatch.setenv("FASTRNN_BACKEND", "foo")
    result = run("info")
    assert result.exit_code == 0
    assert "numpy       works" in result.output
    assert "auto cannot choose: " in result.output
    assert "unknown backend 'foo'" in result.output
    assert json.loads(run("info", "--json").output)["auto"] is None
    result = run("generate", "fastrnn.safetensors", "--prefix", "the")
    assert result.exit_code == 2
    assert result.output.startswith("fastrnn: error: unknown backend 'foo'")


def test_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = ["--backend", "numpy", "--peers", "none", "--rounds", "1", "--size", "tiny"]
    result = run("bench", *quick, "--json", "b.json", "--plot", "b.png")
    assert result.exit_code == 0, result.output
    assert "fastrnn numpy" in result.output
    monkeypatch.setenv("FASTRNN_BACKEND", "numpy")
    quick[1] = "auto"
    assert run("bench", *quick).output.count("fastrnn numpy") == 2
    rows = json.loads(Path("b.json").read_text())["rows"]
    assert all(row["seconds"] > 0 for row in rows)
    assert Path("b.png").read_bytes().startswith(b"\x89PNG")
    wrong = run("bench", *quick, "--workload", "sorting")
    assert wrong.exit_code == 2
    assert "unknown workload 'sorting'" in wrong.output


def test_bench_of_a_backend_that_cannot_run() -> None:
    """A pattern that matches no device stands for a machine without one."""
    process = spawn(
        *("bench", "--backend", "cupy", "--peers", "none", "--rounds", "1", "--size", "tiny"),
        env={"CUDA_VISIBLE_DEVICES": "-1"},
    )
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "fastrnn: error: backend 'cupy' needs" in errors
    assert "missing: backend 'cupy' needs" in output
    assert "median" not in output


def test_a_text_from_a_pipe() -> None:
    process = spawn("train", "/dev/stdin", *SMALL, "--epochs", "1", stdin=subprocess.PIPE)
    output, errors = process.communicate(TEXT, timeout=120)
    assert process.returncode == 0, errors
    assert f"/dev/stdin: {len(TEXT)} characters" in output


@pytest.mark.parametrize("command", [[], ["train"], ["generate"], ["bench"], ["info"]])
def test_help_has_examples(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert not command or f"fastrnn {command[0]} " in result.output
    assert run("--version").output.strip() == f"fastrnn {fastrnn.__version__}"
