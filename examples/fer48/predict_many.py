"""Predict a large number of pictures with Ray Data: a folder, or parquet files of image bytes, to parquet files.

    pip install "cropvote[serve]"
    python examples/fer48/predict_many.py pictures/ --out predictions/
    python examples/fer48/predict_many.py faces.parquet --column image --out predictions/

The work is cut into parts: --size pictures of a folder, or a row group of a parquet file. Each part becomes one parquet
file, written whole or not at all. An interrupted run that is started again does the missing parts only, and the result
is the same as without the interruption, so row groups of some thousand rows lose little. A picture that cannot be read
has a row, too: the column "problem" says why.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from tqdm import tqdm

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # as important as what else runs here; Ray's default is 15
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # Ray's own ports on 127.0.0.1, on any system

try:
    import pyarrow as pa
    import pyarrow.dataset as ds
    import pyarrow.parquet as pq
    import ray
    from ray.exceptions import RayError
except ImportError:
    sys.exit('predict_many.py: it needs Ray Data: pip install "cropvote[serve]".')

import cropvote
import predict
from data.class_folders import is_picture
from detecting import DetectError, best_detector
from keeping import WEIGHTS, KeptError, load_model, read_card, write_whole
from machines import machine

#: The batch size; the same in every run, as the last digits depend on it.
BATCH = 64
#: Rows that are written at once.
ROWS = 4096
#: What a run was started with; the underscore hides it from readers of the folder.
RUN = "_run.json"
#: Bytes of Ray's shared memory: it holds the names of pictures, not the pictures.
STORE = 200 * 2**20


class ManyError(Exception):
    """The run cannot start or go on; the message says why."""


class Predictor:
    """A worker of one core: it reads the pictures of a part, predicts them and writes the part's file."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.set_num_threads(1)
        self.options, (self.model, self.card) = options, load_model(options.model)
        self.detector = best_detector() if options.detect else None

    def __call__(self, part: dict[str, Any]) -> dict[str, Any]:
        columns = schema(self.card)

        def write(file: IO[bytes]) -> None:
            with pq.ParquetWriter(file, columns) as writer:
                for some in predict.batched(self.rows(part), ROWS):
                    writer.write_table(pa.Table.from_pylist(some, columns))

        write_whole(file_of(Path(self.options.out), part["number"]), write)
        return {"number": part["number"]}

    def rows(self, part: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield a row for each face of a part, and for each picture without one."""
        pictures = pictures_of(Path(self.options.source), part, self.options.column)
        faces = (face for name, picture in pictures for face in predict.read_faces(picture, self.detector, source=name))
        with machine("cpu") as here:
            for some in predict.batched(faces, BATCH):
                for face, answer in zip(some, predict.predict(self.model, self.card, some, here), strict=True):
                    yield {"picture": shown(face.source), "box": face.box, **answer, "problem": face.problem}


def schema(card: dict[str, Any]) -> pa.Schema:
    """Return the columns of the predictions."""
    kinds = {name: pa.float64() for name in predict.answers(card)}
    if "class" in kinds:
        kinds["class"] = pa.string()
    columns = {"picture": pa.string(), "box": pa.list_(pa.int32()), **kinds, "problem": pa.string()}
    return pa.schema(list(columns.items()))


def shown(name: str) -> str:
    """Return a file's name as valid text."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def file_of(out: Path, number: int) -> Path:
    return out / f"part-{number:06d}.parquet"


def parts_in(source: Path, size: int, column: str) -> list[dict[str, Any]]:
    """Return the parts: names of pictures below the folder, or a parquet file's name and the number of a row group.

    Raises:
        ManyError: If there are both pictures and parquet files, or a file is not parquet or lacks the column.
        DetectError: If there are neither.
    """
    folder = source if source.is_dir() else source.parent
    tables = sorted(source.rglob("*.parquet")) if source.is_dir() else [source]
    if tables and source.is_dir() and any(map(is_picture, source.rglob("*"))):
        raise ManyError(f"{source} holds pictures and parquet files; give a folder that holds one kind.")
    found: list[tuple[list[bytes], int]] = []
    for table in tables:
        try:
            metadata, columns = pq.read_metadata(table), pq.read_schema(table).names
        except pa.ArrowInvalid as error:
            raise ManyError(f"{table}: not parquet ({error}).") from error
        if column not in columns:
            raise ManyError(f"{table} has no column {column!r}; --column is one of {', '.join(columns)}.")
        groups = [group for group in range(metadata.num_row_groups) if metadata.row_group(group).num_rows]
        found += [([os.fsencode(table.relative_to(folder))], group) for group in groups]
    if not tables:
        names = [os.fsencode(path.relative_to(folder)) for path in predict.pictures_in([str(source)])]
        found = [(names[i : i + size], -1) for i in range(0, len(names), size)]
    return [{"number": number, "names": names, "group": group} for number, (names, group) in enumerate(found)]


def pictures_of(source: Path, part: dict[str, Any], column: str) -> Iterator[tuple[str, Path | IO[bytes]]]:
    """Yield the name and the file of every picture of a part; of a table, a few are in memory at once."""
    folder, names = source if source.is_dir() else source.parent, [os.fsdecode(name) for name in part["names"]]
    if part["group"] < 0:
        for name in names:
            yield name, folder / name
        return
    (name,) = names
    table = pq.ParquetFile(folder / name)
    row = sum(table.metadata.row_group(group).num_rows for group in range(part["group"]))
    for batch in table.iter_batches(BATCH, row_groups=[part["group"]], columns=[column]):
        for value in batch.column(0).to_pylist():
            image = value["bytes"] if isinstance(value, dict) else value  # Hugging Face's datasets store a struct
            yield f"{name}#{row}", io.BytesIO(image or b"")
            row += 1


def prepare(options: argparse.Namespace, parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the missing parts, and note what the run was started with.

    Raises:
        ManyError: If the folder holds predictions of other pictures, of another network or with other options.
    """
    source, out = Path(options.source), Path(options.out)
    if not parts:
        raise ManyError(f"{source} has no rows.")
    if options.detect:
        best_detector()  # its error is clearer here than from a worker
    if out.resolve().is_relative_to(source.resolve()):
        raise ManyError(f"{out} lies inside {source}: its files would be taken for pictures next time.")
    out.mkdir(parents=True, exist_ok=True)
    folder = source if source.is_dir() else source.parent
    pictures = hashlib.sha256()
    for part in parts:
        sizes = [(folder / os.fsdecode(name)).stat().st_size for name in part["names"]]
        pictures.update(repr((part, sizes)).encode())
    started = {
        "pictures": pictures.hexdigest(),
        "weights": hashlib.sha256((Path(read_card(options.model)["folder"]) / WEIGHTS).read_bytes()).hexdigest(),
        "column": options.column,
        "detect": options.detect,
    }
    path = out / RUN
    if path.exists() and json.loads(path.read_text()) != started:
        raise ManyError(f"{out} holds predictions of other pictures, weights or options; give another --out.")
    write_whole(path, lambda file: file.write(json.dumps(started, indent=1).encode()))
    remove_parts(out)
    return [part for part in parts if not file_of(out, part["number"]).exists()]


def remove_parts(out: Path) -> None:
    """Remove what runs and workers left that were killed while they wrote."""
    for rest in out.glob(".*.part"):
        rest.unlink()


def run(options: argparse.Namespace, missing: list[dict[str, Any]]) -> None:
    """Predict the missing parts on all workers; Ray repeats a part whose worker dies."""
    if options.address:
        ray.init(address=options.address)
    else:
        ray.init(address="local", num_cpus=options.workers, include_dashboard=False, object_store_memory=STORE)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        workers = ray.data.ActorPoolStrategy(size=options.workers)
        done = ray.data.from_items(missing, override_num_blocks=len(missing)).map(
            Predictor,  # type: ignore[arg-type]  # Ray's signature knows functions only
            fn_constructor_args=(options,),
            compute=workers,
            num_cpus=1,
        )
        for _ in tqdm(done.iter_rows(), total=len(missing), unit=" parts", disable=None):
            pass
    finally:
        ray.shutdown()


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    try:
        parts = parts_in(Path(options.source), options.size, options.column)
        missing = prepare(options, parts)
        print(f"{len(parts)} parts, {len(missing)} to do", file=sys.stderr)
        if missing:
            run(options, missing)
            remove_parts(Path(options.out))
        table = ds.dataset(options.out, format="parquet")
        rows, failed = table.count_rows(), table.count_rows(filter=ds.field("problem") != "")
    except (KeptError, ManyError, DetectError, cropvote.CropVoteError, RayError, OSError) as error:
        sys.exit(f"predict_many.py: {error}")
    print(f"{options.out}: {rows - failed} faces; {failed} rows without a prediction, each named with its problem")


def parse(argv: list[str] | None) -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", metavar="FOLDER|FILE.parquet", help="pictures, or parquet files, also in subfolders")
    add("--out", required=True, metavar="FOLDER", help="where the predictions go, and where they are continued")
    add("--model", default=str(predict.WEIGHTS), metavar="RUN", help="a finished run's folder")
    add("--column", default="image", help="of the parquet files: image bytes, or a struct with a field bytes")
    add("--detect", action="store_true", help="detect faces in the pictures first")
    add("--size", type=int, default=1000, help="pictures per part of a folder")
    add("--workers", type=int, default=os.cpu_count() or 1, help="copies of the network, a core each")
    add("--address", help="of a running Ray cluster, whose machines all see the folders; default: start Ray here")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
