"""The headline configuration on the bundled corpus learns what it is expected to learn."""

from __future__ import annotations

import pytest

import fastrnn
from fastrnn.schedules import LRSchedule, default_hold

EPOCHS = 250


@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["consecutive", "random"])
def test_250_epochs_fall_below_perplexity_two_and_continue_with_phrases(sampling: str) -> None:
    """As ``fastrnn train`` runs: V=1027, H=256, B=32, T=35, the rate held and then falling."""
    corpus = fastrnn.load_corpus()
    assert len(corpus.vocab) == 1027
    model = fastrnn.CharRNN(corpus.vocab, hidden_size=256, backend="numba")
    schedule = LRSchedule("linear", 100.0, EPOCHS, default_hold(EPOCHS))
    trainer = fastrnn.Trainer(model, corpus, sampling=sampling, lr_schedule=schedule)
    stats = trainer.fit(EPOCHS)
    assert stats[0].perplexity > 500
    assert stats[-1].perplexity < 2.0
    text = corpus.vocab.decode(corpus.tokens)
    phrases = set(text.split())
    continuation = model.generate("分开", 50)
    assert continuation.startswith("分开")
    whole = continuation[len("分开") :].split()[1:-1]  # both ends may be parts of phrases
    known = [phrase for phrase in whole if phrase in phrases]
    assert len(known) >= 3, continuation
    assert len(known) >= len(whole) / 2, continuation
