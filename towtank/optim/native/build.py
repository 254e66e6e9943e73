"""C source to a loaded function, once per source and processor."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-fPIC", "-shared")


class Unsupported(RuntimeError):
    """The rule, the type or the machine has no native kernel; the message says why."""


def build(source: str) -> Path:
    """Compile C into a shared object in the user's cache folder; a second time it is found there.

    Raises:
        Unsupported: if there is no compiler, or it fails.
    """
    key = hashlib.sha256(f"{_processor()} {FLAGS} {source}".encode()).hexdigest()[:32]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "towtank" / "kernels"
    library = home / f"{key}.so"
    if library.exists():
        return library
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home) as folder:
            (Path(folder) / "rule.c").write_text(source)
            command = [_compiler(), *FLAGS, "-o", f"{folder}/rule.so", f"{folder}/rule.c", "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise Unsupported(f"the C compiler failed: {done.stderr.strip()[:300]}")
            os.replace(f"{folder}/rule.so", library)
    except OSError as e:
        raise Unsupported(f"a kernel cannot be kept in {home}: {e}") from e
    return library


@functools.cache
def _processor() -> str:
    asked = subprocess.run([_compiler(), "-march=native", "-Q", "--help=target"], capture_output=True, check=False)
    return hashlib.sha256(asked.stdout).hexdigest()


def _compiler() -> str:
    found = next((c for c in (os.environ.get("CC"), "cc", "gcc", "clang") if c and shutil.which(c)), None)
    if found is None:
        raise Unsupported("no C compiler was found (looked for $CC, cc, gcc, clang); install one or use another engine")
    return found
