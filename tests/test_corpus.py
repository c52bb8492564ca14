"""Loading texts: the bundled corpus, encodings, zips, errors, memory; and batches as offsets."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastrnn import Corpus, CorpusError, Vocab, corpus_from_text, load_corpus, reference
from fastrnn.corpus import BUNDLED_CORPUS, batch_starts, num_batches


def write(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def write_zip(path: Path, members: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return path


# --- The bundled corpus ---


def test_bundled_corpus_has_the_headline_size() -> None:
    corpus = load_corpus()
    assert len(corpus) == 10_000
    assert len(corpus.vocab) == 1_027
    assert corpus.tokens.dtype == np.int32
    text = corpus.vocab.decode(corpus.tokens)
    assert "\n" not in text
    assert text.count("分开") >= 6
    assert text.count("不分开") >= 6
    assert len(load_corpus(max_chars=None)) >= 12_000


def test_bundled_corpus_agrees_with_the_oracle() -> None:
    with zipfile.ZipFile(BUNDLED_CORPUS) as archive:
        (name,) = archive.namelist()
        text = reference.load_text(archive.read(name).decode())
    corpus = load_corpus()
    np.testing.assert_array_equal(corpus.tokens, text.tokens)
    assert list(corpus.vocab) == text.idx_to_char


# --- Users' texts ---


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60))
def test_any_text_survives(text: str) -> None:
    corpus = corpus_from_text(text)
    assert corpus.vocab.decode(corpus.tokens) == text.replace("\n", " ").replace("\r", " ")
    np.testing.assert_array_equal(corpus.tokens, reference.load_text(text, None).tokens)


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
def test_file_and_zip_hold_the_same_text(tmp_path: Path, bom: bytes) -> None:
    text = "一只🐈\r\n在 the roof\n" * 3
    plain = write(tmp_path / "a.txt", bom + text.encode())
    write_zip(tmp_path / "a.zip", {"a.txt": text, "__MACOSX/._a.txt": "a Mac's shadow of it"})
    want = corpus_from_text(text)
    for path in (plain, tmp_path / "a.zip"):
        corpus = load_corpus(path)
        assert corpus.vocab == want.vocab
        np.testing.assert_array_equal(corpus.tokens, want.tokens)


def test_characters_split_between_chunks(tmp_path: Path) -> None:
    text = "a" + "歌" * 800_000  # 2.4 MB: chunk borders fall inside characters
    corpus = load_corpus(write(tmp_path / "long.txt", text), max_chars=None)
    assert len(corpus) == 800_001
    assert corpus.vocab.chars == ("a", "歌")
    assert corpus.tokens.sum() == 800_000


def test_max_chars_counts_characters(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "歌词好听")
    assert len(load_corpus(path, max_chars=3)) == 3
    assert load_corpus(path, max_chars=3).vocab.decode([0, 1, 2]) == "".join(sorted("歌词好"))
    with pytest.raises(ValueError, match="max_chars must be at least 1 or None, got 0"):
        load_corpus(path, max_chars=0)


def test_one_character(tmp_path: Path) -> None:
    assert len(load_corpus(write(tmp_path / "one.txt", "x"))) == 1


# --- Errors ---


def test_a_string_is_treated_as_a_file_is() -> None:
    assert corpus_from_text("\ufeffab\n").vocab.chars == (" ", "a", "b")
    for text in ("", "\ufeff"):
        with pytest.raises(CorpusError, match="got an empty string"):
            corpus_from_text(text)
    with pytest.raises(ValueError, match="max_chars must be at least 1 or None, got -1"):
        corpus_from_text("ab", max_chars=-1)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such corpus"):
        load_corpus(tmp_path / "none.txt")
    with pytest.raises(IsADirectoryError, match="is a directory"):
        load_corpus(tmp_path)


@pytest.mark.parametrize("data", [b"", b"\xef\xbb\xbf"], ids=["empty", "only a bom"])
def test_empty_file(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(CorpusError, match="is empty: a corpus needs at least one character"):
        load_corpus(write(tmp_path / "empty.txt", data))


@pytest.mark.parametrize("offset", [0, 5, (1 << 20) - 1, (1 << 20) + 3])
def test_not_utf8_names_the_byte(tmp_path: Path, offset: int) -> None:
    path = write(tmp_path / "gbk.txt", b"a" * offset + b"\xb7\xd6\xbf\xaa")
    with pytest.raises(CorpusError, match=f"not UTF-8: byte 0xb7 at offset {offset:,} "):
        load_corpus(path, max_chars=None)


def test_truncated_utf8_at_the_end(tmp_path: Path) -> None:
    path = write(tmp_path / "cut.txt", "ab歌".encode()[:-1])
    with pytest.raises(CorpusError, match="byte 0xe6 at offset 2 "):
        load_corpus(path)


@pytest.mark.parametrize("members", [{}, {"a.txt": "a", "b.txt": "b"}], ids=["none", "several"])
def test_zip_without_exactly_one_member(tmp_path: Path, members: dict[str, str]) -> None:
    path = write_zip(tmp_path / "z.zip", members)
    with pytest.raises(CorpusError, match=f"exactly one text file, got {len(members)} members"):
        load_corpus(path)


def test_encrypted_zip(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "z.zip", {"a.txt": "secret"})
    data = bytearray(path.read_bytes())
    data[6] |= 1  # general-purpose flag of the local header
    data[data.index(b"PK\x01\x02") + 8] |= 1  # and of the central directory
    with pytest.raises(CorpusError, match="is encrypted"):
        load_corpus(write(path, bytes(data)))


def test_bomb_like_zip(tmp_path: Path) -> None:
    path = tmp_path / "bomb.zip"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("bomb.txt", "w") as member,
    ):
        for _ in range(80):
            member.write(b"0" * (1 << 20))
    with pytest.raises(CorpusError, match="which no text does"):
        load_corpus(path)


def test_damaged_zip(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "z.zip", {"a.txt": "歌词" * 500})
    data = bytearray(path.read_bytes())
    data[45:55] = bytes(10)
    with pytest.raises(CorpusError, match="damaged"):
        load_corpus(write(path, bytes(data)))


def test_memory_of_a_large_text_is_bounded(tmp_path: Path) -> None:
    """Peak memory over the interpreter's own, for a 32 MB text, stays below ten times its size."""
    path = tmp_path / "large.txt"
    with path.open("wb") as file:
        for i in range(32):
            file.write(bytes(32 + (i + j) % 90 for j in range(1 << 10)) * (1 << 10))
    script = (
        "import resource, sys, fastrnn\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10\n"
        "before = peak(); n = len(fastrnn.load_corpus(sys.argv[1], max_chars=None))\n"
        "print(n, peak() - before)"
    )
    out = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ).stdout
    size, peak = map(int, out.split())
    assert size == 32 << 20
    assert peak < 10 * size


