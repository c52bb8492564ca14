"""The character-level RNN language model: parameters on a backend, generation, persistence."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from fastrnn import interchange, reference
from fastrnn.backend import Array, Backend, Dims, open_backend
from fastrnn.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from fastrnn.checks import count, positive_int
from fastrnn.corpus import CorpusError, Vocab
from fastrnn.decoding import Decoding
from fastrnn.reference import PARAM_NAMES

DTYPES = ("float32", "float64")


class CharRNN:
    """A vanilla tanh RNN over characters.

        Z_t = W_xh[x_t] + H_{t-1} W_hh + b_h,   H_t = tanh(Z_t),   O_t = H_t W_hq + b_q

    Args:
        vocab: the characters, a :class:`fastrnn.Vocab` (or any iterable of characters); V of them.
        hidden_size: H >= 1.
        backend: a name (see :func:`fastrnn.open_backend`) or an opened :class:`fastrnn.Backend`.
        dtype: "float32" or "float64".
        seed: of the initial weights N(0, 0.01²); the same on every backend.
        params: start from these instead, NumPy arrays by name.

    Raises:
        ValueError, TypeError: a size, dtype or parameter that does not fit, named.
        BackendUnavailableError: the backend cannot run here.
    """

    def __init__(
        self,
        vocab: Vocab | Sequence[str],
        hidden_size: int = 256,
        backend: str | Backend = "auto",
        dtype: Any = "float32",
        seed: int = 0,
        *,
        params: Mapping[str, NDArray[Any]] | None = None,
    ) -> None:
        self.vocab = vocab if isinstance(vocab, Vocab) else Vocab(vocab)
        self.hidden_size = positive_int("hidden_size", hidden_size)
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        if self.dtype.name not in DTYPES:
            raise TypeError(f"dtype must be float32 or float64, got {self.dtype}")
        self.backend = open_backend(backend) if isinstance(backend, str) else backend
        if self.dtype.type not in self.backend.dtypes:
            known = ", ".join(np.dtype(d).name for d in self.backend.dtypes)
            raise TypeError(
                f"the {self.backend.name} backend computes in {known}, got {self.dtype}; "
                "the numba and numpy backends take both"
            )
        if params is None:
            seed = count("seed", seed)
            params = reference.init_params(len(self.vocab), self.hidden_size, seed, self.dtype)
        self.arrays: dict[str, Array] = {}
        self.set_params(params)

    def __repr__(self) -> str:
        return (
            f"CharRNN(V={len(self.vocab)}, H={self.hidden_size}, {self.dtype}, "
            f"backend={self.backend.name!r}, {self.num_parameters:,} parameters)"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy's parameters travel on the host, to another process too.
        rebuild = functools.partial(type(self), params=self.params)
        return rebuild, (self.vocab, self.hidden_size, self.backend, self.dtype.name)

    # --- parameters ---

    @property
    def num_parameters(self) -> int:
        """The number of trainable values."""
        return sum(int(np.prod(shape)) for shape in self._shapes.values())

    @property
    def params(self) -> dict[str, NDArray[Any]]:
        """Copies of the parameters on the host, by name: W_xh, W_hh, b_h, W_hq, b_q."""
        return {name: self.backend.get(self.arrays[name]) for name in PARAM_NAMES}

    def set_params(self, params: Mapping[str, NDArray[Any]]) -> None:
        """Replace all parameters by the given NumPy arrays.

        Raises:
            ValueError: a name missing or unknown, or a wrong shape. TypeError: a wrong dtype.
        """
        if set(params) != set(PARAM_NAMES):
            raise ValueError(
                f"expected the parameters {', '.join(PARAM_NAMES)}, got {', '.join(params)}"
            )
        for name, shape in self._shapes.items():
            array = np.asarray(params[name])
            if array.shape != shape:
                raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
            if array.dtype != self.dtype:
                raise TypeError(f"{name} must be {self.dtype}, got {array.dtype}")
        self.arrays = {name: self.backend.put(np.asarray(params[name])) for name in PARAM_NAMES}

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return Dims(1, 1, self.hidden_size, len(self.vocab), self.dtype).param_shapes

    # --- generation ---

    @overload
    def generate(self, prefix: str, num_chars: int = 50, **decoding: Any) -> str: ...
    @overload
    def generate(
        self, prefix: Sequence[str], num_chars: int = 50, **decoding: Any
    ) -> list[str]: ...

    def generate(
        self, prefix: str | Sequence[str], num_chars: int = 50, **decoding: Any
    ) -> str | list[str]:
        """Continue a prefix, or several at once, by ``num_chars`` characters each.

        Args:
            prefix: a non-empty string of known characters, or a list of such strings.
            num_chars: characters to produce, >= 0.
            **decoding: ``temperature=0.0`` (greedy), ``top_k=0``, ``top_p=1.0``, ``seed=0``; see
                :class:`fastrnn.Decoding`. A list's strings draw from streams of their own.

        Returns:
            Each prefix followed by its continuation.
        """
        prefixes = [prefix] if isinstance(prefix, str) else list(prefix)
        how = Decoding(**decoding)
        count("num_chars", num_chars)
        tokens, lengths = self._encode(prefixes)
        texts = prefixes
        if prefixes and num_chars > 0:
            produced, _ = self.backend.generate(self.arrays, tokens, lengths, num_chars, how)
            texts = [p + self.vocab.decode(row) for p, row in zip(prefixes, produced, strict=True)]
        return texts[0] if isinstance(prefix, str) else texts

    def stream(self, prefix: str, num_chars: int | None = None, **decoding: Any) -> Iterator[str]:
        """Yield the continuation of ``prefix`` character by character; None goes on for ever.

        The characters are those of :meth:`generate` with the same arguments. The prefix itself is
        not yielded. Arguments as in :meth:`generate`; they are checked before the first character.
        """
        how = Decoding(**decoding)
        if num_chars is not None:
            count("num_chars", num_chars)
        tokens, lengths = self._encode([prefix])
        return self._stream(tokens, lengths, num_chars, how)

    def _stream(
        self, tokens: Any, lengths: Any, num_chars: int | None, decoding: Decoding
    ) -> Iterator[str]:
        state = None
        positions = itertools.count() if num_chars is None else range(num_chars)
        for position in positions:
            tokens, state = self.backend.generate(
                self.arrays, tokens, lengths, 1, decoding, h0=state, position=position
            )
            lengths = np.ones(1, np.int32)
            yield self.vocab[int(tokens[0, 0])]

    def _encode(self, prefixes: list[str]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Right-padded tokens ``[S, P]`` and lengths ``[S]``."""
        rows = []
        for text in prefixes:
            if not isinstance(text, str):
                raise TypeError(f"a prefix must be a string, got {type(text).__name__}")
            if not text:
                raise CorpusError("a prefix needs at least one character, got an empty string")
            rows.append(self.vocab.encode(text))
        lengths = np.array([len(row) for row in rows], dtype=np.int32)
        tokens = np.zeros((len(rows), max(lengths, default=0)), dtype=np.int32)
        for padded, row in zip(tokens, rows, strict=True):
            padded[: len(row)] = row
        return tokens, lengths

    # --- persistence ---

    def save(self, path: str | Path) -> None:
        """Write weights, vocabulary and configuration to one safetensors file, atomically."""
        save_checkpoint(path, self.params, {"model": self.config})

    def save_npz(self, path: str | Path) -> None:
        """Write the tutorial's five arrays to an ``.npz`` file, atomically; no vocabulary."""
        interchange.save_tutorial(path, self.params)

    def to_torch(self) -> dict[str, Any]:
        """A torch state dict for a module that holds ``rnn = nn.RNN`` and ``linear = nn.Linear``.

        The tensors are copies on the CPU; :class:`fastrnn.torch.CharRNN` and any such module of
        torch's own layers load it.

        Raises:
            ImportError: torch is not installed.
        """
        import torch

        state = interchange.to_torch_names(self.params)
        return {name: torch.from_numpy(array) for name, array in state.items()}

    @property
    def config(self) -> dict[str, Any]:
        """What a checkpoint's header says of the model."""
        return {
            "hidden_size": self.hidden_size,
            "dtype": self.dtype.name,
            "vocab": "".join(self.vocab.chars),
        }


