"""Detect faces in pictures, videos and cameras with OpenCV's frontal-face cascade, which its package includes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

CASCADE = "haarcascade_frontalface_default.xml"
#: Smaller faces have too few pixels for a prediction.
SMALLEST = 24


class DetectError(Exception):
    """Faces cannot be detected; the message says what is missing."""


class Detector:
    """Finds upright faces that look at the camera; it misses profiles, tilted and covered faces."""

    def __init__(self) -> None:
        cv2 = _opencv()
        path = Path(cv2.data.haarcascades) / CASCADE
        if not hasattr(cv2, "CascadeClassifier") or not path.exists():
            raise DetectError(
                f"OpenCV {cv2.__version__} comes without {CASCADE}: pip install cropvote[detect] for 4.x."
            )
        self.cascade = cv2.CascadeClassifier(str(path))

    def boxes(self, picture: np.ndarray) -> list[tuple[int, int, int, int]]:
        """Return (left, top, right, bottom) of every face in an RGB uint8 picture (H, W, 3), largest first."""
        grey = _opencv().cvtColor(np.ascontiguousarray(picture), _opencv().COLOR_RGB2GRAY)
        found = self.cascade.detectMultiScale(grey, scaleFactor=1.1, minNeighbors=5, minSize=(SMALLEST, SMALLEST))
        boxes = [(int(x), int(y), int(x + w), int(y + h)) for x, y, w, h in found]
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
