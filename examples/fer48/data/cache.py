"""A cache of decoded faces on disk: made once, memory-mapped and shared by all processes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np

#: Part of every key: increase it when pictures are decoded differently.
VERSION = 1
#: Written last, with the name and size of every file, so an incomplete cache is never used.
SEAL = "complete.json"


class DataError(Exception):
    """The data cannot be used; the message says why and what to do."""


def cache_folder(folder: Path | None) -> Path:
    """Return ``folder``, or by default the user's cache folder."""
    if folder is not None:
        return folder
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "cropvote" / "fer48"


def fingerprint(root: Path, files: Iterable[str], *more: object) -> str:
    """Return the sha256 of every file's path, size, mode and times, and of ``more`` (arrays, or any repr)."""
    digest = hashlib.sha256(f"{VERSION} {root.resolve()}".encode(errors="surrogateescape"))
    for name in files:
        try:
            stat = (root / name).stat()
            facts = f"{stat.st_size} {stat.st_mode} {stat.st_mtime_ns} {stat.st_ctime_ns}"
        except OSError:
            facts = "missing"
        digest.update(f"\0{name}\0{facts}".encode(errors="surrogateescape"))
    for value in more:
        digest.update(b"\0\0" + (value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode()))
    return digest.hexdigest()


def kept(cache: Path | None, key: str, build: Callable[[Path], None]) -> dict[str, np.ndarray]:
    """Return the arrays stored under ``key``, mapped copy-on-write; build them if they are missing or damaged.

    ``build`` writes .npy files into a temporary folder, which is renamed when complete.

    Raises:
        DataError: If the folder cannot be written.
    """
    root = cache_folder(cache)
    found, part = opened(root / key), None
    if found is not None:
        return found
    try:
        root.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{key[:16]}-", dir=root))
        build(part)
        sizes = {file.name: file.stat().st_size for file in part.iterdir()}
        (part / SEAL).write_text(json.dumps(sizes))
        return place(part, root / key)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(
            f"--cache {root}: decoded faces cannot be kept there ({reason}); name another folder."
        ) from error
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)


def opened(folder: Path) -> dict[str, np.ndarray] | None:
    """Return the arrays of a complete cache, or None if it is missing or damaged."""
    try:
        sizes = json.loads((folder / SEAL).read_text())
        if any((folder / name).stat().st_size != size for name, size in sizes.items()):
            return None
        return {Path(name).stem: np.load(folder / name, mmap_mode="c", allow_pickle=False) for name in sizes}
    except (OSError, ValueError, AttributeError):
        return None


def place(part: Path, folder: Path) -> dict[str, np.ndarray]:
    """Rename a complete cache to its final name, and return its arrays.

    If another process was faster, its identical cache is used. A damaged one is moved out of the way.
    """
    for _ in range(5):
        try:
            part.rename(folder)
        except OSError:
            if not folder.exists():
                raise
        found = opened(folder)
        if found is not None:
            return found
        damaged = Path(tempfile.mkdtemp(prefix=".damaged-", dir=folder.parent))
        with suppress(FileNotFoundError):
            folder.rename(damaged / "cache")
        shutil.rmtree(damaged, ignore_errors=True)
    raise OSError(f"{folder.name} keeps getting damaged")
