"""Detect faces in pictures, videos and cameras, with MTCNN if facenet-pytorch is installed, or OpenCV's cascade."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

Box = tuple[int, int, int, int]
CASCADE = "haarcascade_frontalface_default.xml"
#: Smaller faces have too few pixels for a prediction.
SMALLEST = 24


class DetectError(Exception):
    """Faces cannot be detected; the message says what is missing."""


class Detector(Protocol):
    """Finds the faces in a picture."""

    def boxes(self, picture: np.ndarray) -> list[Box]:
        """Return (left, top, right, bottom) of every face in an RGB uint8 picture (H, W, 3), largest first."""


class Cascade:
    """OpenCV's frontal-face cascade: upright faces that look at the camera; it misses profiles and tilted faces."""

    def __init__(self) -> None:
        cv2 = _opencv()
        path = Path(cv2.data.haarcascades) / CASCADE
        if not hasattr(cv2, "CascadeClassifier") or not path.exists():
            raise DetectError(
                f"OpenCV {cv2.__version__} comes without {CASCADE}: pip install cropvote[detect] for 4.x."
            )
        self.cascade = cv2.CascadeClassifier(str(path))

    def boxes(self, picture: np.ndarray) -> list[Box]:
        grey = _opencv().cvtColor(np.ascontiguousarray(picture), _opencv().COLOR_RGB2GRAY)
        found = self.cascade.detectMultiScale(grey, scaleFactor=1.1, minNeighbors=5, minSize=(SMALLEST, SMALLEST))
        return _largest_first([(int(x), int(y), int(x + w), int(y + h)) for x, y, w, h in found])


class Mtcnn:
    """facenet-pytorch's MTCNN, whose weights its package includes: also tilted faces and those half turned away.

    Reference:
        Zhang, Zhang, Li and Qiao, Joint face detection and alignment using multitask cascaded convolutional networks,
        2016.
    """

    def __init__(self) -> None:
        try:
            from facenet_pytorch import MTCNN
        except ImportError as error:
            raise DetectError(f"facenet-pytorch is installed, but cannot be imported: {error}.") from error
        self.network = MTCNN(keep_all=True, min_face_size=SMALLEST)

    def boxes(self, picture: np.ndarray) -> list[Box]:
        if min(picture.shape[:2]) < SMALLEST:
            return []
        found, _ = self.network.detect(np.ascontiguousarray(picture))
        return _largest_first([_squared(*map(float, box)) for box in ([] if found is None else found)])


def best_detector() -> Detector:
    """Return MTCNN if facenet-pytorch is installed, and otherwise the cascade.

    Raises:
        DetectError: OpenCV is not installed either, or facenet-pytorch cannot be imported.
    """
    return Mtcnn() if importlib.util.find_spec("facenet_pytorch") else Cascade()


def _squared(left: float, top: float, right: float, bottom: float) -> Box:
    """Return the square around a box, for a face that is not squeezed when it is resized."""
    half, x, y = max(right - left, bottom - top) / 2, (left + right) / 2, (top + bottom) / 2
    return round(x - half), round(y - half), round(x + half), round(y + half)


def _largest_first(boxes: list[Box]) -> list[Box]:
    return sorted(boxes, key=lambda box: (box[1] - box[3]) * (box[2] - box[0]))


def watch(source: str) -> Iterator[np.ndarray]:
    """Yield the frames of a camera (by number) or a video, RGB uint8 (H, W, 3), until Ctrl+C or the end.

    Raises:
        DetectError: If the camera or video cannot be opened.
    """
    cv2 = _opencv()
    camera = cv2.VideoCapture(int(source) if source.isdecimal() else source)
    try:
        if not camera.isOpened():
            raise DetectError(f"--webcam {source}: no such camera or film.")
        while True:
            there, frame = camera.read()
            if not there:
                return
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
    except KeyboardInterrupt:
        return
    finally:
        camera.release()


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise DetectError("--detect and --webcam need OpenCV: pip install cropvote[detect].") from error
    return cv2
