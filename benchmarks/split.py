"""Compare time and memory of ``split_views`` and stacked slices, forward and backward, in one interleaved run.

python benchmarks/split.py [--device cuda] [--rounds 9]
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from cropvote import split_views, ten_crop
from timing import peak, seconds

SHAPE = (64, 64, 48, 48)
VIEWS = ten_crop()


def naive(x: Tensor) -> Tensor:
    """Split as one would without the library."""
    (h, w), mirrored = VIEWS.crop_size(*x.shape[2:]), x.flip(-1)
    places = zip(VIEWS, VIEWS.offsets(*x.shape[2:]), strict=True)
    crops = [(mirrored if view.mirror else x)[..., t : t + h, left : left + w] for view, (t, left) in places]
    return torch.stack(crops, 1).flatten(0, 1)


def ours(x: Tensor) -> Tensor:
    return split_views(x, VIEWS)


def run(function: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    y = function(x)
    return y, torch.autograd.grad(y, x, gradient)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    threads = f"{torch.get_num_threads()} threads" if arguments.device == "cpu" else torch.cuda.get_device_name()
    print(f"float32 {SHAPE}, forward + backward; torch {torch.__version__}, {platform.machine()}, {threads}")
    print(f"{'memory format':<18}{'':<8}{'median ms':>10}{'ratio':>8}{'peak MiB':>10}{'ratio':>8}")
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        x = torch.randn(SHAPE, device=arguments.device).contiguous(memory_format=memory_format).requires_grad_()
        gradient = torch.randn_like(ours(x)).contiguous(memory_format=memory_format)
        expected, found = run(naive, x, gradient), run(ours, x, gradient)
        if not torch.equal(expected[0], found[0]) or not torch.allclose(expected[1], found[1], atol=1e-5):
            raise SystemExit("the results differ")
        del expected, found
        times: dict[Callable[[Tensor], Tensor], list[float]] = {naive: [], ours: []}
        for _ in range(arguments.rounds):
            for function, measured in times.items():
                measured.append(seconds(partial(run, function, x, gradient), x.device))
        base, base_peak = statistics.median(times[naive]), peak(partial(run, naive, x, gradient), x.device)
        for function, measured in times.items():
            middle, most = statistics.median(measured), peak(partial(run, function, x, gradient), x.device)
            print(
                f"{str(memory_format)[6:]:<18}{function.__name__:<8}{1e3 * middle:>10.1f}{middle / base:>8.2f}"
                f"{most:>10.1f}{most / base_peak:>8.2f}"
            )


if __name__ == "__main__":
    main()
