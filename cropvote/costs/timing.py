"""Measure the time of real networks, plain and voting."""

from __future__ import annotations

import copy
import statistics
import time

import torch
from torch import Tensor, nn

from ..cuts import After
from ..errors import OptionError
from ..images import Example
from ..layouts import Layout
from ..probe.fakes import first_line
from ..surgery import inject_crop_vote
from ..views import Views
from .meters import image_size

__all__: list[str] = []


def measure_times(
    model: nn.Module,
    example: Example,
    views: Views,
    align: bool,
    networks_at: list[tuple[After, Layout | None]],
    device: str | torch.device | None,
    batch: int,
    rounds: int,
) -> list[float]:
    """Return milliseconds per image, plain and of every split: medians of rounds in which the networks take turns."""
    for name, value in (("batch", batch), ("rounds", rounds)):
        if type(value) is not int or value < 1:
            raise OptionError("CV824", f"{name} must be a whole number above 0, got {value!r}.")
    twin = copy.deepcopy(model).eval()
    if device is not None:
        try:
            twin = twin.to(device)
        except (RuntimeError, AssertionError) as error:  # raised by PyTorch if the device does not exist
            raise OptionError("CV825", f"device={str(device)!r} cannot be used: {first_line(error)}") from error
    tensors = [*twin.parameters(), *twin.buffers()]
    where = tensors[0].device if tensors else torch.device(device or "cpu")
    if where.type == "meta":
        raise OptionError("CV826", "a model on the meta device cannot be measured: it has no weights.")
    dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)
    images = torch.randn(batch, *image_size(example), generator=torch.Generator().manual_seed(0)).to(where, dtype)
    networks = [twin]
    for after, layout in networks_at:  # the same weights, in models of their own
        copied = copy.deepcopy(twin, {id(tensor): tensor for tensor in tensors})
        alone = views if isinstance(after, str) else None
        size = image_size(example)
        networks.append(inject_crop_vote(copied, after, views=alone, input_size=size, layout=layout, align=align))
    with torch.no_grad():
        for network in networks:
            network(images)
        taken = [[_seconds(network, images) for network in networks] for _ in range(rounds)]
    return [1e3 * statistics.median(times) / batch for times in zip(*taken, strict=True)]


def _seconds(network: nn.Module, images: Tensor) -> float:
    synchronise = getattr(getattr(torch, images.device.type, None), "synchronize", None)
    start = time.perf_counter()
    network(images)
    if synchronise is not None:
        synchronise()
    return time.perf_counter() - start
