"""Toy faces: 48x48 grey faces drawn from parameters, seven expressions. Synthetic: no person, no licence.

An expression moves brows, eyes, nose and mouth away from a neutral face. Neutral faces differ, expressions may be
faint, and the picture is shifted, tilted, badly lit, partly covered and noisy, so the classes overlap.

    python examples/fer48/data/toy.py faces/      write fourteen pictures to try predict.py on
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 48
#: In the order of FER2013.
CLASSES = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")
#: What a full expression adds to the neutral face; lengths in units of half the picture.
#: brow_raise, brow_slope (inner end down), eye_open, mouth_curve (corners up), mouth_open, mouth_width, wrinkle, cheek
EXPRESSIONS = np.array(
    [
        [-0.07, 0.50, -0.20, -0.05, 0.00, -0.10, 0.3, 0.0],
        [-0.05, 0.25, -0.30, -0.08, 0.04, -0.05, 1.0, 0.3],
        [0.07, -0.35, 0.35, -0.05, 0.08, 0.08, 0.0, 0.0],
        [0.00, 0.00, -0.20, 0.14, 0.05, 0.20, 0.1, 1.0],
        [-0.01, -0.40, -0.30, -0.12, 0.00, -0.08, 0.0, 0.0],
        [0.12, 0.00, 0.45, -0.01, 0.17, -0.20, 0.0, 0.0],
        [0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.0, 0.0],
    ]
)
#: How much neutral faces vary in the same parameters.
SPREAD = np.array([0.025, 0.12, 0.12, 0.03, 0.015, 0.07, 0.15, 0.15])


def toy_faces(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ``count`` faces, uint8 (count, 48, 48), and their labels, determined by the seed."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % len(CLASSES))
    faces = [_draw(labels[i : i + 256], rng) for i in range(0, count, 256)]
    return np.concatenate(faces) if faces else np.empty((0, SIDE, SIDE), np.uint8), labels


def _draw(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    n = len(labels)

    def uniform(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, (n, 1, 1))

    strength = rng.uniform(0.25, 1.0, (n, 1))
    face = EXPRESSIONS[labels] * strength + SPREAD * rng.standard_normal((n, len(SPREAD)))
    raise_, slope, eye, curve, opened, wide, wrinkle, cheek = (column[:, None, None] for column in face.T)
    u, v = _face_coordinates(n, rng)
    skin, hair, back = uniform(0.45, 0.85), uniform(0.05, 0.45), uniform(0.1, 0.9)

    head = _inside(1 - np.hypot(u / uniform(0.58, 0.70), v / uniform(0.76, 0.88)), 0.04)
    picture = back + (skin - back) * head
    picture = _over(picture, hair, head * _inside(uniform(-0.62, -0.48) - v + 0.15 * u**2, 0.03))

    side = np.abs(u) - uniform(0.25, 0.31)  # distance from an eye's centre, outwards
    socket = np.hypot(side / 0.135, (v + 0.13) / (0.075 * np.clip(1 + 1.2 * eye, 0.25, 1.8)))
    white = _inside(1 - socket, 0.15)
    picture = _over(picture, 0.95, white)
    look = uniform(-0.03, 0.03)
    pupil = np.hypot(np.abs(u - look) - (np.abs(u) - side), v + 0.13)
    picture = _over(picture, 0.1, white * _inside(0.062 - pupil, 0.012))
    picture = _over(picture, 0.2, 0.8 * _inside(0.13 - np.abs(socket - 1), 0.1))

    brow = -0.31 - raise_ - slope * side + uniform(0.3, 1.2) * side**2
    inside = _inside(0.17 - np.abs(side), 0.02)
    picture = _over(picture, hair * 0.6, inside * _inside(uniform(0.022, 0.045) - np.abs(v - brow), 0.012))

    nose = np.abs(np.abs(u) - 0.05 - 0.12 * np.clip(v + 0.05, 0, 0.2)) - 0.01
    picture = _over(picture, skin * 0.7, 0.6 * _inside(-nose, 0.015) * _inside(0.11 - np.abs(v - 0.08), 0.02))
    fold = np.abs(np.abs(v + 0.04 + 0.5 * np.abs(u)) - 0.05) - 0.008
    creased = np.clip(wrinkle, 0, 1.3) * _inside(0.13 - np.abs(u), 0.02)
    picture = _over(picture, skin * 0.55, 0.7 * np.clip(creased, 0, 1) * _inside(-fold, 0.012))

    half = np.clip(uniform(0.22, 0.28) * (1 + wide), 0.1, 0.45)
    across = np.clip(1 - (u / half) ** 2, 0, 1)
    lips = uniform(0.40, 0.46) + curve * (across - 0.5)
    lower, upper = lips + np.clip(opened, 0, 1) * across, lips - 0.35 * np.clip(opened, 0, 1) * across
    mouth = _inside(half - np.abs(u), 0.02)
    picture = _over(picture, 0.12, mouth * _inside(lower - v, 0.012) * _inside(v - upper, 0.012))
    lip = np.minimum(np.abs(v - lower), np.abs(v - upper))
    picture = _over(picture, skin * 0.5, mouth * _inside(uniform(0.018, 0.035) - lip, 0.012))
    smile = np.abs(np.hypot(np.abs(u) - half - 0.02, v - 0.36) - 0.12) - 0.01
    picture = _over(picture, skin * 0.6, 0.6 * np.clip(cheek, 0, 1) * _inside(-smile, 0.015) * (np.abs(u) > half))
    return _photograph(picture, u, rng)


def _face_coordinates(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return every pixel's position on the face, which is shifted, tilted and scaled in the picture."""
    line = (np.arange(SIDE) + 0.5) / (SIDE / 2) - 1
    y, x = np.meshgrid(line, line, indexing="ij")
    tilt, size = np.radians(rng.normal(0, 10, (n, 1, 1))), rng.uniform(0.8, 1.15, (n, 1, 1))
    x, y = x - rng.normal(0, 0.12, (n, 1, 1)), y - rng.normal(0, 0.10, (n, 1, 1))
    return (np.cos(tilt) * x + np.sin(tilt) * y) / size, (np.cos(tilt) * y - np.sin(tilt) * x) / size


