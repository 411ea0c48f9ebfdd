"""Predict with a network that export.py wrote: needs NumPy, Pillow and ONNX Runtime, neither PyTorch nor cropvote.

    python examples/fer48/predict_onnx.py model.onnx face.jpg more.png

Classes, image size, scaling, sites and vote are in the file's metadata. A picture is taken for a cropped face.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


class Network:
    """An ONNX file with the metadata that export.py writes."""

    def __init__(self, path: str | Path) -> None:
        import onnxruntime

        try:
            self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as error:  # of ONNX Runtime's own kinds
            raise ValueError(f"{path} cannot be read as ONNX: {str(error).splitlines()[0]}") from error
        stored = self.session.get_modelmeta().custom_metadata_map
        self.card: dict[str, Any] = {key: json.loads(value) for key, value in stored.items()}
        missing = {"outputs", "preprocessing", "target"} - self.card.keys()
        if missing:
            raise ValueError(f"{path} lacks the metadata of export.py: {', '.join(sorted(missing))}.")
        if self.card["preprocessing"]["scale"] != "x / 127.5 - 1":
            raise ValueError(f"{path} scales its images by {self.card['preprocessing']['scale']!r}: not known here.")

    def prepare(self, path: str | Path) -> np.ndarray:
        """Return a picture as the network takes it, float32 (3, size, size)."""
        from PIL import Image, ImageOps

        size = self.card["preprocessing"]["size"]
        with Image.open(path) as picture:
            face = ImageOps.exif_transpose(picture).convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
        return np.asarray(face, np.float32).transpose(2, 0, 1) / 127.5 - 1

    def predict(self, faces: np.ndarray) -> np.ndarray:
        """float32 (n, 3, size, size) -> probabilities (n, k), or valence and arousal."""
        votes = self.session.run(None, {"faces": faces})[0]
        if self.card["target"] != "expression":
            return np.asarray(votes)
        powers = np.exp(votes / self.card.get("temperature", 1.0))
        return np.asarray(powers / powers.sum(1, keepdims=True))


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    try:
        network = Network(options.model)
        for path in options.pictures:
            (row,) = network.predict(network.prepare(path)[None])
            names = network.card["outputs"]
            if network.card["target"] == "expression":
                print(f"{path}: {names[int(row.argmax())]} {row.max():.0%}")
            else:
                print(f"{path}: " + ", ".join(f"{name} {value:+.2f}" for name, value in zip(names, row, strict=True)))
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"predict_onnx.py: {error}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="FILE.onnx")
    parser.add_argument("pictures", nargs="+", metavar="IMAGE")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
