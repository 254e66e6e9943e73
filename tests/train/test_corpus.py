"""Corpora: what is split, what is hashed, and that batches depend on nothing but (corpus, seed, step)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from towtank.train import corpus as corpora


def test_standard_library_is_large_split_by_tenth_and_stable() -> None:
    corpus = corpora.load()
    total = len(corpus.train) + len(corpus.heldout)
    assert total > 5_000_000 and corpus.files > 300
    assert len(corpus.heldout) / total == pytest.approx(0.1, abs=0.01)
    corpora.standard_library.cache_clear()
    assert corpora.load().digest == corpus.digest


def test_files_are_sorted_and_split_whole(tmp_path: Path) -> None:
    texts = {f"{name}.txt": bytes([97 + i]) * 100 for i, name in enumerate("zyxwvutsrqponmlkjihgfedcba"[:20])}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text)
    corpus = corpora.load(str(tmp_path))
    train, heldout = bytes(corpus.train), bytes(corpus.heldout)
    assert len(heldout) == 200 and len(train) == 1_800
    assert not set(train) & set(heldout)  # no file lies on both sides
    expected = b"".join(texts[n] for n in sorted(texts) if texts[n][0] not in heldout)
    assert train == expected


def test_same_text_by_file_folder_glob_and_list(tmp_path: Path) -> None:
    for i in range(12):
        (tmp_path / f"{i:02}.txt").write_text(f"file {i} " * 30)
    files = sorted(str(p) for p in tmp_path.iterdir())
    digests = {corpora.load(source).digest for source in (str(tmp_path), str(tmp_path / "*.txt"), files)}
    assert len(digests) == 1


def test_single_file_is_cut_and_one_changed_byte_changes_the_digest(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"0123456789" * 10)
    corpus = corpora.load(str(path))
    assert bytes(corpus.train) + bytes(corpus.heldout) == path.read_bytes() and len(corpus.heldout) == 10
    path.write_bytes(b"0123456788" + b"0123456789" * 9)
    assert corpora.load(str(path)).digest != corpus.digest


def test_token_files_of_nanogpt(tmp_path: Path) -> None:
    tokens = np.arange(1_000, dtype=np.uint16)
    tokens.tofile(tmp_path / "train.bin")
    alone = corpora.load(str(tmp_path / "train.bin"))
    assert alone.vocabulary == 1_000 and len(alone.heldout) == 100
    np.full(50, 1_023, dtype=np.uint16).tofile(tmp_path / "val.bin")
    pair = corpora.load(str(tmp_path / "train.bin"))
    assert len(pair.train) == 1_000 and len(pair.heldout) == 50 and pair.vocabulary == 1_024
    assert isinstance(pair.train, np.memmap)
    inputs, targets = corpora.batch(pair, 0, 0, size=3, context=5)
    assert (targets == inputs + 1).all()


def test_batches_are_a_pure_function_of_seed_and_step() -> None:
    corpus = corpora.load()
    first = corpora.batch(corpus, 3, 17, size=4, context=8)
    np.random.default_rng(0).random(100)
    corpora.batch(corpus, 1, 2, size=4, context=8)
    again = corpora.batch(corpus, 3, 17, size=4, context=8)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert (first[0] != corpora.batch(corpus, 3, 18, size=4, context=8)[0]).any()
    assert (first[0] != corpora.batch(corpus, 4, 17, size=4, context=8)[0]).any()
    assert (first[0][:, 1:] == first[1][:, :-1]).all()


def test_every_start_is_reachable() -> None:
    corpus = corpora.Corpus(np.arange(8, dtype=np.uint8), np.arange(8, dtype=np.uint8), 8, "x")
    seen = {int(row[0]) for step in range(200) for row in corpora.batch(corpus, 0, step, size=2, context=5)[0]}
    assert seen == {0, 1, 2}
    starts = [int(x[0, 0]) for x, _ in corpora.heldout_batches(corpus, batches=3, size=1, context=5)]
    assert starts == [0, 1, 2]


@pytest.mark.parametrize("name", ["missing.txt", "missing-*.txt", "missing.bin"])
def test_nothing_found_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        corpora.load(str(tmp_path / name))


def test_too_little_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "odd.bin").write_bytes(b"abc")
    with pytest.raises(ValueError, match="at least 20 bytes"):
        corpora.load(str(tmp_path / "a.txt"))
    with pytest.raises(ValueError, match="even number of bytes"):
        corpora.load(str(tmp_path / "odd.bin"))
    short = corpora.Corpus(np.zeros(8, np.uint8), np.zeros(8, np.uint8), 8, "x")
    with pytest.raises(ValueError, match="context"):
        corpora.batch(short, 0, 0, size=1, context=8)