# --- Vocabulary ---


def test_vocab_round_trip_and_unknown_characters() -> None:
    vocab = Vocab("分开不")
    assert list(vocab) == sorted("分开不")
    assert vocab.decode(vocab.encode("不分开")) == "不分开"
    with pytest.raises(
        CorpusError, match=r"not in the vocabulary of 3 characters: 'x' \(U\+0078\)"
    ):
        vocab.encode("不x")
    with pytest.raises(CorpusError, match="at least one character"):
        Vocab("")


# --- Batches ---


@pytest.mark.parametrize("sampling", ["consecutive", "random"])
@given(N=st.integers(2, 400), B=st.integers(1, 6), T=st.integers(1, 9), epoch=st.integers(0, 3))
def test_batches_are_those_of_the_oracle(sampling: str, N: int, B: int, T: int, epoch: int) -> None:
    tokens = np.arange(N, dtype=np.int32)
    if sampling == "random":
        rng = np.random.default_rng([7, epoch])
        want = list(reference.data_iter_random(tokens, B, T, rng))
    else:
        want = list(reference.data_iter_consecutive(tokens, B, T))
    assert num_batches(N, B, T, sampling) == len(want)
    if not want:
        with pytest.raises(CorpusError, match="the text is too short"):
            batch_starts(N, B, T, sampling)
        return
    starts = batch_starts(N, B, T, sampling, seed=7, epoch=epoch)
    assert starts.dtype == np.int32
    assert len(starts) == len(want)
    for row, (X, Y) in zip(starts, want, strict=True):
        index = row[None, :] + np.arange(T)[:, None]
        np.testing.assert_array_equal(tokens[index], X)
        np.testing.assert_array_equal(tokens[index + 1], Y)


def test_too_short_says_what_is_needed() -> None:
    with pytest.raises(CorpusError, match="need at least 1,152 characters, got 1,151"):
        batch_starts(1151, 32, 35, "consecutive")
    assert len(batch_starts(1152, 32, 35, "consecutive")) == 1
    with pytest.raises(CorpusError, match="need at least 1,121 characters, got 1,120"):
        batch_starts(1120, 32, 35, "random")
    assert len(batch_starts(1121, 32, 35, "random")) == 1


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([0, 1, 5], r"tokens must be in \[0, 3\), the vocabulary, got 5"),
        ([0, -1], r"got -1"),
        ([[0, 1]], r"shape \[N\], got int64 \[1, 2\]"),
        ([0.5], "must be integers"),
    ],
)
def test_tokens_outside_the_vocabulary_are_refused(tokens: Any, message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        Corpus(Vocab("abc"), np.array(tokens))
    assert Corpus(Vocab("abc"), np.array([2, 0], np.uint8)).tokens.dtype == np.int32


def test_split_keeps_the_vocabulary() -> None:
    train, validation = load_corpus().split(0.1)
    assert len(train) == 9_000
    assert len(validation) == 1_000
    assert train.vocab is validation.vocab
    with pytest.raises(ValueError, match=r"in \(0, 1\)"):
        load_corpus().split(1.0)
