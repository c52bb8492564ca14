"""What ``fastrnn train`` does, apart from its options: loop, progress, signals, files."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from fastrnn.checkpoint import writable_target, write_atomically
from fastrnn.corpus import CorpusError
from fastrnn.decoding import Decoding
from fastrnn.plot import plot_curves
from fastrnn.trainer import DivergenceError, EpochStats, Trainer

DEFAULT_PREFIXES = ("分开", "不分开")


# What a terminal would obey instead of showing it; a text may have that too.
_CONTROLS = {c: f"\\x{c:02x}" for c in [*range(32), *range(127, 160)] if chr(c) not in "\t\n"}


def shown(text: str, terminal: bool) -> str:
    """The text as it is, but for a terminal with control characters written out."""
    return text.translate(_CONTROLS) if terminal else text


class UsageError(ValueError):
    """Options that contradict each other; exit code 2."""


@dataclass
class Outputs:
    """Where a run writes, and how often it speaks."""

    out: Path
    notes: dict[str, Any]
    json: str | None = None
    plot: Path | None = None
    prefixes: list[str] | None = None
    pred_period: int = 50
    pred_len: int = 50
    save_period: int = 100
    temperature: float = 0.0
    stop_on_divergence: bool = True
    # Options that a run which goes on has to be given again: no checkpoint holds them.
    again: tuple[str, ...] = ()


class Run:
    """One call of ``fastrnn train``: a trainer, where it writes, and how it is stopped."""

    def __init__(
        self, trainer: Trainer, epochs: int, outputs: Outputs, resumed: Path | None = None
    ) -> None:
        """resumed: the checkpoint that the trainer is from."""
        self.trainer = trainer
        self.epochs = epochs
        self.outputs = outputs
        self.resumed = resumed
        self.stopping = False
        self.warned = False
        self.saved = False
        Decoding(temperature=outputs.temperature)  # is it a temperature at all
        # With the metrics on standard output, words for people go to standard error.
        # Nothing printed is markup: a corpus may have brackets.
        self.console = Console(
            stderr=outputs.json == "-", markup=False, emoji=False, highlight=False, soft_wrap=True
        )
        self.prefixes = self._prefixes()

    def _prefixes(self) -> list[str]:
        vocab, tokens = self.trainer.model.vocab, self.trainer.corpus.tokens
        if self.outputs.prefixes:
            for prefix in self.outputs.prefixes:
                if not prefix:
                    raise CorpusError("--prefix needs at least one character")
                vocab.encode(prefix)
            return self.outputs.prefixes
        if all(char in vocab.char_to_idx for prefix in DEFAULT_PREFIXES for char in prefix):
            return list(DEFAULT_PREFIXES)
        return [vocab.decode(tokens[:5])]

    def __call__(self) -> int:
        """Train to the end, to Ctrl-C or to divergence; return the exit code."""
        with self._metrics() as metrics, self._signals(), self._progress() as progress:
            try:
                code = self._loop(metrics, progress)
            except BaseException:
                # A full disk, a reader of the output that has gone: what was learnt is kept.
                if self.trainer.epoch or self.trainer.progress:
                    with contextlib.suppress(Exception):
                        self._save()
                        print(f"fastrnn: what was learnt is in {self.outputs.out}", file=sys.stderr)
                raise
        if self.outputs.plot is not None and self.trainer.history:
            plot_curves(self.outputs.plot, {"training": self.trainer.history})
            self.console.print(f"training curve: {self.outputs.plot}")
        return code

    def _loop(self, metrics: IO[str] | None, progress: Progress | None) -> int:
        trainer = self.trainer
        task = None
        if progress is not None:
            task = progress.add_task(
                "compiling kernels (first run only)", total=self.epochs, completed=trainer.epoch
            )
        while trainer.epoch < self.epochs:
            try:
                stats = trainer.advance()
            except DivergenceError as error:
                return self._diverged(str(error))
            if progress is not None and task is not None:
                last = trainer.history[-1] if trainer.history else None
                said = f"perplexity {last.perplexity:.3f}" if last else "first epoch"
                speed = f"{last.tokens_per_second:,.0f} characters/s" if last else ""
                progress.update(
                    task,
                    description=f"epoch {trainer.epoch}  {said}  {speed}",
                    completed=trainer.epoch + trainer.progress,
                )
            if stats is not None:
                self._report(stats, metrics)
                if (reason := trainer.diverged()) is not None:
                    if self.outputs.stop_on_divergence:
                        trainer.restore_best()
                        return self._diverged(reason)
                    if not self.warned:
                        self.console.print(f"warning: {reason}", style="yellow")
                        self.warned = True
            if self.stopping and trainer.epoch < self.epochs:
                self._save()
                words = ["fastrnn", "train", "--resume", str(self.outputs.out)]
                resume = shlex.join([*words, *self.outputs.again])
                self.console.print(
                    f"stopped in epoch {trainer.epoch + 1}, saved to {self.outputs.out}; go on "
                    f"with: {resume}"
                )
                return 0
        self._save()
        best = trainer.best
        if best is not None and best.score < 0.9 * trainer.history[-1].score:
            self.console.print(
                f"epoch {best.epoch} was better (perplexity {best.score:.4g}): "
                "fastrnn generate --best uses its weights"
            )
        out, prefix = str(self.outputs.out), self.prefixes[0]
        command = shlex.join(["fastrnn", "generate", out, "--prefix", prefix])
        command = shown(command, self.console.is_terminal)
        self.console.print(f"saved to {out}; try: {command}")
        return 0

    def _report(self, stats: EpochStats, metrics: IO[str] | None) -> None:
        if metrics is not None:
            row = {**asdict(stats), "tokens_per_second": stats.tokens_per_second}
            # JSON has no infinity.
            row = {k: None if v is not None and not math.isfinite(v) else v for k, v in row.items()}
            print(json.dumps(row), file=metrics, flush=True)
        period = self.outputs.pred_period
        if (period and stats.epoch % period == 0) or stats.epoch == self.epochs:
            held_out = ""
            if stats.val_perplexity is not None:
                held_out = f"  validation {stats.val_perplexity:.3f}"
            self.console.print(
                f"epoch {stats.epoch}  perplexity {stats.perplexity:.3f}{held_out}  "
                f"{stats.tokens_per_second:,.0f} characters/s"
            )
            texts = self.trainer.model.generate(
                self.prefixes,
                self.outputs.pred_len,
                temperature=self.outputs.temperature,
                seed=stats.epoch,
            )
            for text in texts:
                self.console.print(f" - {shown(text, self.console.is_terminal)}")
        save_period = self.outputs.save_period
        if save_period and stats.epoch % save_period == 0 and stats.epoch < self.epochs:
            self._save()

    def _diverged(self, reason: str) -> int:
        if self.trainer.best is not None:
            self._save()
            reason += f"; the best weights are in {self.outputs.out}"
        print(f"fastrnn: error: {reason}", file=sys.stderr)
        return 1

    def _save(self) -> None:
        out, kept = self.outputs.out, None
        ours = self.saved or (self.resumed is not None and same_file(out, self.resumed))
        if not ours and out.is_file():
            # The file is of another run: it is not for this one to throw away.
            kept = keep(out)
        try:
            self.trainer.save(out, notes=self.outputs.notes)
        except BaseException:
            if kept is not None:
                kept.unlink()
            raise
        self.saved = True
        if kept is not None:
            self.console.print(f"the {out.name} that was there is now {kept.name}")

    # --- surroundings ---

    @contextlib.contextmanager
    def _metrics(self) -> Iterator[IO[str] | None]:
        if self.outputs.json is None:
            yield None
        elif self.outputs.json == "-":
            yield sys.stdout
        else:
            mode = "w" if self.resumed is None else "a"
            with open(self.outputs.json, mode, encoding="utf-8") as file:
                yield file

    @contextlib.contextmanager
    def _progress(self) -> Iterator[Progress | None]:
        if not self.console.is_terminal:
            yield None
            return
        columns = (BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            yield progress

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first signal to stop does so after the current steps, the second at once."""

        def stop(signum: int, frame: FrameType | None) -> None:
            if self.stopping:
                kept = b"the last saved checkpoint is whole" if self.saved else b"nothing was saved"
                os.write(2, b"fastrnn: stopped at once; " + kept + b"\n")
                os._exit(1)
            self.stopping = True
            os.write(2, b"fastrnn: stopping after the current steps\n")

        signals = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
            signals.append(signal.SIGHUP)
        before = {s: signal.signal(s, stop) for s in signals}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)