def load(path: str | Path, backend: str | Backend = "auto", *, best: bool = False) -> CharRNN:
    """Load a model from a file written by :meth:`CharRNN.save` or :meth:`fastrnn.Trainer.save`.

    Args:
        best: take the best weights that the trainer had seen instead of its last ones.

    Raises:
        FileNotFoundError: no such file. CheckpointError: not a checkpoint, damaged, or newer.
        BackendUnavailableError: the backend cannot run here.
    """
    tensors, header = load_checkpoint(path)
    if best:
        if "best.W_hh" not in tensors:
            raise CheckpointError(f"{path} holds no best weights: it was written by CharRNN.save")
        tensors = {name: tensors[f"best.{name}"] for name in PARAM_NAMES}
    return model_from_checkpoint(path, tensors, header, backend)


def load_torch(
    state_dict: Mapping[str, Any],
    vocab: Vocab | Sequence[str] | None = None,
    backend: str | Backend = "auto",
    **prefixes: str,
) -> CharRNN:
    """A model from the state dict of a torch module with an ``nn.RNN`` and an ``nn.Linear``.

    Args:
        state_dict: torch tensors or NumPy arrays by torch's names; see
            :func:`fastrnn.interchange.from_torch_names`.
        vocab: the characters in the order of the module's token ids. None: token ``i`` is
            ``chr(i)``, as in programs that tokenise with ``ord``.
        backend: as for :class:`CharRNN`.
        **prefixes: ``rnn="rnn."`` and ``output="linear."``, where they cannot be found.
    """
    return _model_of(interchange.from_torch_names(state_dict, **prefixes), vocab, backend)


