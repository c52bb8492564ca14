"""Model and trainer: learning, exact resumption, divergence, validation, persistence, bad input."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastrnn
from fastrnn import (
    CharRNN,
    CheckpointError,
    CorpusError,
    DivergenceError,
    LRSchedule,
    Trainer,
    reference,
)
from fastrnn.backend import Backend
from fastrnn.checkpoint import load_checkpoint, save_checkpoint
from fastrnn.reference import PARAM_NAMES
from tests.tolerances import assert_close

VERSE = "海风吹乱了你的头发 我们说好不分开 火车火车你慢一点走 "


@pytest.fixture(scope="module")
def corpus() -> fastrnn.Corpus:
    return fastrnn.corpus_from_text(VERSE * 14)


def make(corpus: fastrnn.Corpus, backend: Any = "numpy", **options: Any) -> Trainer:
    model = CharRNN(corpus.vocab, options.pop("hidden_size", 24), backend, seed=3)
    options = {"batch_size": 4, "num_steps": 9, "lr": 50.0, "seed": 5, **options}
    return Trainer(model, corpus, **options)


def state(trainer: Trainer) -> list[Any]:
    """Everything that must be equal after an exact resumption."""
    get, ws = trainer.model.backend.get, trainer._ws
    arrays = [*trainer.model.params.values(), get(ws.h0), get(trainer._best_params)]
    rows = [(s.epoch, s.loss, s.grad_norm, s.lr, s.val_perplexity) for s in trainer.history]
    return [*arrays, rows, trainer.best and trainer.best.epoch]


def assert_same(a: list[Any], b: list[Any]) -> None:
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


# --- Learning ---


@pytest.mark.parametrize("sampling", ["consecutive", "random"])
def test_learns_and_continues_the_verse(
    backend: Backend, corpus: fastrnn.Corpus, sampling: str
) -> None:
    trainer = make(corpus, backend, sampling=sampling, lr_schedule="linear", epochs=80)
    stats = trainer.fit(80)
    assert stats[0].perplexity > 10
    assert stats[-1].perplexity < 1.3
    assert trainer.model.generate("我们说好", 3) == "我们说好不分开"
    assert stats[-1].epoch == trainer.epoch == 80
    assert stats[-1].tokens == trainer.batches_per_epoch * 4 * 9
    assert stats[-1].perplexity == pytest.approx(math.exp(stats[-1].loss))


@pytest.mark.parametrize("sampling", ["consecutive", "random"])
def test_epochs_follow_the_oracle(backend: Backend, corpus: fastrnn.Corpus, sampling: str) -> None:
    trainer = make(corpus, backend, sampling=sampling)
    params = {n: p.astype(np.float64) for n, p in trainer.model.params.items()}
    for epoch in range(3):
        oracle = reference.train(
            np.asarray(corpus.tokens),
            params,
            epochs=1,
            batch_size=4,
            num_steps=9,
            sampling=sampling,
            lr=50.0,
            rng=np.random.default_rng([5, epoch]),
        )
        got = np.float32(math.log(trainer.run_epoch().perplexity))
        assert_close("trajectory", got, math.log(next(oracle)))


def test_the_same_seed_gives_the_same_bits(backend: Backend, corpus: fastrnn.Corpus) -> None:
    runs = []
    for _ in range(2):
        trainer = make(corpus, backend, sampling="random")
        trainer.fit(3)
        runs.append(state(trainer))
    assert_same(*runs)


def test_advance_in_pieces_is_the_same_epoch(corpus: fastrnn.Corpus) -> None:
    whole, pieces = make(corpus), make(corpus)
    whole.run_epoch()
    pieces._chunk = 1
    while pieces.advance() is None:
        assert 0 < pieces.progress < 1
        pieces._chunk = 1
    assert pieces.progress == 0
    assert_same(state(whole), state(pieces))


# --- Resumption ---


@pytest.mark.parametrize("sampling", ["consecutive", "random"])
@pytest.mark.parametrize("val_fraction", [0.0, 0.2])
def test_resume_is_exact(
    backend: Backend, corpus: fastrnn.Corpus, tmp_path: Path, sampling: str, val_fraction: float
) -> None:
    options = {
        "sampling": sampling,
        "val_fraction": val_fraction,
        "lr_schedule": "cosine",
        "epochs": 6,
    }
    whole = make(corpus, backend, **options)
    whole.fit(6)
    first = make(corpus, backend, **options)
    first.fit(3)
    first.save(tmp_path / "t.safetensors")
    second = Trainer.resume(tmp_path / "t.safetensors", corpus, backend)
    second.fit(3)
    assert_same(state(whole), state(second))


def test_resume_in_the_middle_of_an_epoch_is_exact(
    backend: Backend, corpus: fastrnn.Corpus, tmp_path: Path
) -> None:
    whole, first = make(corpus, backend), make(corpus, backend)
    whole.fit(2)
    first.run_epoch()
    first._chunk = 3
    assert first.advance() is None
    first.save(tmp_path / "t.safetensors")
    second = Trainer.resume(tmp_path / "t.safetensors", corpus, backend)
    assert second.progress == first.progress > 0
    second.run_epoch()
    assert_same(state(whole), state(second))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_a_copy_goes_on_by_itself_as_the_original_would(
    backend: Backend, corpus: fastrnn.Corpus, copied: Any
) -> None:
    first = make(corpus, backend, val_fraction=0.2)
    first.fit(2)
    before = first.model.params
    try:
        second = copied(first)
    except fastrnn.BackendUnavailableError:
        pytest.skip("this backend is emulated: another process could not open it by its name")
    second.fit(2)
    np.testing.assert_array_equal(first.model.params["W_hh"], before["W_hh"])
    first.fit(2)
    assert_same(state(first), state(second))
    model = copied(first.model)
    np.testing.assert_array_equal(model.params["W_xh"], first.model.params["W_xh"])


def test_steps_that_an_interrupt_cut_short_are_not_run_again(
    backend: Backend, corpus: fastrnn.Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = make(corpus, backend), make(corpus, backend)
    whole.fit(2)
    run_steps = backend.run_steps
    cuts = iter([1, 3, 1000])

    def interrupted(ws: Any, starts: Any, *rest: Any) -> None:
        """Ctrl-C comes when some of the steps, or all of them, are done."""
        some = next(cuts, None)
        run_steps(ws, starts[:some], *rest)
        if some is not None:
            raise KeyboardInterrupt

    monkeypatch.setattr(backend, "run_steps", interrupted)
    while cut.epoch < 2:
        try:
            cut.run_epoch()
        except KeyboardInterrupt:
            continue
    assert_same(state(whole), state(cut))


def test_resume_refuses_another_text_and_a_bare_model(
    corpus: fastrnn.Corpus, tmp_path: Path
) -> None:
    trainer = make(corpus)
    path = tmp_path / "t.safetensors"
    trainer.save(path)
    with pytest.raises(CorpusError, match="was trained on another text"):
        Trainer.resume(path, fastrnn.corpus_from_text(VERSE * 15))
    trainer.model.save(path)
    with pytest.raises(CheckpointError, match="holds a model but no training state"):
        Trainer.resume(path, corpus)


# --- Divergence ---


class Explode(LRSchedule):
    """A rate that is sound for ten epochs and absurd from then on."""

    factor = 1e3

    def __call__(self, epoch: int) -> float:
        return self.lr if epoch < 10 else self.lr * self.factor


def test_collapse_is_noticed_and_the_best_weights_come_back(corpus: fastrnn.Corpus) -> None:
    trainer = make(corpus, lr_schedule=Explode(lr=50.0))
    with pytest.raises(DivergenceError, match=r"perplexity .* in epoch 11 after .* in epoch"):
        trainer.fit(20)
    assert trainer.best is not None
    assert trainer.best.epoch <= 10
    again = make(corpus, lr_schedule=Explode(lr=50.0))
    again.fit(trainer.best.epoch)
    assert_same(list(again.model.params.values()), list(trainer.model.params.values()))


def test_collapse_can_be_watched(corpus: fastrnn.Corpus) -> None:
    trainer = make(corpus, lr_schedule=Explode(lr=50.0))
    stats = trainer.fit(12, stop_on_divergence=False)
    assert stats[-1].perplexity > stats[9].perplexity * 10
    assert "training diverged" in (trainer.diverged() or "")


def test_nan_stops_at_once_and_keeps_the_best_weights(corpus: fastrnn.Corpus) -> None:
    trainer = make(corpus)
    trainer.fit(2)
    best = trainer.model.params
    poisoned = {name: p.copy() for name, p in best.items()}
    poisoned["W_hq"][0, 0] = np.nan
    trainer.model.set_params(poisoned)
    with pytest.raises(DivergenceError, match="not finite; the model holds the weights of epoch 2"):
        trainer.run_epoch()
    assert_same(list(best.values()), list(trainer.model.params.values()))
    assert trainer.run_epoch().epoch == 3


def test_a_run_that_never_learns_is_noticed(corpus: fastrnn.Corpus) -> None:
    trainer = make(corpus, lr=1e5, clip_norm=1.0)
    with pytest.raises(DivergenceError, match="where a uniform guess has"):
        trainer.fit(30)


def test_a_healthy_run_is_not_called_diverged(corpus: fastrnn.Corpus) -> None:
    trainer = make(corpus)
    assert trainer.diverged() is None
    trainer.fit(5)
    assert trainer.diverged() is None


# --- Validation ---


def test_validation_split_is_evaluated_with_the_weights_after_the_epoch(
    backend: Backend, corpus: fastrnn.Corpus
) -> None:
    trainer = make(corpus, backend, val_fraction=0.2)
    stats = trainer.fit(2)[-1]
    held_out = corpus.split(0.2)[1]
    losses, h = [], np.zeros((4, 24))
    params = {n: p.astype(np.float64) for n, p in trainer.model.params.items()}
    for X, Y in reference.data_iter_consecutive(np.asarray(held_out.tokens), 4, 9):
        hs, logits = reference.forward(X, h, params)
        losses.append(reference.cross_entropy(logits, Y))
        h = hs[-1]
    assert len(losses) >= 1
    assert stats.val_perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    assert trainer.evaluate(held_out) == pytest.approx(stats.val_perplexity, rel=1e-12)


def test_a_validation_text_shorter_than_a_batch_is_still_evaluated(corpus: fastrnn.Corpus) -> None:
    trainer = make(corpus)
    assert 1 < trainer.evaluate(fastrnn.Corpus(corpus.vocab, corpus.tokens[:3])) < 1000


# --- Persistence ---


def test_model_round_trip(backend: Backend, corpus: fastrnn.Corpus, tmp_path: Path) -> None:
    model = CharRNN(corpus.vocab, 7, backend, seed=1)
    model.save(tmp_path / "m.safetensors")
    loaded = fastrnn.load(tmp_path / "m.safetensors", backend)
    assert loaded.vocab == model.vocab
    assert loaded.hidden_size == 7
    assert_same(list(model.params.values()), list(loaded.params.values()))
    assert loaded.generate("我", 9) == model.generate("我", 9)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a readable checkpoint"),
        (b"\x08\0\0\0\0\0\0\0{}      ", "not a fastrnn checkpoint"),
        (b"PK\x03\x04 something else", "not a readable checkpoint"),
    ],
    ids=["empty", "no metadata", "another kind"],
)
def test_damaged_checkpoints(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        fastrnn.load(path)


def test_truncated_and_newer_and_incomplete_checkpoints(
    corpus: fastrnn.Corpus, tmp_path: Path
) -> None:
    path = tmp_path / "m.safetensors"
    CharRNN(corpus.vocab, 5, "numpy").save(path)
    tensors, header = load_checkpoint(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        fastrnn.load(path)
    save_checkpoint(path, tensors, {**header, "format": 99})
    with pytest.raises(CheckpointError, match="format 99, this version reads up to 1"):
        fastrnn.load(path)
    del tensors["W_hh"]
    save_checkpoint(path, tensors, header)
    with pytest.raises(CheckpointError, match="complete model: 'W_hh'"):
        fastrnn.load(path)
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        fastrnn.load(tmp_path / "none.safetensors")


def test_failed_save_leaves_the_old_checkpoint(
    corpus: fastrnn.Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.safetensors"
    model = CharRNN(corpus.vocab, 5, "numpy")
    model.save(path)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        CharRNN(corpus.vocab, 6, "numpy").save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link_and_a_device_a_device(corpus: fastrnn.Corpus, tmp_path: Path) -> None:
    model = CharRNN(corpus.vocab, 4, "numpy")
    (tmp_path / "real").mkdir()
    real, link = tmp_path / "real" / "m.safetensors", tmp_path / "link.safetensors"
    model.save(real)
    real.chmod(0o600)
    link.symlink_to(real)
    CharRNN(corpus.vocab, 5, "numpy").save(link)
    assert link.is_symlink()
    assert fastrnn.load(real, "numpy").hidden_size == 5
    assert stat.S_IMODE(real.stat().st_mode) == 0o600
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="device or pipe, not a file"):
        model.save(tmp_path / "pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_non_contiguous_parameters_are_saved_right(corpus: fastrnn.Corpus, tmp_path: Path) -> None:
    turned = np.arange(12.0).reshape(3, 4).T
    save_checkpoint(tmp_path / "x", {"a": turned}, {})
    np.testing.assert_array_equal(load_checkpoint(tmp_path / "x")[0]["a"], turned)


def test_header_is_readable_json(corpus: fastrnn.Corpus, tmp_path: Path) -> None:
    trainer = make(corpus)
    trainer.run_epoch()
    trainer.save(tmp_path / "t.safetensors", notes={"corpus": "lyrics.txt"})
    tensors, header = load_checkpoint(tmp_path / "t.safetensors")
    assert header["model"]["vocab"] == "".join(corpus.vocab)
    assert header["trainer"]["notes"] == {"corpus": "lyrics.txt"}
    assert json.dumps(header)
    assert set(PARAM_NAMES) <= set(tensors)


def test_exchange_with_torch_and_the_tutorial(corpus: fastrnn.Corpus, tmp_path: Path) -> None:
    model = CharRNN(corpus.vocab, 6, "numpy", seed=2)
    model.save_npz(tmp_path / "five.npz")
    again = fastrnn.load_npz(tmp_path / "five.npz", corpus.vocab, "numpy")
    assert_same(list(model.params.values()), list(again.params.values()))

    torch = pytest.importorskip("torch", reason="torch is optional; not installed")
    rnn, linear = torch.nn.RNN(5, 6), torch.nn.Linear(6, 5)
    state = {f"rnn.{k}": v for k, v in rnn.state_dict().items()}
    state |= {f"linear.{k}": v for k, v in linear.state_dict().items()}
    chars = "zebra"  # in the order of the module's token ids, not ours
    taken = fastrnn.load_torch(state, chars, "numpy")
    ids = torch.tensor([chars.index(c) for c in "bar"])
    with torch.no_grad():
        logits = linear(rnn(torch.nn.functional.one_hot(ids, 5).float())[0])[-1]
    assert taken.generate("bar", 1) == "bar" + chars[int(logits.argmax())]
    back = taken.to_torch()
    torch.testing.assert_close(back["rnn.weight_hh_l0"], state["rnn.weight_hh_l0"])
    with pytest.raises(
        ValueError, match="expected 5 distinct characters for 5 rows of W_xh, got 3"
    ):
        fastrnn.load_torch(state, "abc")


# --- Generation through the model ---


def test_generate_stream_and_several_prefixes_agree(
    backend: Backend, corpus: fastrnn.Corpus
) -> None:
    trainer = make(corpus, backend)
    trainer.fit(10)
    model = trainer.model
    for how in ({}, {"temperature": 1.0, "top_k": 5, "seed": 4}):
        text = model.generate("我们", 12, **how)
        assert len(text) == 14
        assert text.startswith("我们")
        assert "我们" + "".join(model.stream("我们", 12, **how)) == text
        assert model.generate(["我们", "火车火"], 12, **how)[0] == text
    assert model.generate("我们", 0) == "我们"
    assert model.generate([], 5) == []


def test_bad_prefixes(corpus: fastrnn.Corpus) -> None:
    model = CharRNN(corpus.vocab, 5, "numpy")
    with pytest.raises(CorpusError, match="at least one character"):
        model.generate("", 5)
    with pytest.raises(CorpusError, match=re.escape("'🚀' (U+1F680)")):
        model.generate("我🚀", 5)
    with pytest.raises(CorpusError, match="not in the vocabulary"):
        model.stream("x")
    with pytest.raises(TypeError, match="prefix must be a string, got int"):
        model.generate([3], 5)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="num_chars must be at least 0, got -1"):
        model.generate("我", -1)


# --- Bad arguments ---


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"num_steps": 2.5}, TypeError, "num_steps must be an int, got float"),
        ({"sampling": "shuffled"}, ValueError, "unknown sampling 'shuffled'"),
        ({"lr": -1.0}, ValueError, "lr must be finite and > 0, got -1.0"),
        ({"clip_norm": 0.0}, ValueError, "clip_norm must be finite and > 0"),
        ({"lr_schedule": "linear"}, ValueError, "needs the length of the run"),
        ({"lr_schedule": None}, TypeError, "lr_schedule must be a string or an LRSchedule, got No"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": 1.7}, TypeError, "seed must be an int, got float"),
        ({"epochs": 2.5}, TypeError, "epochs must be an int, got float"),
        ({"val_fraction": 1.0}, ValueError, r"val_fraction must be in \[0, 1\)"),
        ({"batch_size": 5000}, CorpusError, "the text is too short"),
    ],
)
def test_bad_trainer_arguments(
    corpus: fastrnn.Corpus, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(corpus, **options)


def test_bad_model_arguments(corpus: fastrnn.Corpus) -> None:
    with pytest.raises(ValueError, match="hidden_size must be at least 1, got 0"):
        CharRNN(corpus.vocab, 0, "numpy")
    with pytest.raises(TypeError, match="dtype must be float32 or float64, got float16"):
        CharRNN(corpus.vocab, 4, "numpy", "float16")
    with pytest.raises(ValueError, match="unknown backend 'tpu': expected one of auto, cupy"):
        CharRNN(corpus.vocab, 4, "tpu")
    model = CharRNN(corpus.vocab, 4, "numpy")
    with pytest.raises(ValueError, match=r"W_hh must have shape \(4, 4\), got \(3, 3\)"):
        model.set_params({**model.params, "W_hh": np.zeros((3, 3), np.float32)})
    with pytest.raises(TypeError, match="b_h must be float32, got float64"):
        model.set_params({**model.params, "b_h": np.zeros(4)})
    with pytest.raises(ValueError, match="expected the parameters W_xh"):
        model.set_params({})


def test_another_vocabulary_is_refused(corpus: fastrnn.Corpus) -> None:
    model = CharRNN("abc", 4, "numpy")
    with pytest.raises(CorpusError, match="3 of the model"):
        Trainer(model, corpus)


@pytest.mark.parametrize("hidden_size", [1, 2])
def test_the_smallest_models_train(
    backend: Backend, corpus: fastrnn.Corpus, hidden_size: int
) -> None:
    trainer = make(corpus, backend, hidden_size=hidden_size, batch_size=1, num_steps=1, lr=1.0)
    assert trainer.run_epoch().perplexity < 60
