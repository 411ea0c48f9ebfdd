"""The cache of decoded pictures."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from data import DataError, load, pictures
from data import cache as caching
from faces import (
    RAFDB,
    check,
    class_folders,
    fer2013_csv,
    paint,
    shown,
)

ROOT = Path(__file__).parent.parent


@pytest.fixture
def small(tmp_path):
    return class_folders(tmp_path / "set", {"train": 8, "test": 1}, {str(k + 1): name for k, name in enumerate(RAFDB)})


def caches(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def test_a_second_load_decodes_nothing(small, read, monkeypatch):
    first = read(small)
    opened = []
    monkeypatch.setattr(pictures.Image, "open", lambda *a, **k: opened.append(a))
    again = read(small)
    assert not opened
    for name, split in first.splits.items():
        assert torch.equal(split.images, again.splits[name].images)
        assert split.names == again.splits[name].names
    again.splits["test"].images.zero_()  # a private copy: the cache does not change
    check(read(small))


def test_the_csv_is_parsed_once(tmp_path, read, monkeypatch):
    path = fer2013_csv(tmp_path / "fer2013.csv")
    first = read(path)
    monkeypatch.setattr("data.fer_csv.parse", lambda path: pytest.fail("parsed again"))
    assert torch.equal(read(path).splits["test"].images, first.splits["test"].images)


@pytest.mark.parametrize("what", ["content", "time", "size"])
def test_a_changed_file_is_seen(tmp_path, small, read, what):
    read(small)
    before = len(caches(tmp_path / "cache"))
    path = small / "test" / "1" / "test-0.png"
    stat = path.stat()
    if what == "time":
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
        read(small)
        assert len(caches(tmp_path / "cache")) == before + 1
        return
    paint(path, "happy", (400, 300) if what == "size" else (60, 50))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + (what == "content")))
    assert what == "content" or path.stat().st_size != stat.st_size
    assert shown(read(small).splits["test"])[0] == "happy"


def test_the_same_names_in_another_folder_are_other_pictures(tmp_path, read):
    """Sizes and times are equal, as in a copy of an archive."""
    folders = {str(k + 1): name for k, name in enumerate(RAFDB)}
    for place, order in (("a", folders), ("b", dict(zip(folders, reversed(folders.values()), strict=True)))):
        root = class_folders(tmp_path / place, {"train": 2, "test": 1}, order, ".bmp")
        for path in root.rglob("*.bmp"):
            os.utime(path, ns=(0, 0))
    check(read(tmp_path / "a"))
    assert shown(read(tmp_path / "b").splits["test"]) == list(reversed(RAFDB))


@pytest.mark.parametrize("damage", ["truncated", "gone", "no seal", "seal", "empty"])
def test_a_damaged_cache_is_rebuilt(tmp_path, small, read, damage):
    read(small)
    for folder in caches(tmp_path / "cache"):
        if damage == "truncated":
            with (folder / "faces.npy").open("r+b") as file:
                file.truncate(5000)
        elif damage == "gone":
            (folder / "rows.npy").unlink()
        elif damage == "no seal":
            (folder / caching.SEAL).unlink()
        elif damage == "seal":
            (folder / caching.SEAL).write_text("[]")
        else:
            shutil.rmtree(folder)
            folder.mkdir()
    check(read(small))
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_an_interrupted_build_leaves_nothing(tmp_path, small, read, monkeypatch):
    genuine, calls = pictures.read_face, []

    def interrupted(path, box, grey):
        calls.append(path)
        if len(calls) == 30:
            raise KeyboardInterrupt
        return genuine(path, box, grey)

    monkeypatch.setattr(pictures, "read_face", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read(small)
    assert not list((tmp_path / "cache").iterdir())
    check(read(small))


def test_a_full_disk_is_one_clear_error(tmp_path, small, read):
    """A limit on file size makes a write fail in the middle of a file, like a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(DataError, match=r"--cache .*cannot be kept there \(File too large\); name another"):
            read(small)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "cache").iterdir())
    check(read(small))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be kept there"):
        read(small, cache=tmp_path / "file" / "cache")


def test_two_builds_at_once_end_with_one_good_cache(tmp_path):
    barrier, results = threading.Barrier(2), []

    def build(part: Path) -> None:
        np.save(part / "faces.npy", np.arange(1000))
        barrier.wait(10)

    def work() -> None:
        results.append(caching.kept(tmp_path / "cache", "key", build)["faces"].sum())

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [499_500] * 2
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["key"]


def test_two_processes_at_once(tmp_path, small):
    program = (
        "import sys; from pathlib import Path; from data import load\n"
        "faces = load(sys.argv[1], validation=1, cache=Path(sys.argv[2]))\n"
        "print(int(faces.splits['train'].images.long().sum()))\n"
    )
    command = [sys.executable, "-c", program, str(small), str(tmp_path / "cache")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "examples" / "fer48")}
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert said[0] == said[1] != ""
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_the_default_cache_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load(str(fer2013_csv(tmp_path / "fer2013.csv")))
    assert len(caches(tmp_path / "cropvote" / "fer48")) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert caching.cache_folder(None) == Path.home() / ".cache" / "cropvote" / "fer48"
