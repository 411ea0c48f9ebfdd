"""Decode a picture file to a 48x48 face, in the same way for training and prediction."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from .toy import SIDE

#: Pictures decoded at once; this limits the memory.
CHUNK = 512
#: Pillow's own limit; Pillow only warns up to twice as many pixels.
MAX_PIXELS = 89_478_485
#: Formats that Pillow may open; none of them runs another program.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


class ReadError(Exception):
    """A picture cannot be read; the message says why."""


def read_picture(path: str | Path | IO[bytes], *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read a picture as a viewer would show it: rotated by its EXIF data, RGB, transparency on white.

    The number of pixels is read from the header and checked before anything is decoded.

    Raises:
        ReadError: If the file is missing, damaged, not a picture or far too large.
    """
    shown = str(path) if isinstance(path, (str, Path)) else path
    try:
        with Image.open(path, formats=FORMATS) as picture:
            if picture.width * picture.height > max_pixels:
                raise ReadError(f"{picture.width}x{picture.height} pixels are too many")
            picture.load()
            return to_rgb(ImageOps.exif_transpose(picture))
    except ReadError:
        raise
    except FileNotFoundError as error:
        raise ReadError("no such file") from error
    except Exception as error:  # on a damaged file, Pillow can raise almost anything
        raise ReadError(f"{type(error).__name__}: {error}".replace(f" {shown!r}", "")) from error


def to_rgb(picture: Image.Image) -> Image.Image:
    """Convert any mode to RGB; 16 bits are scaled to 8, where Pillow would clip."""
    if picture.mode == "F":
        raise ReadError("a picture of floating-point numbers has no known range")
    if picture.mode.startswith("I"):
        wide = np.asarray(picture).astype(np.int64).clip(0, 65535)
        return Image.fromarray((wide // 257).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def shrink(
    picture: Image.Image | np.ndarray, box: Sequence[int] | np.ndarray | None = None, side: int = SIDE
) -> Image.Image:
    """Resize the box (left, top, right, bottom in pixels, clipped to the picture), or all of the picture, to a square.

    Pillow's BILINEAR averages over all source pixels of an output pixel; a picture of that size is unchanged.

    Raises:
        ReadError: If the box lies outside the picture.
    """
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    if box is not None:
        left, top = max(int(box[0]), 0), max(int(box[1]), 0)
        right, bottom = min(int(box[2]), image.width), min(int(box[3]), image.height)
        if left >= right or top >= bottom:
            raise ReadError("the face box covers nothing of the picture")
        image = image.crop((left, top, right, bottom))
    return image.resize((side, side), Image.Resampling.BILINEAR)


def read_face(path: Path, box: np.ndarray | None, grey: bool) -> np.ndarray:
    """Return a picture's face, uint8 (c, 48, 48), with c = 1 if ``grey``, else 3 (RGB)."""
    face = shrink(read_picture(path), box)
    return np.asarray(face.convert("L"))[None] if grey else np.asarray(face).transpose(2, 0, 1)


def decode(root: Path, files: Sequence[str], boxes: np.ndarray | None, grey: bool, folder: Path) -> None:
    """Write faces.npy, uint8 (n, c, 48, 48); rows.npy, their indices; lost.npy and reasons.npy for unreadable files.

    Faces are written one by one, so few are in memory, and a full disk is an OSError instead of a crash.
    """
    lost: dict[int, str] = {}

    def read(row: int) -> np.ndarray | str:
        try:
            return read_face(root / files[row], None if boxes is None else boxes[row], grey)
        except ReadError as error:
            return str(error)

    channels, count = 1 if grey else 3, len(files)
    bar = tqdm(total=count, desc="decoding", unit=" pictures", disable=None, leave=False)
    with (folder / "faces.npy").open("wb") as out, ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool, bar:
        write_header(out, (count, channels, SIDE, SIDE))
        start = out.tell()
        for first in range(0, count, CHUNK):
            some = range(first, min(first + CHUNK, count))
            for row, face in zip(some, pool.map(read, some), strict=True):
                if isinstance(face, str):
                    lost[row] = face
                else:
                    out.write(face.tobytes())
            bar.update(len(some))
        out.seek(0)
        write_header(out, (count - len(lost), channels, SIDE, SIDE))
        if out.tell() != start:
            raise OSError("the header of faces.npy has changed its length")
    np.save(folder / "rows.npy", np.setdiff1d(np.arange(count), list(lost)).astype(np.int64))
    np.save(folder / "lost.npy", np.array(list(lost), dtype=np.int64))
    np.save(folder / "reasons.npy", np.array(list(lost.values()), dtype=np.str_))


def write_header(out: IO[bytes], shape: tuple[int, ...]) -> None:
    """Write a .npy header for uint8; numpy leaves room in it for a larger first dimension."""
    np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})
