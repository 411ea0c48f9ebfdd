"""Decoded faces on disk: made once, mapped into memory, the same for every process that asks."""

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

#: Part of every key: raise it when the same pictures would be decoded differently.
VERSION = 1
#: Written last; names every file with its size, so that a part of a cache is never taken for one.
SEAL = "complete.json"


class DataError(Exception):
    """The data cannot be used; the message says why and what to do."""


def cache_folder(folder: Path | None) -> Path:
    """Where decoded faces are kept: ``folder``, or the user's cache."""
    if folder is not None:
        return folder
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "cropvote" / "fer48"


def fingerprint(root: Path, files: Iterable[str], *more: object) -> str:
    """sha256 of every file's place, size, mode and times of change, and of ``more``: arrays or anything with a repr."""
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
    """The arrays kept under ``key``, mapped copy-on-write; where there are none, or damaged ones, they are built.

    ``build`` writes .npy files into the folder it is given, which gets its name when it is complete.

    Raises:
        DataError: the folder cannot be written.
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
    """The arrays of a complete cache; None for none, or for a damaged one."""
    try:
        sizes = json.loads((folder / SEAL).read_text())
        if any((folder / name).stat().st_size != size for name, size in sizes.items()):
            return None
        return {Path(name).stem: np.load(folder / name, mmap_mode="c", allow_pickle=False) for name in sizes}
    except (OSError, ValueError, AttributeError):
        return None


def place(part: Path, folder: Path) -> dict[str, np.ndarray]:
    """Give a complete cache its name; the arrays of the one that bears it then.

    Another process may have been faster: then its cache, the same, is used. A damaged one is moved out of the way.
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
    raise OSError(f"{folder.name} is damaged again and again")
