"""A study's folder on disk: records, the study as given, the lock that keeps a second sweep out."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import socket
import tempfile
import time
from collections.abc import Generator
from pathlib import Path

from filelock import FileLock, Timeout

from towtank.record.errors import FolderError, plain
from towtank.record.record import Record, decode, load_records, remove_leftovers, write_atomic, write_record
from towtank.study.config import Study
from towtank.study.load import load_study, study_toml

_RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")


class StudyFolder:
    """The layout of a study's folder: `records/<id>.json`, `study.toml`, `.lock`, `report.html`.

    Args:
        path: the folder; it need not exist yet.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.records = self.path / "records"
        self.report = self.path / "report.html"
        self._lock_file = self.path / ".lock"
        self._holder_file = self.path / ".holder"

    def create(self) -> None:
        """Make the folder and see that it can be written.

        Raises:
            FolderError: if not; nothing has been computed yet.
        """
        try:
            self.records.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.records) as probe:
                probe.write(b"towtank")
        except (OSError, ValueError) as error:
            raise FolderError(_unusable(self.path, error)) from None

    @contextlib.contextmanager
    def locked(self) -> Generator[None]:
        """Hold the folder against other sweeps; the operating system frees it if this process dies.

        Raises:
            FolderError: if another process holds it, naming lock file, host and process id.
        """
        lock = FileLock(self._lock_file)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise FolderError(
                f"{plain(str(self.path))} is in use: lock file {plain(str(self._lock_file))} is held by {self._holder()}; "
                "wait for it to end, or give another --out"
            ) from None
        except OSError as error:
            raise FolderError(_unusable(self.path, error)) from None
        try:
            remove_leftovers(self.records)
            holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            write_atomic(self._holder_file, json.dumps(holder).encode())
            yield
        finally:
            with contextlib.suppress(OSError):
                self._holder_file.unlink(missing_ok=True)
            lock.release()

    def save(self, record: Record) -> Record:
        """Write a record; returns it as it will be read back.

        Raises:
            FolderError: if the disk is full or the folder cannot be written.
        """
        try:
            return decode(write_record(self.records, record))
        except OSError as error:
            raise FolderError(_unusable(self.path, error)) from None

    def save_study(self, study: Study) -> bool:
        """Keep the study beside its records; returns whether another one was there.

        Raises:
            FolderError: if the disk is full or the folder cannot be written.
        """
        file, text = self.path / "study.toml", study_toml(study).encode()
        try:
            before = file.read_bytes() if file.is_file() else None
            if before != text:
                write_atomic(file, text)
        except OSError as error:
            raise FolderError(_unusable(self.path, error)) from None
        return before is not None and before != text

    def load(self, *, quarantine: bool = False) -> tuple[list[Record], list[str]]:
        """Its records; see `load_records`."""
        return load_records(self.path, quarantine=quarantine)

    def study(self) -> Study | None:
        """The study that was swept here, None if its file is gone; its task is not imported.

        Raises:
            ConfigError: if the file cannot be read.
        """
        file = self.path / "study.toml"
        return load_study(file, check_task=False) if file.exists() else None

    def _holder(self) -> str:
        try:
            holder = json.loads(self._holder_file.read_bytes())
            text = f"process {holder['pid']} on host {holder['host']} since {holder['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process that has just started"
        return plain(text)


def safe_name(name: str) -> str:
    """A folder name made of a study's name: letters, digits, `.`, `_`, `-`; a hash is added where that lost something.

    Example:
        >>> safe_name("lr-transfer")
        'lr-transfer'
        >>> safe_name("../../etc/x")
        'etc-x-56da1a'
    """
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._ ")
    slug = re.sub(r"\.{2,}", ".", slug)[:60].rstrip("-._")
    if _RESERVED.fullmatch(slug):
        slug = f"study-{slug}"
    if slug and slug == name:
        return slug
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:6]
    return f"{slug or 'study'}-{digest}"


def default_folder(study: Study) -> Path:
    """Where a study goes when nobody says: `runs/<name>`.

    Raises:
        FolderError: if that is a symbolic link, which may lead anywhere.
    """
    path = Path("runs") / safe_name(study.name)
    if path.is_symlink():
        raise FolderError(f"{path} is a symbolic link: give the folder it leads to with --out")
    return path


def _unusable(path: Path, error: Exception) -> str:
    shown = plain(str(path))
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{shown}: no space left on the disk; what is done is saved: make room and run again"
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"{shown}: expected a folder that can be written, got: {plain(why)}; give another --out"
