"""What a training batch is made of: which faces, in which order, and what is done to each of them.

Everything runs on the device that holds the faces, all faces of a batch at once, each with random numbers of its own;
nothing waits for the device. One resampling does crop, shift, tilt and mirror image, so a face is blurred once.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: ITU-R BT.601: how much red, green and blue count for the grey that saturation moves to or from.
GREY = (0.299, 0.587, 0.114)


def option(default: Any, text: str, **more: Any) -> Any:
    """A field that is an option of the command line: its default, its help, and ``choices``, ``least``, ``most``."""
    return dataclasses.field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True)
class Strengths:
    """How far faces are altered; the kinds are the paper's, the strengths ours, as it names none."""

    crop: float = option(0.8, "smallest share of a side that a crop keeps", least=0.1, most=1.0)
    stretch: float = option(1.1, "most that a crop's width to height may differ from 1", least=1.0, most=2.0)
    shift: float = option(0.08, "most that a face moves, in sides", least=0.0, most=1.0)
    tilt: float = option(10.0, "most that a face turns, in degrees", least=0.0, most=180.0)
    brightness: float = option(0.25, "most that brightness changes, as a factor", least=0.0, most=1.0)
    contrast: float = option(0.25, "most that contrast changes, as a factor", least=0.0, most=1.0)
    saturation: float = option(
        0.25, "most that saturation changes, as a factor; nothing on grey faces", least=0.0, most=1.0
    )
    erase: float = option(0.5, "probability that a rectangle is erased", least=0.0, most=1.0)
    erased: float = option(0.15, "most that the rectangle covers, as a share of the face", least=0.0, most=1.0)
    mirror: float = option(0.0, "probability of a mirror image", least=0.0, most=1.0)


def epoch_rows(labels: Tensor, per_class: int, generator: torch.Generator) -> Tensor:
    """The rows of one epoch, shuffled, (m,) on the CPU.

    ``per_class`` 0: every row once. Else that many rows of each class (-1: as many as the median class has): a larger
    class is sampled without repetition, a smaller one repeated as a whole as often as it fits, the rest drawn.
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
    """uint8 (n, c, H, W) -> float32 (n, 3, H, W) in -1..1; a grey face stands in all three channels."""
    return (images.float() / 127.5 - 1).expand(-1, 3, -1, -1)


def augment(images: Tensor, how: Strengths) -> Tensor:
    """uint8 (n, c, H, W) -> float32 (n, 3, H, W) in -1..1, every face altered in its own way."""
    x = move(images.float() / 255, how)
    return (erase(relight(x, how), how) * 2 - 1).expand(-1, 3, -1, -1)


def move(x: Tensor, how: Strengths) -> Tensor:
    """Crop, shift, tilt and mirror, resampled once; what lies outside repeats the edge. (n, c, H, W) -> the same."""
    n, height, width = len(x), *x.shape[-2:]
    size = uniform(x, how.crop, 1)
    tall = torch.exp(uniform(x, -math.log(how.stretch), math.log(how.stretch)) / 2)
    high, wide = (size * tall).clamp(max=1), (size / tall).clamp(max=1)
    tilt = uniform(x, -how.tilt, how.tilt) * (math.pi / 180)
    flip = 1 - 2 * (uniform(x, 0, 1) < how.mirror).float()
    # affine_grid maps an output pixel to where it is read, both in -1..1: a crop's centre lies within its margin
    right = uniform(x, -1, 1) * (1 - wide) + 2 * uniform(x, -how.shift, how.shift)
    down = uniform(x, -1, 1) * (1 - high) + 2 * uniform(x, -how.shift, how.shift)
    cos, sin, aspect = tilt.cos(), tilt.sin(), width / height
    read = torch.stack(
        [flip * wide * cos, -high * sin / aspect, right, flip * wide * sin * aspect, high * cos, down], 1
    )
    grid = F.affine_grid(read.view(n, 2, 3), [n, 1, height, width], align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def relight(x: Tensor, how: Strengths) -> Tensor:
    """Brightness, contrast and saturation, each by a factor around 1; (n, c, H, W) in 0..1 -> the same."""
    x = (x * factor(x, how.brightness)).clamp(0, 1)
    mean = _grey(x).mean(dim=(1, 2, 3), keepdim=True)
    x = (mean + (x - mean) * factor(x, how.contrast)).clamp(0, 1)
    if x.shape[1] == 1:
        return x
    grey = _grey(x)
    return (grey + (x - grey) * factor(x, how.saturation)).clamp(0, 1)


def erase(x: Tensor, how: Strengths) -> Tensor:
    """With probability ``erase`` a rectangle inside the face becomes middle grey; (n, c, H, W) -> the same."""
    n, height, width = len(x), *x.shape[-2:]
    area, tall = uniform(x, min(0.02, how.erased), how.erased), torch.exp(uniform(x, -1, 1) * math.log(3) / 2)
    high, wide = ((area.sqrt() * tall).clamp(max=1) * height, (area.sqrt() / tall).clamp(max=1) * width)
    top, left = uniform(x, 0, 1) * (height - high), uniform(x, 0, 1) * (width - wide)
    row, column = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    inside_rows = (row >= top.view(n, 1)) & (row < (top + high).view(n, 1))
    inside_columns = (column >= left.view(n, 1)) & (column < (left + wide).view(n, 1))
    hit = (uniform(x, 0, 1) < how.erase).view(n, 1, 1, 1)
    return x.masked_fill(inside_rows.view(n, 1, height, 1) & inside_columns.view(n, 1, 1, width) & hit, 0.5)


def factor(x: Tensor, strength: float) -> Tensor:
    return uniform(x, 1 - strength, 1 + strength).view(-1, 1, 1, 1)


def uniform(x: Tensor, low: float, high: float) -> Tensor:
    """One number for each face of ``x``, on its device, (n,)."""
    return low + (high - low) * torch.rand(len(x), device=x.device)


def _grey(x: Tensor) -> Tensor:
    """(n, c, H, W) -> (n, 1, H, W)."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x.split(1, dim=1)
    return GREY[0] * red + GREY[1] * green + GREY[2] * blue
