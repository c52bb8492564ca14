"""The training loop: epochs over a corpus, schedules, the best weights kept, exact resumption."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrnn.backend import SMALLER_BATCH, Array, Backend, Dims, Workspace, memory_of
from fastrnn.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from fastrnn.checks import count, positive_int
from fastrnn.corpus import SAMPLINGS, Corpus, CorpusError, batch_starts, num_batches
from fastrnn.model import CharRNN, model_from_checkpoint
from fastrnn.reference import PARAM_NAMES, perplexity
from fastrnn.schedules import LRSchedule

_CHUNK_SECONDS = 0.05
_FIRST_CHUNK, _LAST_CHUNK = 8, 1024


@dataclass(frozen=True)
class EpochStats:
    """What one epoch did.

    Attributes:
        epoch: its number, from 1. loss: mean cross entropy in nats over the epoch's tokens.
        perplexity: ``exp(loss)``. grad_norm: mean global norm before clipping.
        tokens: targets predicted. seconds: wall-clock time of the training steps.
        lr: the learning rate. val_perplexity: on the validation split after the epoch, if any.
    """

    epoch: int
    loss: float
    perplexity: float
    grad_norm: float
    tokens: int
    seconds: float
    lr: float
    val_perplexity: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """Characters trained on a second."""
        return self.tokens / self.seconds if self.seconds > 0 else math.inf

    @property
    def score(self) -> float:
        """What "best" is judged by: the validation perplexity where there is one."""
        return self.perplexity if self.val_perplexity is None else self.val_perplexity


class DivergenceError(ArithmeticError):
    """Training left the region where it learns; the model holds the best weights seen before."""


class Trainer:
    """Trains a :class:`fastrnn.CharRNN` on a corpus by truncated BPTT, clipping and SGD.

    Args:
        model: trained in place, on its own backend. corpus: what to train on; its vocabulary must
            be the model's.
        batch_size: B. num_steps: T, the length of a batch and of BPTT.
        sampling: "consecutive" (state zeroed every epoch and carried from batch to batch) or
            "random" (examples in random order, state zeroed at every batch).
        lr: learning rate. clip_norm: threshold of the global gradient norm.
        lr_schedule: "constant", "linear", "cosine", "step" or an :class:`fastrnn.LRSchedule`.
        seed: of the random sampling.
        epochs: length of the run, needed by the falling schedules.
        val_fraction: the share at the end of the text kept for validation, in [0, 1).

    Raises:
        ValueError, TypeError: an argument out of range. CorpusError: the text is shorter than one
        batch, or has another vocabulary.

    At any moment between two calls the trainer can be saved; what was saved goes on exactly, to the
    bit, on the same backend and machine.
    """

    def __init__(
        self,
        model: CharRNN,
        corpus: Corpus,
        batch_size: int = 32,
        num_steps: int = 35,
        sampling: str = "consecutive",
        lr: float = 100.0,
        clip_norm: float = 0.01,
        lr_schedule: str | LRSchedule = "constant",
        seed: int = 0,
        *,
        epochs: int | None = None,
        val_fraction: float = 0.0,
    ) -> None:
        if sampling not in SAMPLINGS:
            raise ValueError(f"unknown sampling {sampling!r}: expected {' or '.join(SAMPLINGS)}")
        if not (clip_norm > 0 and math.isfinite(clip_norm)):
            raise ValueError(f"clip_norm must be finite and > 0, got {clip_norm!r}")
        if not 0.0 <= val_fraction < 1.0:
            raise ValueError(f"val_fraction must be in [0, 1), got {val_fraction!r}")
        if isinstance(lr_schedule, str):
            lr_schedule = LRSchedule(lr_schedule, lr, epochs)
        if not isinstance(lr_schedule, LRSchedule):
            kind = type(lr_schedule).__name__
            raise TypeError(f"lr_schedule must be a string or an LRSchedule, got {kind}")
        if corpus.vocab != model.vocab:
            raise CorpusError(
                f"the corpus has {len(corpus.vocab)} distinct characters, not those "
                f"{len(model.vocab)} of the model: build the model with corpus.vocab"
            )
        self.model = model
        self.corpus = corpus
        self.batch_size = positive_int("batch_size", batch_size)
        self.num_steps = positive_int("num_steps", num_steps)
        self.sampling = sampling
        self.clip_norm = float(clip_norm)
        self.lr_schedule = lr_schedule
        self.seed = count("seed", seed)
        self.val_fraction = float(val_fraction)
        self.notes: dict[str, Any] = {}
        self.history: list[EpochStats] = []
        self.best: EpochStats | None = None

        train, validation = corpus, None
        if val_fraction > 0:
            train, validation = corpus.split(val_fraction)
        try:
            self._starts = self._epoch_starts(train, 0)
        except CorpusError as error:
            if validation is None:
                raise
            raise CorpusError(
                f"with val_fraction={val_fraction:g} of it held out, {error}"
            ) from None
        self._train = train
        dims = Dims(
            self.num_steps, self.batch_size, model.hidden_size, len(model.vocab), model.dtype
        )
        with memory_of(dims.sizes, dims.dtype, SMALLER_BATCH):
            self._ws = self._backend.workspace(dims, np.asarray(train.tokens), model.params)
            self._validation = None if validation is None else self._validation_run(validation)
            self._best_params: Array = self._backend.empty((dims.flat_size,), model.dtype)
            self._backend.put(self._ws.flat_params, out=self._best_params)
            self._zero_state: Array = self._backend.put(
                np.zeros((self.batch_size, model.hidden_size), model.dtype)
            )
            self._zero_totals: Array = self._backend.put(np.zeros(4))
        self._bind()
        self._cursor = 0
        self._seconds = 0.0
        self._chunk = _FIRST_CHUNK

    # --- running ---

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.history)

    @property
    def batches_per_epoch(self) -> int:
        """Training steps in an epoch."""
        return len(self._starts)

    @property
    def progress(self) -> float:
        """The share of the current epoch that is done, in [0, 1)."""
        return self._cursor / len(self._starts)

    def run_epoch(self) -> EpochStats:
        """Run to the end of the current epoch and return its statistics.

        Raises:
            DivergenceError: a loss or gradient was not finite. The model then holds the best
                weights of the epochs before.
        """
        while (stats := self.advance()) is None:
            pass
        return stats

    def advance(self) -> EpochStats | None:
        """Run a few steps, some 50 ms; return statistics when that ended the epoch, else None.

        For callers that want to stay responsive; the trainer can be saved between two calls.
        """
        self._bind()
        backend, ws = self._backend, self._ws
        begin = time.perf_counter()
        if self._cursor == 0:
            self._starts = self._epoch_starts(self._train, self.epoch)
            backend.put(self._zero_state, out=ws.h0)
            backend.put(self._zero_totals, out=ws.totals)
        starts = self._starts[self._cursor : self._cursor + self._chunk]
        lr = self.lr_schedule(self.epoch)
        try:
            with np.errstate(all="ignore"):  # what is not finite is counted, and reported below
                backend.run_steps(ws, starts, lr, self.clip_norm, self.sampling == "consecutive")
            self._cursor += len(starts)
        except KeyboardInterrupt:
            # The weights have moved by the steps that are done, which are counted with the losses.
            self._cursor = int(backend.get(ws.totals)[2])
            raise
        ended = self._cursor == len(self._starts)
        if not ended:
            backend.sync()
        totals = backend.get(ws.totals) if ended else None
        seconds = time.perf_counter() - begin
        if seconds < _CHUNK_SECONDS and len(starts) == self._chunk:
            self._chunk = min(2 * self._chunk, _LAST_CHUNK)
        self._seconds += seconds
        return None if totals is None else self._end_epoch(totals, lr)

    def fit(
        self,
        epochs: int,
        *,
        on_epoch: Callable[[EpochStats], None] | None = None,
        stop_on_divergence: bool = True,
    ) -> list[EpochStats]:
        """Run ``epochs`` more epochs; return their statistics.

        Args:
            on_epoch: called after every epoch.
            stop_on_divergence: raise :class:`DivergenceError` when :meth:`diverged` sees the
                training collapse; the model then holds the best weights.
        """
        done = []
        for _ in range(positive_int("epochs", epochs)):
            stats = self.run_epoch()
            done.append(stats)
            if on_epoch is not None:
                on_epoch(stats)
            if stop_on_divergence and (reason := self.diverged()):
                self.restore_best()
                raise DivergenceError(reason)
        return done

    def diverged(self) -> str | None:
        """Say why the last epoch counts as a collapse, or None.

        It does when the model had learnt (perplexity below a quarter of the vocabulary size) and
        the training perplexity is then more than ten times the best, or worse than a uniform guess;
        or when after the first epoch it is more than ten times that of a uniform guess.
        """
        if not self.history:
            return None
        last, V = self.history[-1], len(self.model.vocab)
        best = min(self.history, key=lambda stats: stats.perplexity)
        collapsed = last.perplexity > min(10 * best.perplexity, V)
        if best.perplexity < V / 4 and collapsed:
            return (
                f"training diverged: perplexity {last.perplexity:.4g} in epoch {last.epoch} after "
                f"{best.perplexity:.4g} in epoch {best.epoch}; lower the learning rate or "
                "let it fall (a linear lr schedule)"
            )
        if last.epoch > 1 and last.perplexity > 10 * V:
            return (
                f"training diverges: perplexity {last.perplexity:.4g} in epoch {last.epoch}, where "
                f"a uniform guess has {V}; lower lr={last.lr:g}"
            )
        return None

    def restore_best(self) -> EpochStats | None:
        """Put the best weights so far back into the model; return their epoch, None: the start."""
        self._backend.put(self._best_params, out=self._ws.flat_params)
        self.model.arrays = self._ws.params
        return self.best

    def evaluate(self, corpus: Corpus) -> float:
        """Perplexity of the current weights on ``corpus``, read from its start in one row."""
        if corpus.vocab != self.model.vocab:
            raise CorpusError(
                "the corpus to evaluate has another vocabulary than the model: build it as "
                "fastrnn.Corpus(model.vocab, model.vocab.encode(text))"
            )
        self._bind()
        return self._perplexity(*self._validation_run(corpus))

    # --- parts of an epoch ---

    @property
    def _backend(self) -> Backend:
        return self.model.backend

    def _bind(self) -> None:
        """Let model and workspace share the parameters, taking over what the model was given."""
        if self.model.arrays is not self._ws.params:
            for name, array in self.model.arrays.items():
                self._backend.put(array, out=self._ws.params[name])
            self.model.arrays = self._ws.params

    def _epoch_starts(self, corpus: Corpus, epoch: int) -> NDArray[np.int32]:
        return batch_starts(
            len(corpus),
            self.batch_size,
            self.num_steps,
            self.sampling,
            seed=self.seed,
            epoch=epoch,
        )

    def _end_epoch(self, totals: NDArray[np.float64], lr: float) -> EpochStats:
        n = len(self._starts)
        loss = float(totals[0]) / n
        self._cursor, seconds, self._seconds = 0, self._seconds, 0.0
        if totals[3] > 0:
            best = self.restore_best()
            origin = "from before training"
            if best is not None:
                origin = f"of epoch {best.epoch} (perplexity {best.score:.4g})"
            raise DivergenceError(
                f"{int(totals[3])} of {n} steps of epoch {self.epoch + 1} had a loss or gradient "
                f"that is not finite; the model holds the weights {origin}; lower lr={lr:g}"
            )
        stats = EpochStats(
            epoch=self.epoch + 1,
            loss=loss,
            perplexity=perplexity(loss),
            grad_norm=float(totals[1]) / n,
            tokens=n * self.batch_size * self.num_steps,
            seconds=seconds,
            lr=lr,
            val_perplexity=self._perplexity(*self._validation) if self._validation else None,
        )
        self.history.append(stats)
        if self.best is None or stats.score < self.best.score:
            self.best = stats
            self._backend.put(self._ws.flat_params, out=self._best_params)
        return stats

    def _validation_run(self, corpus: Corpus) -> tuple[Workspace, NDArray[np.int32]]:
        """A workspace that shares the weights, and the offsets that cover ``corpus``."""
        if len(corpus) < 2:
            raise CorpusError(f"evaluation needs at least 2 characters, got {len(corpus)}")
        T, B = min(self.num_steps, len(corpus) - 1), self.batch_size
        while num_batches(len(corpus), B, T, "consecutive") == 0:
            B = max(1, B // 2)
        dims = replace(self._ws.dims, T=T, B=B)
        own = self._backend.workspace(dims, np.asarray(corpus.tokens), self.model.params)
        shared = replace(own, flat_params=self._ws.flat_params, params=self._ws.params)
        return shared, batch_starts(len(corpus), B, T, "consecutive")

    def _perplexity(self, ws: Workspace, starts: NDArray[np.int32]) -> float:
        self._backend.put(np.zeros((ws.dims.B, ws.dims.H), ws.dims.dtype), out=ws.h0)
        return perplexity(self._backend.evaluate(ws, starts, carry=True))

    # --- persistence ---

    def save(self, path: str | Path, *, notes: dict[str, Any] | None = None) -> None:
        """Write everything that goes on from here to one safetensors file, atomically.

        Weights, vocabulary, configuration, the position within the epoch, the carried state, the
        sums so far, the best weights and the history. :func:`fastrnn.load` reads the model from it,
        :meth:`resume` the trainer.

        Args:
            notes: JSON-able values to keep beside it (the command line keeps the corpus's path);
                None: those that the trainer was resumed with.
        """
        tensors, trainer = self._state()
        if notes is not None:
            trainer["notes"] = notes
        save_checkpoint(path, tensors, {"model": self.model.config, "trainer": trainer})

    def _state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """All that :meth:`_restored` needs beside the corpus: tensors, and what JSON can hold."""
        self._bind()
        get, dims = self._backend.get, self._ws.dims
        best = get(self._best_params)
        tensors = {
            **self.model.params,
            **{f"best.{name}": view for name, view in dims.views(best).items()},
            "trainer.h0": get(self._ws.h0),
            "trainer.totals": get(self._ws.totals),
        }
        trainer = {
            "batch_size": self.batch_size,
            "num_steps": self.num_steps,
            "sampling": self.sampling,
            "clip_norm": self.clip_norm,
            "lr_schedule": asdict(self.lr_schedule),
            "seed": self.seed,
            "val_fraction": self.val_fraction,
            "corpus_sha256": _digest(self.corpus),
            "cursor": self._cursor,
            "seconds": self._seconds,
            "best": None if self.best is None else self.best.epoch,
            "history": [list(asdict(stats).values()) for stats in self.history],
            "notes": self.notes,
        }
        return tensors, trainer

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self)._restored, (self.model, self.corpus, *self._state())

    @classmethod
    def resume(
        cls,
        path: str | Path,
        corpus: Corpus,
        backend: str | Backend = "auto",
        *,
        lr_schedule: LRSchedule | None = None,
    ) -> Trainer:
        """Go on where :meth:`save` left off, with the same corpus.

        Args:
            lr_schedule: another schedule from here on (for a longer run, say); None: the saved one.

        Raises:
            FileNotFoundError, CheckpointError: no checkpoint of a trainer. CorpusError: the corpus
            is not the one that was trained on.
        """
        tensors, header = load_checkpoint(path)
        if "trainer" not in header:
            raise CheckpointError(
                f"{path} holds a model but no training state: it was written by CharRNN.save; "
                "load it with fastrnn.load and start a new Trainer"
            )
        model = model_from_checkpoint(path, tensors, header, backend)
        saved = header["trainer"]
        try:
            if saved["corpus_sha256"] != _digest(corpus):
                raise CorpusError(
                    f"{path} was trained on another text than {corpus.name} "
                    f"({len(corpus):,} characters): pass the same corpus and max_chars"
                )
            return cls._restored(model, corpus, tensors, saved, lr_schedule)
        except CorpusError:
            raise
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise CheckpointError(f"{path} does not hold a complete trainer: {error!r}") from error

    @classmethod
    def _restored(
        cls,
        model: CharRNN,
        corpus: Corpus,
        tensors: Mapping[str, NDArray[Any]],
        saved: Mapping[str, Any],
        lr_schedule: LRSchedule | None = None,
    ) -> Trainer:
        """The trainer whose :meth:`_state` is given, on a model that has its weights."""
        trainer = cls(
            model,
            corpus,
            saved["batch_size"],
            saved["num_steps"],
            saved["sampling"],
            clip_norm=saved["clip_norm"],
            lr_schedule=lr_schedule or LRSchedule(**saved["lr_schedule"]),
            seed=saved["seed"],
            val_fraction=saved["val_fraction"],
        )
        trainer.notes = dict(saved["notes"])
        trainer.history = [EpochStats(*row) for row in saved["history"]]
        if saved["best"] is not None:
            trainer.best = trainer.history[saved["best"] - 1]
        trainer._cursor, trainer._seconds = int(saved["cursor"]), float(saved["seconds"])
        trainer._starts = trainer._epoch_starts(trainer._train, trainer.epoch)
        if not 0 <= trainer._cursor <= len(trainer._starts):
            raise ValueError(f"cursor {trainer._cursor} of {len(trainer._starts)} steps")
        best = np.zeros(trainer._ws.dims.flat_size, model.dtype)
        for name in PARAM_NAMES:
            best[trainer._ws.dims.param_slices[name]] = tensors[f"best.{name}"].ravel()
        put, ws = trainer._backend.put, trainer._ws
        put(best, out=trainer._best_params)
        put(tensors["trainer.h0"], out=ws.h0)
        put(tensors["trainer.totals"], out=ws.totals)
        return trainer


def _digest(corpus: Corpus) -> str:
    """A fingerprint of a corpus: its vocabulary and its tokens."""
    digest = hashlib.sha256("".join(corpus.vocab.chars).encode())
    digest.update(np.ascontiguousarray(corpus.tokens).data)
    return digest.hexdigest()
