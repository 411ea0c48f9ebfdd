"""The CIFAR ResNets of He et al. (2016, section 4.2), and CIFAR-10 images read from a file of JPEGs."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Two convolutions; a strided shortcut drops every second pixel and pads the channels with zeros (option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.pad = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """A CIFAR ResNet: three blocks per stage make ResNet-20, nine ResNet-56.

    Shape:
        n 3 H W -> n classes
    """

    def __init__(self, blocks: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(*(Block(inputs if i == 0 else width, width, stride if i == 0 else 1) for i in range(blocks)))
            for inputs, width, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        )
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def stem(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)))

    def head(self, x: Tensor) -> Tensor:
        return self.linear(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer3(self.layer2(self.layer1(self.stem(x)))))


def read_pictures(path: str | Path, split: str) -> tuple[Tensor, Tensor]:
    """Return the images of "train" or "test", uint8 (n, 3, 32, 32), and their labels, (n,)."""
    with np.load(path, allow_pickle=False) as arrays:
        data, lengths = arrays[f"{split}_bytes"].tobytes(), arrays[f"{split}_lengths"].astype(np.int64)
        labels = torch.from_numpy(arrays[f"{split}_labels"].astype(np.int64))
    ends = lengths.cumsum()
    pictures = [Image.open(io.BytesIO(data[end - n : end])) for end, n in zip(ends, lengths, strict=True)]
    images = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels


def to_input(images: Tensor) -> Tensor:
    """Convert uint8 images (n, 3, H, W) to float32, normalised as the published weights expect."""

    def column(values: tuple[float, ...]) -> Tensor:  # made on the device: a CUDA graph cannot copy from the host
        return torch.stack([torch.full((), value, device=images.device) for value in values]).view(1, 3, 1, 1)

    mean, std = column(MEAN), column(STD)
    return (images.float() / 255 - mean) / std


def augment(images: Tensor) -> Tensor:
    """Shift each uint8 image by up to four pixels, mirror it at random, and return normalised float32."""
    n, _, height, width = images.shape
    padded = F.pad(to_input(images), (4, 4, 4, 4)).permute(0, 2, 3, 1)
    top, left, mirrored = (torch.rand(n, 1, device=images.device) * k for k in (9, 9, 2))
    rows = top.long() + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(n, width)
    columns = left.long() + torch.where(mirrored < 1, columns, width - 1 - columns)
    sample = torch.arange(n, device=images.device).view(n, 1, 1)
    return padded[sample, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)
