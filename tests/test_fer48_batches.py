"""The example's training batches: which rows, and how each face is augmented."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torchvision.transforms.v2 import functional as tv

import batches
from batches import Strengths, augment, epoch_rows, erase, move, relight, to_input
from data.toy import toy_faces

NOTHING = Strengths(
    crop=1, stretch=1, shift=0, tilt=0, brightness=0, contrast=0, saturation=0, erase=0, erased=0, mirror=0
)


@pytest.fixture
def faces() -> torch.Tensor:
    """Return six colour faces in 0..1."""
    grey = torch.from_numpy(toy_faces(18, seed=0)[0])
    return grey.view(6, 3, 48, 48).float() / 255


def drawn(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Make every random number that share of its range."""
    monkeypatch.setattr(batches, "uniform", lambda x, low, high: torch.full((len(x),), low + share * (high - low)))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_an_epoch_takes_every_row_once():
    rows = epoch_rows(torch.arange(20) % 3, 0, generator())
    assert sorted(rows.tolist()) == list(range(20))
    assert rows.tolist() != list(range(20))


@pytest.mark.parametrize(("per_class", "each"), [(-1, 20), (8, 8), (33, 33)])
def test_a_balanced_epoch(per_class, each):
    """Classes are equally frequent; only small ones are repeated, evenly."""
    sizes = (100, 20, 5)  # the median is 20
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
    order = generator()
    rows = epoch_rows(labels, per_class, order)
    assert torch.bincount(labels[rows]).tolist() == [each] * 3
    counts = torch.bincount(rows, minlength=len(labels))
    for label, size in enumerate(sizes):
        mine = counts[labels == label]
        assert mine.min() >= each // size
        assert mine.max() <= -(-each // size)
    assert labels[rows[:each]].unique().numel() > 1  # shuffled, not class by class
    again = epoch_rows(labels, per_class, order)
    assert set(again.tolist()) != set(rows.tolist())  # another sample in the next epoch
    assert torch.equal(epoch_rows(labels, per_class, generator()), rows)


def test_a_class_without_faces_is_left_out():
    rows = epoch_rows(torch.tensor([0, 0, 6, 6, 6]), -1, generator())
    assert len(rows) == 4


def test_input_repeats_grey_in_three_channels_and_keeps_colours():
    grey = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2)
    assert to_input(grey).tolist() == [[[[-1.0, 1.0]]] * 3]
    colour = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    assert to_input(colour).flatten().tolist() == pytest.approx([-1, -0.6, 1])


@pytest.mark.parametrize("channels", [1, 3])
def test_strength_zero_changes_nothing(channels):
    images = torch.from_numpy(toy_faces(3 * channels, seed=0)[0]).view(3, channels, 48, 48)
    assert torch.allclose(augment(images, NOTHING), to_input(images), atol=2e-6)


def test_faces_differ_and_stay_in_range():
    images = torch.from_numpy(toy_faces(1, seed=0)[0]).expand(8, 1, 48, 48)
    out = augment(images, Strengths(mirror=0.5))
    assert out.shape == (8, 3, 48, 48)
    assert torch.equal(out[:, 0], out[:, 2])
    assert out.min() >= -1
    assert out.max() <= 1
    assert len({face.numpy().tobytes() for face in out}) == 8


def test_mirror_is_exact(faces):
    assert torch.allclose(move(faces, replace(NOTHING, mirror=1.0)), faces.flip(-1), atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_shift_by_whole_pixels(faces, monkeypatch, share):
    """All faces shift to the same corner by 6 of 48 pixels; the edge is repeated."""
    drawn(monkeypatch, share)
    moved = move(faces, replace(NOTHING, shift=6 / 48))
    padded = tv.pad(faces, [6], padding_mode="edge")
    start = 12 if share else 0
    assert torch.allclose(moved, padded[..., start : start + 48, start : start + 48], atol=1e-5)


def test_a_tilt_is_torchvisions(faces, monkeypatch):
    drawn(monkeypatch, 1.0)
    turned = move(faces, replace(NOTHING, tilt=10.0))
    expected = tv.rotate(faces, 10.0, interpolation=tv.InterpolationMode.BILINEAR)
    inside = slice(8, 40)  # torchvision fills the corners with black, we repeat the edge
    assert torch.allclose(turned[..., inside, inside], expected[..., inside, inside], atol=1e-4)


def test_a_crop_is_torchvisions(faces, monkeypatch):
    """Crop half of each side at the bottom right: the last 24 pixels, enlarged."""
    monkeypatch.setattr(batches, "uniform", lambda x, low, high: torch.full((len(x),), 0.5 if low == 0.5 else high))
    cropped = move(faces, replace(NOTHING, crop=0.5))
    expected = tv.resized_crop(faces, 24, 24, 24, 24, [48, 48], antialias=False)
    assert torch.allclose(cropped[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["brightness", "contrast", "saturation"])
def test_light_is_torchvisions(faces, monkeypatch, kind, share):
    drawn(monkeypatch, share)
    changed = relight(faces, replace(NOTHING, **{kind: 0.4}))
    adjust = {"brightness": tv.adjust_brightness, "contrast": tv.adjust_contrast, "saturation": tv.adjust_saturation}
    assert torch.allclose(changed, adjust[kind](faces, 0.6 + 0.8 * share), atol=2e-3)
    assert not torch.allclose(changed, faces, atol=2e-2)


def test_erasing_covers_one_rectangle_within_its_size(faces):
    torch.manual_seed(0)
    many = faces.repeat(20, 1, 1, 1) * 0.4  # no pixel is 0.5 already
    out = erase(many, replace(NOTHING, erase=0.5, erased=0.2))
    hit = (out == 0.5).all(1)
    share = hit.flatten(1).float().mean(1)
    assert 0.3 < (share > 0).float().mean() < 0.7
    assert share.max() <= 0.2 * 1.15  # whole pixels
    for mask in hit[share > 0]:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        assert mask.sum() == len(rows) * len(columns)
        assert rows[-1] - rows[0] + 1 == len(rows)
        assert columns[-1] - columns[0] + 1 == len(columns)
    assert torch.equal(out[share == 0], many[share == 0])
    assert torch.equal(erase(many, replace(NOTHING, erase=1.0, erased=0.0)), many)