def same_file(a: Path, b: Path) -> bool:
    """Whether two paths lead to one file, be it there or not."""
    return os.path.realpath(a) == os.path.realpath(b)


def keep(path: Path) -> Path:
    """Give a file a second name, ``.bak``, ``.bak2``, …, one that is free; return it.

    A file that later takes the first name leaves this one as it is: nothing is copied, unless the
    file system has no hard links.
    """
    for number in itertools.count(1):
        name = path.with_name(f"{path.name}.bak{number if number > 1 else ''}")
        if os.path.lexists(name):
            continue
        try:
            os.link(os.path.realpath(path), name)
        except FileExistsError:
            continue
        except OSError:
            write_atomically(name, path.read_bytes())
        return name
    raise AssertionError


def check_writable(path: Path, pipes: bool = False) -> None:
    """Find out before the work, not after it, that a file cannot be written.

    Args:
        pipes: whether a device or a pipe will do as well.

    Raises:
        OSError: the directory is missing or takes no new file, or the path is no file.
    """
    if pipes and path.exists() and not path.is_file() and not path.is_dir():
        return
    target, temporary = writable_target(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no directory {path.parent}")
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(f"cannot write {path}: it is read-only")
    try:
        temporary.open("xb").close()
        temporary.unlink()
    except OSError as error:
        raise PermissionError(f"cannot write {path}: {error.strerror}") from error
