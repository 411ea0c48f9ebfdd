"""Training batches: which faces, in which order, and how they are augmented.

Everything runs on the device of the faces, on the whole batch at once, with different random numbers for each face, and
without synchronising. Crop, shift, tilt and mirroring share one resampling, so a face is blurred only once.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: ITU-R BT.601: the weights of red, green and blue in the grey image, used to change saturation.
GREY = (0.299, 0.587, 0.114)


def option(default: Any, text: str, **more: Any) -> Any:
    """Return a dataclass field that is also a command-line option, with help and ``choices``, ``least``, ``most``."""
    return dataclasses.field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True)
class Strengths:
    """How strongly faces are augmented: the paper's augmentations; it gives no strengths, so we chose them."""

    crop: float = option(0.8, "the least share of a side that a crop keeps", least=0.1, most=1.0)
    stretch: float = option(1.1, "the largest aspect ratio of a crop", least=1.0, most=2.0)
    shift: float = option(0.08, "the largest shift, as a share of the side", least=0.0, most=1.0)
    tilt: float = option(10.0, "the largest rotation, in degrees", least=0.0, most=180.0)
    brightness: float = option(0.25, "the largest relative change of brightness", least=0.0, most=1.0)
    contrast: float = option(0.25, "the largest relative change of contrast", least=0.0, most=1.0)
    saturation: float = option(
        0.25, "the largest relative change of saturation; no effect on grey faces", least=0.0, most=1.0
    )
    erase: float = option(0.5, "probability that a rectangle is erased", least=0.0, most=1.0)
    erased: float = option(0.15, "the largest area of the rectangle, as a share of the face", least=0.0, most=1.0)
    mirror: float = option(0.0, "probability of mirroring", least=0.0, most=1.0)


def epoch_rows(labels: Tensor, per_class: int, generator: torch.Generator) -> Tensor:
    """Return the shuffled rows of one epoch, (m,) on the CPU.

    With ``per_class`` 0, every row comes once. Otherwise every class gives that many rows (-1: the size of the median
    class): larger classes are sampled without replacement, smaller ones repeated and topped up with a random sample.
    """
    if per_class == 0:
        return torch.randperm(len(labels), generator=generator)
    classes = [torch.nonzero(labels == label).flatten() for label in labels.unique()]
    count = per_class if per_class > 0 else int(torch.tensor([len(c) for c in classes]).median())
    rows = []
    for members in classes:
        whole, rest = divmod(count, len(members))
        drawn = members[torch.randperm(len(members), generator=generator)[:rest]]
        rows.append(torch.cat([members.repeat(whole), drawn]))
    chosen = torch.cat(rows)
    return chosen[torch.randperm(len(chosen), generator=generator)]


def to_input(images: Tensor) -> Tensor:
    """Convert uint8 (n, c, H, W) to float32 (n, 3, H, W) in -1..1; a grey face fills all three channels."""
    return (images.float() / 127.5 - 1).expand(-1, 3, -1, -1)


def augment(images: Tensor, how: Strengths) -> Tensor:
    """Augment every face at random: uint8 (n, c, H, W) -> float32 (n, 3, H, W) in -1..1."""
    x = move(images.float() / 255, how)
    return (erase(relight(x, how), how) * 2 - 1).expand(-1, 3, -1, -1)


def move(x: Tensor, how: Strengths) -> Tensor:
    """Crop, shift, tilt and mirror in one resampling; the outside repeats the edge. (n, c, H, W) -> (n, c, H, W)."""
    n, height, width = len(x), *x.shape[-2:]
    size = uniform(x, how.crop, 1)
    tall = torch.exp(uniform(x, -math.log(how.stretch), math.log(how.stretch)) / 2)
    high, wide = (size * tall).clamp(max=1), (size / tall).clamp(max=1)
    tilt = uniform(x, -how.tilt, how.tilt) * (math.pi / 180)
    flip = 1 - 2 * (uniform(x, 0, 1) < how.mirror).float()
    # affine_grid maps output to input pixels, both in -1..1; a crop's centre stays within the free margin
    right = uniform(x, -1, 1) * (1 - wide) + 2 * uniform(x, -how.shift, how.shift)
    down = uniform(x, -1, 1) * (1 - high) + 2 * uniform(x, -how.shift, how.shift)
    cos, sin, aspect = tilt.cos(), tilt.sin(), width / height
    read = torch.stack(
        [flip * wide * cos, -high * sin / aspect, right, flip * wide * sin * aspect, high * cos, down], 1
    )
    grid = F.affine_grid(read.view(n, 2, 3), [n, 1, height, width], align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def relight(x: Tensor, how: Strengths) -> Tensor:
    """Scale brightness, contrast and saturation by factors around 1; (n, c, H, W) in 0..1 -> the same."""
    x = (x * factor(x, how.brightness)).clamp(0, 1)
    mean = _grey(x).mean(dim=(1, 2, 3), keepdim=True)
    x = (mean + (x - mean) * factor(x, how.contrast)).clamp(0, 1)
    if x.shape[1] == 1:
        return x
    grey = _grey(x)
    return (grey + (x - grey) * factor(x, how.saturation)).clamp(0, 1)


def erase(x: Tensor, how: Strengths, fill: float = 0.5) -> Tensor:
    """Fill a rectangle inside the face, middle grey, with probability ``erase``; (n, c, H, W) -> the same."""
    n, height, width = len(x), *x.shape[-2:]
    area, tall = uniform(x, min(0.02, how.erased), how.erased), torch.exp(uniform(x, -1, 1) * math.log(3) / 2)
    high, wide = ((area.sqrt() * tall).clamp(max=1) * height, (area.sqrt() / tall).clamp(max=1) * width)
    top, left = uniform(x, 0, 1) * (height - high), uniform(x, 0, 1) * (width - wide)
    row, column = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    inside_rows = (row >= top.view(n, 1)) & (row < (top + high).view(n, 1))
    inside_columns = (column >= left.view(n, 1)) & (column < (left + wide).view(n, 1))
    hit = (uniform(x, 0, 1) < how.erase).view(n, 1, 1, 1)
    return x.masked_fill(inside_rows.view(n, 1, height, 1) & inside_columns.view(n, 1, 1, width) & hit, fill)


def factor(x: Tensor, strength: float) -> Tensor:
    return uniform(x, 1 - strength, 1 + strength).view(-1, 1, 1, 1)


def uniform(x: Tensor, low: float, high: float) -> Tensor:
    """Return a random number for each face of ``x``, (n,), on the same device."""
    return low + (high - low) * torch.rand(len(x), device=x.device)


def _grey(x: Tensor) -> Tensor:
    """Convert (n, c, H, W) to grey, (n, 1, H, W)."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x.split(1, dim=1)
    return GREY[0] * red + GREY[1] * green + GREY[2] * blue