def load_npz(
    path: str | Path, vocab: Vocab | Sequence[str] | None = None, backend: str | Backend = "auto"
) -> CharRNN:
    """A model from an ``.npz`` file of the tutorial's five arrays; ``vocab`` as in load_torch."""
    return _model_of(interchange.load_tutorial(path), vocab, backend)


def _model_of(
    params: Mapping[str, NDArray[Any]],
    vocab: Vocab | Sequence[str] | None,
    backend: str | Backend,
) -> CharRNN:
    """A model of ``params`` whose token ids are in the order of ``vocab``, brought into ours."""
    V = len(params["W_xh"])
    chars = [chr(i) for i in range(V)] if vocab is None else list(vocab)
    if len(chars) != V or len(set(chars)) != V:
        raise ValueError(
            f"expected {V} distinct characters for {V} rows of W_xh, got {len(chars)}, "
            f"{len(set(chars))} of them distinct"
        )
    order = np.argsort(np.array([ord(c) for c in chars]), kind="stable")
    ordered = dict(params)
    ordered["W_xh"] = params["W_xh"][order]
    ordered["W_hq"] = params["W_hq"][:, order]
    ordered["b_q"] = params["b_q"][order]
    W_hh = params["W_hh"]
    return CharRNN(Vocab(chars), len(W_hh), backend, W_hh.dtype, params=ordered)


def model_from_checkpoint(
    path: str | Path,
    tensors: Mapping[str, NDArray[Any]],
    header: Mapping[str, Any],
    backend: str | Backend,
) -> CharRNN:
    """Build the model that a checkpoint's tensors and header describe."""
    if isinstance(backend, str):  # what is wrong with it is not the checkpoint's fault
        backend = open_backend(backend)
    try:
        config = header["model"]
        return CharRNN(
            Vocab(config["vocab"]),
            config["hidden_size"],
            backend,
            config["dtype"],
            params={name: tensors[name] for name in PARAM_NAMES},
        )
    except ImportError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not hold a complete model: {error}") from error
