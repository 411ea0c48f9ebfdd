"""predict_many.py: folders and parquet files, interrupted and not."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

pytest.importorskip("ray", reason='Ray is not installed: pip install "cropvote[serve]"')

import pyarrow as pa
import pyarrow.parquet as pq

import predict
import predict_many
from data.toy import toy_faces
from scripts import call, refused

pytestmark = pytest.mark.slow
COUNT, SIZE = 90, 15
#: Ray gives its workers the lowest priority, at which they would wait for other tests.
ENVIRONMENT = {**os.environ, "RAY_worker_niceness": "0"}
BROKEN = {3: b"not a picture", 40: b""}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write toy faces as PNGs, in a folder and a subfolder; two are broken."""
    folder = tmp_path_factory.mktemp("faces")
    (folder / "more").mkdir()
    for number, face in enumerate(toy_faces(COUNT, seed=3)[0]):
        path = folder / ("more" if number % 2 else "") / f"{number:03d}.png"
        Image.fromarray(face).save(path)
        path.write_bytes(BROKEN.get(number, path.read_bytes()))
    return folder


@pytest.fixture(scope="module")
def whole(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the predictions of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    said = run(pictures, out, "--size", SIZE)
    assert "88 faces; 2 rows without a prediction" in said
    return out


def command(source: Path, out: Path, *options: object) -> list[str]:
    return [sys.executable, predict_many.__file__, *map(str, (source, "--out", out, "--workers", 1, *options))]


def run(source: Path, out: Path, *options: object) -> str:
    done = subprocess.run(command(source, out, *options), capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(out: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(out.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_the_predictions_are_those_of_predict(pictures, whole, tmp_path):
    with pytest.raises(SystemExit, match="2 of 90"):
        call(predict, "--device", "cpu", "--csv", tmp_path / "out.csv", pictures)
    with (tmp_path / "out.csv").open(newline="") as file:
        expected = list(csv.DictReader(file))
    assert len(list(whole.glob("*.parquet"))) == COUNT // SIZE
    for row, other in zip(rows(whole), expected, strict=True):
        assert (row["picture"], row["problem"]) == (str(Path(other["image"]).relative_to(pictures)), other["problem"])
        assert (row["class"] or "", row["box"]) == (other["class"], None)
        for name in ("probability", "agreement", "happy", "neutral"):
            assert str(row[name] or "") == other[name] or row[name] == pytest.approx(float(other[name]), abs=2e-4)
    problems = {row["picture"]: row["problem"] for row in rows(whole) if row["problem"]}
    assert set(problems) == {"more/003.png", "040.png"}
    assert all(problems.values())


@pytest.mark.parametrize("struct", [False, True], ids=["bytes", "struct"])
def test_parquet_files_of_image_bytes(pictures, whole, tmp_path, struct):
    """Two files, one of them with two row groups, and a picture that is null."""
    names = [row["picture"] for row in rows(whole)]
    images: list[Any] = [(pictures / name).read_bytes() for name in names]
    images[names.index("040.png")] = None
    stored = [{"bytes": image, "path": None} for image in images] if struct else images
    (tmp_path / "in").mkdir()
    for path, part, size in (("a", stored[:40], 25), ("b", stored[40:], 1000)):
        pq.write_table(pa.table({"face": part, "other": range(len(part))}), tmp_path / "in" / f"{path}.parquet", size)
    run(tmp_path / "in", tmp_path / "out", "--column", "face")
    found = rows(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.parquet"))) == 3
    assert [row["picture"] for row in found] == [f"a.parquet#{i}" for i in range(40)] + [
        f"b.parquet#{i}" for i in range(50)
    ]
    for row, other in zip(found, rows(whole), strict=True):
        assert row["class"] == other["class"]
        assert row["probability"] == pytest.approx(other["probability"], abs=2e-4)
        assert bool(row["problem"]) == bool(other["problem"])


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.time() + 180
    while not condition():
        assert time.time() < deadline
        time.sleep(0.05)


def test_a_killed_run_goes_on_with_what_is_missing(pictures, whole, tmp_path):
    """Kill the run, start it again, and kill its worker: the files are those of a run without interruption."""
    out = tmp_path / "out"
    first = psutil.Popen(command(pictures, out, "--size", SIZE), stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    wait_for(lambda: len(list(out.glob("*.parquet"))) >= 2)
    started = [first, *first.children(recursive=True)]
    first.kill()
    first.wait()
    for process in psutil.wait_procs(started, timeout=30)[1]:  # Ray's agents notice it late
        process.kill()
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    assert 2 <= len(before) < COUNT // SIZE
    (out / ".part-000005.parquet.1.part").write_bytes(b"what a killed run left")

    second = psutil.Popen(command(pictures, out, "--size", SIZE), stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    workers = lambda: [p for p in second.children(recursive=True) if p.name().startswith("ray::MapWorker")]  # noqa: E731
    wait_for(lambda: len(list(out.glob("*.parquet"))) > len(before))
    for worker in workers():
        worker.kill()
    assert second.wait(180) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())
    for path in whole.glob("*.parquet"):
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert run(pictures, out, "--size", SIZE).startswith(f"{out}: 88 faces")


def test_other_pictures_or_options_are_refused(pictures, whole, tmp_path):
    again = (pictures, "--out", whole)
    assert "other pictures, weights or options" in refused(predict_many, *again, "--size", SIZE, "--detect")
    assert "other pictures, weights or options" in refused(predict_many, *again, "--size", SIZE + 1)
    assert "lies inside" in refused(predict_many, pictures, "--out", pictures / "out")
    assert "no picture in this folder" in refused(predict_many, tmp_path, "--out", f"{tmp_path}-out")
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    assert "not parquet" in refused(predict_many, tmp_path, "--out", f"{tmp_path}-out")
    pq.write_table(pa.table({"face": [b""]}), tmp_path / "a.parquet")
    assert "--column is one of face" in refused(predict_many, tmp_path, "--out", f"{tmp_path}-out")
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "a.parquet")
    assert "no rows" in refused(predict_many, tmp_path, "--out", f"{tmp_path}-out")
    Image.new("L", (48, 48)).save(tmp_path / "a.png")
    assert "pictures and parquet" in refused(predict_many, tmp_path, "--out", f"{tmp_path}-out")
    assert set(json.loads((whole / "_run.json").read_text())) == {"pictures", "weights", "column", "detect"}
    assert predict_many.shown("\udcff.png") == "\ufffd.png"
