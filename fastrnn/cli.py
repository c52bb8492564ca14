"""The command line: ``fastrnn train | generate | bench | info``.

Exit codes: 0 done (also when stopped by Ctrl-C), 1 failed, with one line that says why, 2 wrong
usage.
"""

from __future__ import annotations

import functools
import io
import json
import os
import platform
import sys
import tomllib
from collections.abc import Callable, Iterator
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

import fastrnn
from fastrnn.backend import BackendUnavailableError, DeviceMemoryError
from fastrnn.checkpoint import CheckpointError, load_checkpoint
from fastrnn.cli_train import Outputs, Run, UsageError, check_writable, same_file, shown
from fastrnn.corpus import CorpusError
from fastrnn.model import load
from fastrnn.plot import PlotUnavailableError, check_format
from fastrnn.schedules import LRSchedule, default_hold
from fastrnn.trainer import DivergenceError, Trainer

app = typer.Typer(
    help="A kernel-optimised engine for the vanilla tanh RNN: a character-level language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Sampling = StrEnum("Sampling", ["consecutive", "random"])
Schedule = StrEnum("Schedule", ["constant", "linear", "cosine", "step"])
DType = StrEnum("DType", ["float32", "float64"])
OnDivergence = StrEnum("OnDivergence", ["stop", "warn"])


class BackendName(StrEnum):
    """The names that ``fastrnn.open_backend`` knows."""

    auto = "auto"
    cupy = "cupy"
    numba_cuda = "numba-cuda"
    numba = "numba"
    numpy = "numpy"


FAILURES = (
    BackendUnavailableError,
    CheckpointError,
    CorpusError,
    DivergenceError,
    PlotUnavailableError,
    MemoryError,
    OSError,
)

# A checkpoint fixes these; given beside --resume they must not contradict it.
FIXED_BY_CHECKPOINT: dict[str, Callable[[Trainer], Any]] = {
    "batch_size": lambda trainer: trainer.batch_size,
    "num_steps": lambda trainer: trainer.num_steps,
    "hidden_size": lambda trainer: trainer.model.hidden_size,
    "sampling": lambda trainer: trainer.sampling,
    "clip_norm": lambda trainer: trainer.clip_norm,
    "dtype": lambda trainer: trainer.model.dtype.name,
    "seed": lambda trainer: trainer.seed,
    "val_fraction": lambda trainer: trainer.val_fraction,
}

# It does not know these: to go on as before, a run has to be given them again.
NOT_IN_CHECKPOINT = (
    "backend",
    "prefix",
    "pred_period",
    "pred_len",
    "temperature",
    "save_period",
    "on_divergence",
    "json_lines",
    "plot",
)


def _say(error: BaseException) -> None:
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        text = f"{error.strerror}{where}"
    if isinstance(error, MemoryError) and not isinstance(error, DeviceMemoryError):
        text = f"out of memory: {text or 'the arrays do not fit'}"
    print(f"fastrnn: error: {text}", file=sys.stderr)


def _leave_stdout() -> None:
    """What is still to be printed goes nowhere, instead of failing again as Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _friendly(command: Callable[..., None]) -> Callable[..., None]:
    """Turn the errors that a user can cause into one line and an exit code."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except BrokenPipeError:  # the reader has gone: nothing is left to say
            _leave_stdout()
            raise typer.Exit(0) from None
        except FAILURES as error:
            _say(error)
            raise typer.Exit(1) from None
        except (ValueError, TypeError) as error:
            _say(error)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            print("fastrnn: interrupted", file=sys.stderr)
            raise typer.Exit(1) from None

    return wrapped


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make the values of a TOML file the defaults of the command's options."""
    if path is None:
        return None
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{path} is not TOML: {error}") from error
    options = {
        "json" if p.name == "json_lines" else p.name: p
        for p in context.command.params
        if p.name and p.name != "config"
    }
    given = {key.replace("-", "_"): value for key, value in values.items()}
    if len(given) < len(values):
        twice = next(key for key in values if "-" in key and key.replace("-", "_") in values)
        raise typer.BadParameter(f"{path}: {twice} is there twice, with - and with _")
    unknown = sorted(set(given) - set(options))
    if unknown:
        raise typer.BadParameter(
            f"{path}: unknown {', '.join(unknown)}; expected some of {', '.join(sorted(options))}"
        )
    for key, value in given.items():
        if isinstance(value, bool):  # no option of this command is a switch
            raise typer.BadParameter(f"{path}: {key}: expected a value, got {value}")
        if options[key].multiple and isinstance(value, str):
            given[key] = value = [value]
        try:
            options[key].process_value(context, value)
        except typer.BadParameter as error:
            raise typer.BadParameter(f"{path}: {key}: {error.message}") from error
    defaults = {options[key].name: value for key, value in given.items()}
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fastrnn {fastrnn.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
@_friendly
def train(
    context: typer.Context,
    corpus: Annotated[
        Path | None, typer.Argument(help="A UTF-8 .txt or .zip; the bundled lyrics if left out.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs in all.")] = 250,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a batch, B.")] = 32,
    num_steps: Annotated[int, typer.Option(min=1, help="Time steps of a batch, T.")] = 35,
    hidden_size: Annotated[int, typer.Option(min=1, help="Hidden units, H.")] = 256,
    sampling: Annotated[Sampling, typer.Option(help="How batches are cut.")] = Sampling.consecutive,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 100.0,
    clip_norm: Annotated[float, typer.Option(help="Threshold of the global norm.")] = 0.01,
    lr_schedule: Annotated[Schedule, typer.Option(help="How the rate falls.")] = Schedule.linear,
    hold: Annotated[
        int | None, typer.Option(help="Epochs at the full rate; 150 or 60 % of a shorter run.")
    ] = None,
    max_chars: Annotated[
        int, typer.Option(min=0, help="Characters of the text to keep; 0: all.")
    ] = 10_000,
    val_fraction: Annotated[
        float, typer.Option(help="Share at the end of the text kept for validation.")
    ] = 0.0,
    dtype: Annotated[DType, typer.Option(help="Of parameters and activations.")] = DType.float32,
    backend: Annotated[BackendName, typer.Option(help="What computes.")] = BackendName.auto,
    seed: Annotated[int, typer.Option(min=0, help="Of weights and sampling.")] = 0,
    prefix: Annotated[
        list[str] | None, typer.Option(help="What to continue while training; repeatable.")
    ] = None,
    pred_period: Annotated[
        int, typer.Option(min=0, help="Epochs between two reports; 0: only the last.")
    ] = 50,
    pred_len: Annotated[int, typer.Option(min=0, help="Characters of a continuation.")] = 50,
    temperature: Annotated[float, typer.Option(min=0, help="Of the continuations.")] = 0.0,
    out: Annotated[Path, typer.Option(help="The checkpoint.")] = Path("fastrnn.safetensors"),
    save_period: Annotated[
        int, typer.Option(min=0, help="Epochs between two saves; 0: only at the end.")
    ] = 100,
    resume: Annotated[Path | None, typer.Option(help="Go on from this checkpoint.")] = None,
    on_divergence: Annotated[
        OnDivergence, typer.Option(help="What to do when training collapses.")
    ] = OnDivergence.stop,
    json_lines: Annotated[
        str | None,
        typer.Option("--json", help="A JSON object an epoch to this file, - for stdout."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the training curve here.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            callback=_read_config, is_eager=True, help="TOML with these options; flags win."
        ),
    ] = None,
) -> None:
    """Train on a text.

    Ctrl-C saves and leaves; a second one leaves at once.

    [bold]Examples[/bold]

    fastrnn train

    fastrnn train lyrics.txt --epochs 2500 --sampling random --plot curve.png

    fastrnn train --resume fastrnn.safetensors --epochs 500

    fastrnn train novel.zip --max-chars 0 --val-fraction 0.05 --json - | jq .perplexity
    """
    given = {
        p.name
        for p in context.command.params
        if p.name and getattr(context.get_parameter_source(p.name), "name", "") != "DEFAULT"
    }
    if resume is not None and "out" not in given:
        out = resume
    files = {"--out": out, "--plot": plot, "--json": json_lines, "--config": config}
    _check_distinct({**files, "the text": corpus})
    _check_distinct({**files, "--out": None, "--resume": resume})
    if plot is not None:
        check_format(plot)
        check_writable(plot)
    if json_lines not in (None, "-"):
        check_writable(Path(str(json_lines)), pipes=True)
    check_writable(out)
    if resume is not None:
        rates = {
            "lr_schedule": ("kind", lr_schedule.value),
            "lr": ("lr", lr),
            "hold": ("hold", hold),
        }
        changes = dict(change for option, change in rates.items() if option in given)
        trainer, epochs = _resumed(
            resume, corpus, max_chars, epochs if "epochs" in given else None, changes,
            "max_chars" in given, backend.value,
        )  # fmt: skip
        for name, of_checkpoint in FIXED_BY_CHECKPOINT.items():
            wanted, there = context.params[name], of_checkpoint(trainer)
            if name in given and wanted != there:
                option = f"--{name.replace('_', '-')}"
                raise UsageError(
                    f"{option} {wanted} cannot be given with --resume: {resume} has {there}"
                )
    else:
        text = fastrnn.load_corpus(corpus, max_chars or None)
        falls = lr_schedule is not Schedule.constant
        if hold is None:
            hold = default_hold(epochs) if falls else 0
        schedule = LRSchedule(lr_schedule.value, lr, epochs, hold)
        model = fastrnn.CharRNN(text.vocab, hidden_size, backend.value, dtype.value, seed)
        trainer = Trainer(
            model,
            text,
            batch_size,
            num_steps,
            sampling.value,
            clip_norm=clip_norm,
            lr_schedule=schedule,
            seed=seed,
            val_fraction=val_fraction,
        )
    kept = trainer.notes
    notes = {
        "corpus": kept.get("corpus") if corpus is None else str(corpus.resolve()),
        "max_chars": kept.get("max_chars", max_chars) if "max_chars" not in given else max_chars,
        "epochs": epochs,
    }
    outputs = Outputs(
        out=out,
        notes=notes,
        json=json_lines,
        plot=plot,
        prefixes=prefix,
        pred_period=pred_period,
        pred_len=pred_len,
        save_period=save_period,
        temperature=temperature,
        stop_on_divergence=on_divergence is OnDivergence.stop,
        again=tuple(_again(context, given)),
    )
    run = Run(trainer, epochs, outputs, resumed=resume)
    steps = trainer.batches_per_epoch
    run.console.print(
        f"{trainer.corpus.name}: {len(trainer.corpus):,} characters, "
        f"{len(trainer.model.vocab):,} distinct; {trainer.model.num_parameters:,} parameters; "
        f"{steps:,} step{'s' if steps > 1 else ''} an epoch; backend {trainer.model.backend.name}",
        markup=False,
    )
    if notes["max_chars"] == len(trainer.corpus):
        run.console.print("(the beginning of the text: --max-chars 0 takes all of it)")
    raise typer.Exit(run())


def _check_distinct(files: dict[str, Any]) -> None:
    """Raise if two of the files that a run reads and writes are one."""
    named = [(what, Path(path)) for what, path in files.items() if path not in (None, "-")]
    for i, (what, path) in enumerate(named):
        for other, before in named[:i]:
            if same_file(path, before) and (path.is_file() or not path.exists()):
                raise UsageError(f"{other} and {what} are the same file, {path}")


def _again(context: typer.Context, given: set[str]) -> Iterator[str]:
    """The options of this run that no checkpoint holds, as they are written."""
    for parameter in context.command.params:
        if parameter.name in NOT_IN_CHECKPOINT and parameter.name in given:
            value = context.params[parameter.name]
            for one in value if isinstance(value, list | tuple) else [value]:
                yield from (parameter.opts[-1], str(one))


def _resumed(
    path: Path,
    corpus: Path | None,
    max_chars: int,
    epochs: int | None,
    changes: dict[str, Any],
    cut: bool,
    backend: str,
) -> tuple[Trainer, int]:
    """The trainer of a checkpoint and the number of epochs it is to reach.

    epochs: None: as the checkpoint says. changes: to its learning-rate schedule. cut: whether
    max_chars is to replace what the checkpoint says.
    """
    _, header = load_checkpoint(path)
    try:
        saved = header.get("trainer", {})
        notes = saved.get("notes", {})
        if corpus is None and notes.get("corpus"):
            corpus = Path(notes["corpus"])
            if not corpus.exists():
                raise CorpusError(
                    f"{path} was trained on {corpus}, which is no longer there: pass the text's "
                    "new path before --resume"
                )
        if not cut:
            max_chars = int(notes.get("max_chars", max_chars))
        total = int(notes.get("epochs", 250)) if epochs is None else epochs
        done = len(saved.get("history", ()))
        if done >= total:
            raise UsageError(
                f"{path} has already done {done} of {total} epochs: "
                f"pass --epochs {2 * done}, say, to go on"
            )
        schedule = None
        if saved:
            now = {**saved["lr_schedule"], "epochs": total, **changes}
            if now["hold"] >= total and "hold" not in changes:
                now["hold"] = default_hold(total)
            schedule = LRSchedule(**now)
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} does not hold a complete trainer: {error!r}") from error
    text = fastrnn.load_corpus(corpus, max_chars or None)
    return Trainer.resume(path, text, backend, lr_schedule=schedule), total


@app.command()
@_friendly
def generate(
    checkpoint: Annotated[Path, typer.Argument(help="Written by fastrnn train.")],
    prefix: Annotated[list[str], typer.Option(help="What to continue; repeatable.")],
    length: Annotated[int, typer.Option(min=0, help="Characters to produce.")] = 50,
    temperature: Annotated[float, typer.Option(min=0, help="0: the most probable one.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Of the k most probable; 0: of all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Of the most probable that reach p.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice.")] = 0,
    best: Annotated[bool, typer.Option("--best", help="The best weights, not the last.")] = False,
    backend: Annotated[BackendName, typer.Option(help="What computes.")] = BackendName.auto,
) -> None:
    """Continue one or several prefixes.

    One prefix is continued as you watch, several all at once.

    [bold]Examples[/bold]

    fastrnn generate fastrnn.safetensors --prefix 分开 --length 100

    fastrnn generate fastrnn.safetensors --prefix 海 --prefix 风 --temperature 0.8 --top-p 0.9
    """
    model = load(checkpoint, backend.value, best=best)
    how = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    terminal = sys.stdout is not None and sys.stdout.isatty()
    if len(prefix) > 1:
        for text in model.generate(prefix, length, **how):
            print(shown(text, terminal))
        return
    characters = model.stream(prefix[0], length, **how)
    print(shown(prefix[0], terminal), end="", flush=True)
    for character in characters:
        print(shown(character, terminal), end="", flush=True)
    print()


@app.command()
@_friendly
def bench(
    workload: Annotated[
        list[str] | None, typer.Option(help="step, recurrence, generate, …; repeatable.")
    ] = None,
    size: Annotated[
        list[str] | None, typer.Option(help="headline, B1, H1024, …; repeatable.")
    ] = None,
    backend: Annotated[
        list[BackendName] | None, typer.Option(help="Only these of ours; repeatable.")
    ] = None,
    peers: Annotated[
        str, typer.Option(help="installed, all (those that compile for long too), or none.")
    ] = "installed",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every contender.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Of every contender.")] = None,
    json_file: Annotated[
        str | None, typer.Option("--json", help="Write the result here; - is stdout.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the first table here.")] = None,
) -> None:
    """Time our backends on this machine, and the peers that are installed on it.

    Every contender runs in a process of its own, is checked against the float64 oracle first, and
    takes turns with the others; ratios are medians over the turns.

    [bold]Examples[/bold]

    fastrnn bench

    fastrnn bench --workload recurrence --size headline --size H1024 --plot bench.png
    """
    from fastrnn.bench import run_bench

    named = [fastrnn.open_backend().name if b == "auto" else b.value for b in backend or ()]
    if plot is not None:
        check_format(plot)
        check_writable(plot)
    if json_file not in (None, "-"):
        check_writable(Path(str(json_file)))
    quiet = not sys.stderr.isatty()
    result = run_bench(
        workload or ("step", "generate"),
        size or ("headline",),
        peers=peers,
        backends=named or None,
        rounds=rounds,
        threads=threads,
        progress=lambda line: None if quiet else print(f"… {line}", file=sys.stderr),
    )
    if json_file == "-":
        print(result.to_json(), end="")
    else:
        print(result.table())
        if json_file is not None:
            Path(json_file).write_text(result.to_json(), encoding="utf-8")
    for row in result.rows:
        if row.name in named and row.status == "missing":
            raise BackendUnavailableError(row.reason)
    if plot is not None:
        result.plot(plot, *result.tables()[0])


@app.command()
@_friendly
def info(
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
) -> None:
    """Say what runs here: backends, versions, CPU and GPU.

    [bold]Example[/bold]

    fastrnn info --json | jq .backends
    """
    facts = environment()
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    print(f"fastrnn {facts['fastrnn']}, Python {facts['python']}, {facts['platform']}")
    print(f"CPU: {facts['machine']['cpu']}, {facts['machine']['cores']} cores to use")
    for gpu in facts["machine"]["gpus"] or [{"name": "none found", "driver": "none"}]:
        print(f"GPU: {gpu['name']}, driver {gpu['driver']}")
    for blas in facts["machine"]["blas"]:
        print(f"BLAS: {blas}")
    print("packages: " + ", ".join(f"{name} {v}" for name, v in facts["packages"].items()))
    print("backends:")
    for name, reason in facts["backends"].items():
        print(f"  {name:<11} {'works' if reason is None else 'cannot run: ' + reason}")
    if facts["auto"] is None:
        print(f"auto cannot choose: {facts['auto_error']}")
    else:
        print(f"auto chooses {facts['auto']}")
    for key, value in facts["device"].items():
        print(f"  {key}: {value}")


def environment() -> dict[str, Any]:
    """What ``fastrnn info`` shows."""
    packages = {}
    for name in ("numpy", "numba", "scipy", "numba-cuda", "cupy-cuda13x", "cupy-cuda12x", "torch"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    packages.setdefault("numpy", np.__version__)
    from fastrnn.bench import machine

    chosen, error = None, None
    try:
        chosen = fastrnn.open_backend()
    except (BackendUnavailableError, ValueError) as wrong:  # as FASTRNN_BACKEND is
        error = str(wrong)
    return {
        "fastrnn": fastrnn.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": machine(),
        "packages": packages,
        "backends": fastrnn.available_backends(),
        "auto": chosen.name if chosen else None,
        "auto_error": error,
        "device": chosen.describe() if chosen else {},
    }


def main() -> None:
    """Run the command that the arguments of the process name."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a text may have what the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="fastrnn")
    except OSError as error:  # of what is printed outside the commands: --help on a full disk
        _leave_stdout()
        _say(error)
        sys.exit(1)