def _photograph(picture: np.ndarray, u: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add light from a side, a covered patch in every other picture, contrast and noise."""
    n = len(picture)
    picture = picture * (1 + rng.normal(0, 0.25, (n, 1, 1)) * u)
    row, column = np.arange(SIDE)[:, None], np.arange(SIDE)
    for i in np.flatnonzero(rng.random(n) < 0.5):
        top, left, height, width = *rng.integers(-6, SIDE - 6, 2), *rng.integers(6, 18, 2)
        covered = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)
        picture[i][covered] = rng.uniform(0, 1)
    picture = (picture - 0.5) * rng.uniform(0.5, 1.1, (n, 1, 1)) + rng.uniform(0.35, 0.65, (n, 1, 1))
    picture = picture + rng.uniform(0.02, 0.10, (n, 1, 1)) * rng.standard_normal(picture.shape)
    return (255 * np.clip(picture, 0, 1)).astype(np.uint8)


def _inside(distance: np.ndarray, blur: float) -> np.ndarray:
    """Return 1 where ``distance`` is positive, 0 where negative, with a soft edge."""
    return 1 / (1 + np.exp(np.clip(-distance / (0.5 * blur), -40, 40)))


def _over(picture: np.ndarray, grey: np.ndarray | float, mask: np.ndarray) -> np.ndarray:
    return picture + (grey - picture) * mask


def main(argv: list[str] | None = None) -> None:
    folder = Path(parse(argv).folder)
    folder.mkdir(parents=True, exist_ok=True)
    for number, (face, label) in enumerate(zip(*toy_faces(2 * len(CLASSES), seed=2**31), strict=True)):
        Image.fromarray(face).save(folder / f"{number:02d}-{CLASSES[label]}.png")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draw two toy faces of each expression, new to any trained network.")
    parser.add_argument("folder", metavar="FOLDER", help="where to write them; created if missing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
