"""Measure the library's own overhead: a call with one image, an image of a new size, an injection, a list of sites.

    python benchmarks/overhead.py            print the figures of this version

The networks run in turn, and the times are medians over the rounds. The tiny network does almost no work, so its time
is Python overhead; the baseline for an injection is a hand-written vote (slices, one stack, the tail, a mean).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn

from cropvote import CropVote, inject_crop_vote, settings, sites

ROUNDS, CALLS = 40, 30
MODELS = {"resnet50": "layer1", "efficientnet_b0": "blocks.1", "swin_tiny_patch4_window7_224": "layers.0"}


def tiny() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    ).eval()


def by_hand(net: nn.Sequential, x: Tensor) -> Tensor:
    """Vote over ten 7×7 views of the 8×8 feature map after the first module."""
    y = net[0](x)
    crops = [z[:, :, r : r + 7, c : c + 7] for z in (y, y.flip(3)) for r, c in ((0, 0), (0, 1), (1, 0), (1, 1), (0, 0))]
    rows: Tensor = net[1:](torch.stack(crops, 1).flatten(0, 1))
    return rows.view(len(x), 10, -1).mean(1)


def microseconds(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            taken[name].append((time.perf_counter() - start) / CALLS)
    return {name: 1e6 * statistics.median(times) for name, times in taken.items()}


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    x, net = torch.randn(1, 3, 8, 8), tiny()
    voting, off = (inject_crop_vote(tiny(), after="0", input_size=8) for _ in range(2))
    untracked, layer = inject_crop_vote(tiny(), after="0", check=False), tiny()
    settings(off).enabled = False
    layer = nn.Sequential(layer[0], CropVote(layer[1:])).eval()
    calls = {"plain": lambda: net(x), "by hand": lambda: by_hand(net, x), "injected": lambda: voting(x),
             "injected, check=False": lambda: untracked(x), "injected, enabled=False": lambda: off(x),
             "CropVote": lambda: layer(x)}  # fmt: skip
    times = microseconds(calls)
    print("tiny network, a call with one 8×8 image:")
    for name, taken in times.items():
        print(f"  {name:24} {taken:7.1f} us, {taken / times['by hand']:.2f} times by hand")
    for name, site in MODELS.items():
        model = timm.create_model(name).eval()
        start = time.perf_counter()
        sites(model)
        listed = time.perf_counter() - start
        start = time.perf_counter()
        inject_crop_vote(model, after=site)
        print(f"{name}: sites {listed:.1f} s, inject_crop_vote {time.perf_counter() - start:.1f} s")
    model = inject_crop_vote(timm.create_model("resnet50").eval(), after="layer1")
    model(torch.randn(1, 3, 224, 224))
    for side in (192, 192, 160, 160):
        start = time.perf_counter()
        model(torch.randn(1, 3, side, side))
        print(f"resnet50, one image of {side}×{side}: {1e3 * (time.perf_counter() - start):.0f} ms")


if __name__ == "__main__":
    main()
