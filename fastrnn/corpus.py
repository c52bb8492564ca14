"""From a text to tokens, and from tokens to batches as start offsets.

    load_corpus(path) -> Corpus(vocab, tokens) -- batch_starts --> int32 [n, B] offsets into tokens

A batch is ``B`` start offsets: row ``b`` covers ``tokens[start[b] : start[b] + T]`` and its targets
lie one character to the right. Both ways of sampling differ in the offsets alone.
"""

from __future__ import annotations

import codecs
import io
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

_HERE = Path(__file__).parent
DATA = next((d for d in (_HERE / "data", _HERE.parent / "data") if d.is_dir()), _HERE / "data")
BUNDLED_CORPUS = DATA / "lyrics.zip"

SAMPLINGS = ("consecutive", "random")

_CHUNK_BYTES = 1 << 20
_CODE_POINTS = 0x110000
_BOMB_BYTES = 64 << 20
_BOMB_RATIO = 200  # text deflates 2-10 times, DEFLATE can reach 1032


class CorpusError(ValueError):
    """A text that cannot be used as a corpus; the message says what was expected and what came."""


class Vocab(Sequence[str]):
    """The distinct characters of a text, sorted by code point.

    ``vocab[i]`` is a character, ``len(vocab)`` the vocabulary size V.
    """

    def __init__(self, chars: Iterable[str]) -> None:
        self.chars: tuple[str, ...] = tuple(sorted(set(chars)))
        if not self.chars:
            raise CorpusError("a vocabulary needs at least one character, got none")
        for char in self.chars:
            if not isinstance(char, str) or len(char) != 1:
                raise CorpusError(f"a vocabulary is made of single characters, got {char!r}")
        self.char_to_idx: dict[str, int] = {char: i for i, char in enumerate(self.chars)}

    def __len__(self) -> int:
        return len(self.chars)

    def __getitem__(self, index: Any) -> Any:
        return self.chars[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocab) and self.chars == other.chars

    def __hash__(self) -> int:
        return hash(self.chars)

    def __repr__(self) -> str:
        return f"Vocab({len(self)} characters)"

    def encode(self, text: str) -> NDArray[np.int32]:
        """Tokens int32 ``[len(text)]``.

        Raises:
            CorpusError: characters that are not in the vocabulary, named.
        """
        unknown = sorted(set(text) - self.char_to_idx.keys())
        if unknown:
            named = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in unknown[:8])
            more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
            raise CorpusError(
                f"not in the vocabulary of {len(self)} characters: {named}{more}; "
                "use characters that occur in the training text"
            )
        return np.array([self.char_to_idx[c] for c in text], dtype=np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of ``tokens``."""
        return "".join(self.chars[i] for i in tokens)


@dataclass(frozen=True)
class Corpus:
    """A tokenised text.

    Attributes:
        vocab: its vocabulary. tokens: int32 ``[N]``, read-only. name: where it came from.

    Raises:
        CorpusError: tokens that are not a row of integers in ``[0, V)``.
    """

    vocab: Vocab
    tokens: NDArray[np.int32]
    name: str = "text"

    def __post_init__(self) -> None:
        tokens = np.asarray(self.tokens)
        if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
            raise CorpusError(
                f"tokens must be integers of shape [N], got {tokens.dtype} {list(tokens.shape)}"
            )
        if tokens.size:
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= len(self.vocab):
                raise CorpusError(
                    f"tokens must be in [0, {len(self.vocab)}), the vocabulary, "
                    f"got {low if low < 0 else high}"
                )
        object.__setattr__(self, "tokens", np.ascontiguousarray(tokens, np.int32))

    def __len__(self) -> int:
        return len(self.tokens)

    def split(self, fraction: float) -> tuple[Corpus, Corpus]:
        """Cut off the last ``fraction`` of the text for validation; the vocabulary stays shared."""
        if not 0.0 < fraction < 1.0:
            raise ValueError(f"the validation fraction must be in (0, 1), got {fraction!r}")
        cut = len(self) - max(1, round(len(self) * fraction))
        return (
            Corpus(self.vocab, self.tokens[:cut], self.name),
            Corpus(self.vocab, self.tokens[cut:], f"{self.name} (validation)"),
        )


# --- Batches ---------------------------------------------------------------------------------


def num_batches(num_tokens: int, batch_size: int, num_steps: int, sampling: str) -> int:
    """Batches in an epoch; 0 where the text is too short for one."""
    if sampling == "random":
        return max(0, num_tokens - 1) // num_steps // batch_size
    return max(0, num_tokens // batch_size - 1) // num_steps


def batch_starts(
    num_tokens: int,
    batch_size: int,
    num_steps: int,
    sampling: str,
    *,
    seed: int = 0,
    epoch: int = 0,
) -> NDArray[np.int32]:
    """The start offsets of an epoch's batches, int32 ``[n, B]``.

    consecutive: row ``b`` walks through the ``b``-th of B equal parts of the text. random: the
    examples ``0, T, 2T, …`` in an order that is a function of ``(seed, epoch)`` alone, so an epoch
    can be repeated or resumed without the epochs before it.

    Raises:
        CorpusError: the text is shorter than one batch.
    """
    T, B = num_steps, batch_size
    n = num_batches(num_tokens, B, T, sampling)
    if n == 0:
        raise too_short(num_tokens, B, T, sampling)
    if sampling == "random":
        order = np.random.default_rng([seed, epoch]).permutation((num_tokens - 1) // T)
        return (order[: n * B].reshape(n, B) * T).astype(np.int32)
    rows = np.arange(B, dtype=np.int32) * (num_tokens // B)
    return rows[None, :] + (np.arange(n, dtype=np.int32) * T)[:, None]


def too_short(num_tokens: int, batch_size: int, num_steps: int, sampling: str) -> CorpusError:
    """The error for a text that does not hold one batch."""
    T, B = num_steps, batch_size
    needed = T * B + 1 if sampling == "random" else (T + 1) * B
    return CorpusError(
        f"the text is too short: {sampling} batches of batch_size={B} rows of num_steps={T} need "
        f"at least {needed:,} characters, got {num_tokens:,}; lower batch_size or num_steps"
    )


_PACKED = {
    "a damaged zip": b"PK\x03\x04",
    "a gzip file; unpack it first": b"\x1f\x8b",
    "an xz file; unpack it first": b"\xfd7zXZ",
    "a bzip2 file; unpack it first": b"BZh",
}


# --- Loading ---------------------------------------------------------------------------------


def load_corpus(path: str | Path | None = None, max_chars: int | None = 10_000) -> Corpus:
    """Load a UTF-8 text, plain or the only member of a zip; None loads the bundled lyrics.

    ``\\n`` and ``\\r`` become spaces, a byte-order mark is dropped, and the first ``max_chars``
    characters are kept (None: all). The text is read in chunks; memory peaks at about eight bytes
    a character.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: as the operating system says.
        CorpusError: an empty text, not UTF-8 (with the byte offset), a zip with no or several
            members, encrypted, damaged, or one that unpacks to an implausible size.
    """
    _check_max_chars(max_chars)
    source = Path(BUNDLED_CORPUS if path is None else path)
    if not source.exists():
        raise FileNotFoundError(f"no such corpus: {source}")
    if source.is_dir():
        raise IsADirectoryError(f"a corpus is a .txt or .zip file, {source} is a directory")
    with _open_text(source) as stream:
        parts = list(_code_points(stream, source, max_chars))
    points = np.concatenate(parts) if parts else np.empty(0, np.uint32)
    parts.clear()
    if len(points) == 0:
        raise CorpusError(f"{source} is empty: a corpus needs at least one character")
    return _tokenise(points, str(source) if path is not None else "bundled lyrics")


def corpus_from_text(text: str, max_chars: int | None = None, name: str = "text") -> Corpus:
    """A corpus from a string, treated as :func:`load_corpus` treats a file."""
    _check_max_chars(max_chars)
    text = text.removeprefix("\ufeff")
    if not text:
        raise CorpusError("a corpus needs at least one character, got an empty string")
    try:
        points = np.frombuffer(text[:max_chars].encode("utf-32-le"), np.uint32)
    except UnicodeEncodeError as error:
        raise CorpusError(f"{name} holds a lone surrogate at character {error.start}") from None
    return _tokenise(_flatten(points), name)


def _check_max_chars(max_chars: int | None) -> None:
    if max_chars is not None and max_chars < 1:
        raise ValueError(f"max_chars must be at least 1 or None, got {max_chars!r}")


def _flatten(points: NDArray[np.uint32]) -> NDArray[np.uint32]:
    return np.where((points == ord("\n")) | (points == ord("\r")), np.uint32(ord(" ")), points)


def _tokenise(points: NDArray[np.uint32], name: str) -> Corpus:
    """Replace code points by their rank among those that occur, chunk by chunk and in place."""
    seen = np.zeros(_CODE_POINTS, bool)
    chunks = [points[i : i + _CHUNK_BYTES] for i in range(0, len(points), _CHUNK_BYTES)]
    for chunk in chunks:
        seen[chunk] = True
    vocab = Vocab(map(chr, np.flatnonzero(seen)))
    rank = (np.cumsum(seen) - 1).astype(np.uint32)
    for chunk in chunks:
        chunk[:] = rank[chunk]
    tokens = points.view(np.int32)
    tokens.flags.writeable = False
    return Corpus(vocab, tokens, name)


@contextmanager
def _open_text(source: Path) -> Iterator[IO[bytes]]:
    """The bytes of a plain file or of the only member of a zip (recognised by its content)."""
    with source.open("rb") as opened:
        # A pipe cannot be searched for a zip's end.
        file: IO[bytes] = opened if opened.seekable() else io.BytesIO(opened.read())
        if not zipfile.is_zipfile(file):
            file.seek(0)
            yield file
            return
        try:
            with zipfile.ZipFile(file) as archive, archive.open(_member(archive, source)) as member:
                yield member
        except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError) as error:
            raise CorpusError(f"{source} is a damaged or unsupported zip: {error}") from error


def _member(archive: zipfile.ZipFile, source: Path) -> zipfile.ZipInfo:
    # A Mac adds a shadow of every file.
    files = (info for info in archive.infolist() if not info.is_dir())
    members = [info for info in files if not info.filename.startswith("__MACOSX/")]
    if len(members) != 1:
        names = ", ".join(info.filename for info in members[:5]) or "none"
        raise CorpusError(
            f"{source} must hold exactly one text file, got {len(members)} members ({names})"
        )
    (info,) = members
    if info.flag_bits & 0x1:
        raise CorpusError(f"{source}: {info.filename} is encrypted; unpack it first")
    if info.file_size > _BOMB_BYTES and info.file_size > _BOMB_RATIO * max(1, info.compress_size):
        raise CorpusError(
            f"{source}: {info.filename} claims to unpack from {info.compress_size:,} to "
            f"{info.file_size:,} bytes, which no text does; unpack it by hand if you trust it"
        )
    return info


def _code_points(
    stream: IO[bytes], source: Path, max_chars: int | None
) -> Iterator[NDArray[np.uint32]]:
    """Decode a stream chunk by chunk into flattened code points, at most ``max_chars`` in all."""
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    offset, left, first = 0, max_chars, True
    while left is None or left > 0:
        data = stream.read(_CHUNK_BYTES)
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            where = offset - pending + error.start
            bad = error.object[error.start]
            packed = next((k for k, magic in _PACKED.items() if error.object.startswith(magic)), "")
            if packed and offset == 0:
                raise CorpusError(f"{source} is no text: it looks like {packed}") from None
            raise CorpusError(
                f"{source} is not UTF-8: byte 0x{bad:02x} at offset {where:,} ({error.reason}); "
                "convert it to UTF-8 first"
            ) from None
        offset += len(data)
        if first and text:
            text, first = text.removeprefix("\ufeff"), False
        text = text[:left]
        left = None if left is None else left - len(text)
        if text:
            yield _flatten(np.frombuffer(text.encode("utf-32-le"), np.uint32))
        if not data:
            return
