"""fastrnn: a kernel-optimised engine for the vanilla tanh RNN.

    corpus = fastrnn.load_corpus()
    model = fastrnn.CharRNN(corpus.vocab, hidden_size=256)
    trainer = fastrnn.Trainer(model, corpus, lr_schedule="linear", epochs=250)
    trainer.fit(250)
    print(model.generate("分开", 50))

The ops are in :mod:`fastrnn.ops`, the plain NumPy definition in :mod:`fastrnn.reference`.
"""

from fastrnn.backend import (
    Backend,
    BackendUnavailableError,
    DeviceMemoryError,
    available_backends,
    open_backend,
)
from fastrnn.checkpoint import CheckpointError
from fastrnn.corpus import Corpus, CorpusError, Vocab, corpus_from_text, load_corpus
from fastrnn.decoding import Decoding
from fastrnn.model import CharRNN, load, load_npz, load_torch
from fastrnn.schedules import LRSchedule
from fastrnn.trainer import DivergenceError, EpochStats, Trainer

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "BackendUnavailableError",
    "CharRNN",
    "CheckpointError",
    "Corpus",
    "CorpusError",
    "Decoding",
    "DeviceMemoryError",
    "DivergenceError",
    "EpochStats",
    "LRSchedule",
    "Trainer",
    "Vocab",
    "__version__",
    "available_backends",
    "corpus_from_text",
    "load",
    "load_corpus",
    "load_npz",
    "load_torch",
    "open_backend",
]
