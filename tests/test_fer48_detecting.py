"""detecting.py: the boxes of MTCNN, if its package is installed, and of the cascade."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types

import numpy as np
import pytest
from skimage.data import astronaut

import detecting

FACE = (170, 65, 280, 180)  # of NASA's portrait, by eye


@pytest.fixture
def package(monkeypatch):
    """Install a stand-in for facenet-pytorch; return a function that sets what its network finds."""
    module = types.ModuleType("facenet_pytorch")
    module.__spec__ = importlib.machinery.ModuleSpec("facenet_pytorch", None)
    monkeypatch.setitem(sys.modules, "facenet_pytorch", module)

    def find(boxes):
        class MTCNN:
            def __init__(self, keep_all, min_face_size):
                assert keep_all
                assert min_face_size == detecting.SMALLEST

            def detect(self, picture):
                assert picture.flags["C_CONTIGUOUS"]
                return boxes, boxes

        module.MTCNN = MTCNN

    return find


def test_mtcnn_is_used_if_it_is_there_and_its_boxes_become_squares(package):
    package(np.array([[10.0, 20.0, 30.0, 60.0], [100.0, 100.0, 180.0, 200.0]], dtype=np.float32))
    detector = detecting.best_detector()
    assert isinstance(detector, detecting.Mtcnn)
    boxes = detector.boxes(np.zeros((300, 300, 3), np.uint8)[::2, ::2])
    assert boxes == [(90, 100, 190, 200), (0, 20, 40, 60)]
    assert all(type(edge) is int for box in boxes for edge in box)
    assert detector.boxes(np.zeros((12, 300, 3), np.uint8)) == []
    package(None)
    assert detecting.best_detector().boxes(np.zeros((300, 300, 3), np.uint8)) == []


def test_a_package_that_cannot_be_imported_is_named(package):
    with pytest.raises(detecting.DetectError, match="facenet-pytorch is installed, but cannot be imported"):
        detecting.best_detector()


@pytest.mark.parametrize("kind", [detecting.Cascade, detecting.Mtcnn])
def test_a_real_face_is_found(kind):
    if kind is detecting.Mtcnn and importlib.util.find_spec("facenet_pytorch") is None:
        pytest.skip("facenet-pytorch is not installed")
    left, top, right, bottom = kind().boxes(astronaut())[0]
    width, height = min(right, FACE[2]) - max(left, FACE[0]), min(bottom, FACE[3]) - max(top, FACE[1])
    assert width * height > 0.6 * (right - left) * (bottom - top)
    assert abs((right - left) - (bottom - top)) <= 1
