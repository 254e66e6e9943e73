"""Text as tokens, without a download: the source of the standard library, the user's text, or nanoGPT's `.bin` files."""

from __future__ import annotations

import glob
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

HELDOUT_SHARE = 0.1
BYTES = 256
_SKIPPED = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3", "turtledemo"}
)


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokens to train on and tokens held out.

    Args:
        train: token ids, one dimension; uint8 for bytes, uint16 for nanoGPT's files (may be a memory map).
        heldout: token ids never trained on.
        vocabulary: number of distinct ids a model needs.
        digest: hash of the tokens and of the split; part of the identity of every run.
        files: number of files behind it.
    """

    train: np.ndarray
    heldout: np.ndarray
    vocabulary: int
    digest: str
    files: int = 0

    def __repr__(self) -> str:
        return f"Corpus({len(self.train)} + {len(self.heldout)} tokens of {self.vocabulary}, {self.digest})"


def load(source: str | Sequence[str] = "builtin") -> Corpus:
    """The corpus a name, a path or a list of paths stands for.

    Args:
        source: `builtin`; a folder or a file of text; a glob; a nanoGPT `train.bin` (held out: `val.bin` beside it, or its
            last tenth); or a list of text files, folders and globs.

    Raises:
        FileNotFoundError: if nothing is found.
        ValueError: if what is found is too short to split.

    Example:
        >>> load("builtin").vocabulary
        256
    """
    if source == "builtin":
        return standard_library()
    names = [source] if isinstance(source, str) else list(source)
    if len(names) == 1 and names[0].endswith(".bin"):
        return from_bin(Path(names[0]))
    return from_text(names)


@lru_cache(maxsize=1)
def standard_library() -> Corpus:
    """Source of the Python standard library that runs this: about 11 MB of text on every machine."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(p for p in root.rglob("*.py") if not _SKIPPED.intersection(p.relative_to(root).parts))
    return _split(paths, "the standard library")


def from_text(names: Iterable[str]) -> Corpus:
    """Bytes of text files, split by file.

    Args:
        names: files, folders (every file below them) and globs.

    Raises:
        FileNotFoundError: for a name that matches no file.
        ValueError: if there are fewer bytes than a split needs.
    """
    paths: dict[Path, None] = {}
    for name in names:
        found = list(_matches(name))
        if not found:
            raise FileNotFoundError(
                f"corpus = {name!r}: expected a file, a folder or a glob that matches files, found none"
            )
        paths.update(dict.fromkeys(found))
    return _split(sorted(paths), ", ".join(names))


def from_bin(path: Path) -> Corpus:
    """Tokens in nanoGPT's form: raw uint16, memory-mapped; `val.bin` beside `train.bin` is held out.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if its size is odd or too small.
    """
    if not path.is_file():
        raise FileNotFoundError(f"corpus = {str(path)!r}: expected a file of uint16 tokens, found none")
    train = _memmap(path)
    sibling = path.with_name("val.bin")
    if path.name == "train.bin" and sibling.is_file():
        heldout, files = _memmap(sibling), 2
    else:
        cut = int(len(train) * (1 - HELDOUT_SHARE))
        train, heldout, files = train[:cut], train[cut:], 1
    if min(len(train), len(heldout)) < 2:
        raise ValueError(f"corpus = {str(path)!r}: expected at least 20 tokens, got {len(train) + len(heldout)}")
    vocabulary = int(max(train.max(), heldout.max())) + 1
    return Corpus(train, heldout, vocabulary, _digest(train, heldout), files)


def batch(corpus: Corpus, seed: int, step: int, *, size: int, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Random windows of the training tokens: a pure function of (corpus, seed, step).

    Args:
        corpus: where the tokens come from.
        seed: seed of the run.
        step: number of updates already made.
        size: B, windows.
        context: T, tokens in a window.

    Returns:
        Inputs and targets (the inputs shifted by one), each int64 of shape (B, T).

    Raises:
        ValueError: if the corpus is shorter than a window.
    """
    last = len(corpus.train) - context
    if last < 1:
        raise ValueError(f"context = {context}: expected fewer than the corpus' {len(corpus.train)} training tokens")
    starts = np.random.default_rng([seed, step]).integers(0, last, size)
    return _windows(corpus.train, starts, context)


def heldout_batches(corpus: Corpus, *, batches: int, size: int, context: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Windows spread evenly over the held-out tokens, the same for every run.

    Returns:
        `batches` pairs of shape (B, T), as in `batch`; on a short corpus the windows overlap.

    Raises:
        ValueError: if the held-out part is shorter than a window.
    """
    last = len(corpus.heldout) - context
    if last < 1:
        raise ValueError(f"context = {context}: expected fewer than the corpus' {len(corpus.heldout)} held-out tokens")
    starts = np.linspace(0, last - 1, batches * size).astype(np.int64)
    return [_windows(corpus.heldout, s, context) for s in starts.reshape(batches, size)]


def _windows(tokens: np.ndarray, starts: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    rows = np.stack([tokens[s : s + context + 1] for s in starts]).astype(np.int64)
    return rows[:, :-1], rows[:, 1:]


def _matches(name: str) -> Iterator[Path]:
    path = Path(name).expanduser()
    if path.is_dir():
        yield from (p for p in path.rglob("*") if p.is_file())
    elif path.is_file():
        yield path
    else:
        yield from (Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())


def _split(files: list[Path], name: str) -> Corpus:
    """Split 90/10 by file, in the order given: a file is held out whenever that keeps the held-out share at a tenth.

    Raises:
        ValueError: if there is too little text.
    """
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    sizes = {False: 0, True: 0}
    for path in files:
        text = path.read_bytes()
        held = sizes[True] + len(text) <= HELDOUT_SHARE * (sizes[True] + sizes[False] + len(text))
        parts[held].append(text)
        sizes[held] += len(text)
    if not sizes[True]:  # no file is small enough to be held out whole
        whole = b"".join(parts[False])
        cut = int(len(whole) * (1 - HELDOUT_SHARE))
        parts = {False: [whole[:cut]], True: [whole[cut:]]}
    train, heldout = (np.frombuffer(b"".join(parts[held]), dtype=np.uint8) for held in (False, True))
    if min(len(train), len(heldout)) < 2:
        raise ValueError(f"corpus = {name!r}: expected at least 20 bytes of text, got {len(train) + len(heldout)}")
    return Corpus(train, heldout, BYTES, _digest(train, heldout), len(files))


def _memmap(path: Path) -> np.ndarray:
    size = path.stat().st_size
    if size % 2 or not size:
        raise ValueError(
            f"corpus = {str(path)!r}: expected uint16 tokens (an even number of bytes above 0), got {size} bytes"
        )
    return np.memmap(path, dtype=np.uint16, mode="r")


def _digest(train: np.ndarray, heldout: np.ndarray) -> str:
    hasher = hashlib.sha256(f"{train.dtype} {len(train)} {len(heldout)}".encode())
    for tokens in (train, heldout):
        hasher.update(np.ascontiguousarray(tokens).data)
    return hasher.hexdigest()[:16]
