"""Show the ten views of a real face vote: the shipped network on NASA's public-domain portrait of Eileen Collins.

    python examples/fer48/demo.py --out runs/demo

The picture comes with scikit-image, the detector with OpenCV; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

import predict
from data.pictures import shrink
from detecting import DetectError, best_detector
from keeping import load_model
from machines import machine


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--out", default="runs/demo", metavar="FOLDER", help="where to write the picture of the views")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    out = Path(parse(argv).out)
    try:
        from skimage.data import astronaut

        photograph = astronaut()
        box = best_detector().boxes(photograph)[0]
    except (ImportError, DetectError) as error:
        sys.exit(f"demo.py: {error}. It needs scikit-image and OpenCV: pip install scikit-image cropvote[detect].")
    model, card = load_model(predict.WEIGHTS)
    face = predict.Face("astronaut", np.asarray(shrink(photograph, box)).transpose(2, 0, 1), box)
    out.mkdir(parents=True, exist_ok=True)
    with machine("cpu") as here:
        (row,) = predict.predict(model, card, [face], here)
        predict.draw(model, card, face, here, out, 1)
    print(predict.describe(card))
    print(predict.in_words(face, row, card))
    print(f"the ten views and their predictions: {out / '00001-astronaut.png'}")


if __name__ == "__main__":
    main()
