"""Measure time and memory of a voting network against the plain one and test-time augmentation: docs/speed.md.

    python benchmarks/speed.py [--device cuda] [--rounds 15]

The paper's network at 48x48, on random images. Every network runs once per round; the figures are medians and ratios to
the plain network. The results for this type of device are stored in benchmarks/results/speed.json.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import ttach
from torch import Tensor, nn
from torchvision.transforms.functional import ten_crop as torchvision_ten_crop

from cropvote import CropVoteLoss, inject_crop_vote, profile

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples" / "fer48"))

from model import fer_resnet18  # noqa: E402
from pages import folded, wrapped  # noqa: E402
from timing import machine, seconds  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "speed.json"
PAGE = ROOT / "docs" / "speed.md"
SITES = ("layer1", "layer2", "layer3")
HAND, TTACH, TENCROP = "written by hand, after layer1", "ttach, five crops and mirror images", "torchvision's TenCrop"
#: On the page.
LABELS = {HAND: "ten views written by hand, after layer1", TTACH: "ttach, five crops and their mirror images"}
#: Networks that must give the same output.
ALIKE = {"cropvote after layer1": [HAND], "cropvote after input": [TTACH, TENCROP]}


class TenCrop(nn.Module):
    """Ten crops of the images, as torchvision's documentation shows."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        crops = torch.stack(torchvision_ten_crop(x, [40, 40]), dim=1)
        return self.model(crops.flatten(0, 1)).unflatten(0, (x.shape[0], 10)).mean(1)


class ByHand(nn.Module):
    """Ten views after layer1, written for this network alone, without the library."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        net = self.model
        x = net.layer1(net.relu(net.bn1(net.conv1(x))))
        views = []
        for half in (x, x.flip(3)):
            views += [half[:, :, i : i + 40, j : j + 40] for i, j in ((0, 0), (0, 8), (8, 0), (8, 8), (4, 4))]
        x = net.layer4(net.layer3(net.layer2(torch.cat(views))))
        return net.fc(net.avgpool(x).flatten(1)).unflatten(0, (10, -1)).mean(0)


def networks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the plain network and every voting variant, with the same weights."""
    found: dict[str, nn.Module] = {"plain": model}
    for site in (*SITES, "input"):
        found[f"cropvote after {site}"] = inject_crop_vote(copy.deepcopy(model), after=site, input_size=48)
    centred = inject_crop_vote(copy.deepcopy(model), after="layer1", input_size=48, eval_views="centre+mirror")
    found["cropvote after layer1, centre + mirror"] = centred
    found[HAND] = ByHand(copy.deepcopy(model))
    crops = ttach.Compose([ttach.HorizontalFlip(), ttach.FiveCrops(40, 40)])
    found[TTACH] = ttach.ClassificationTTAWrapper(copy.deepcopy(model), crops)
    found[TENCROP] = TenCrop(copy.deepcopy(model))
    return {name: network.eval() for name, network in found.items()}


def gmacs(model: nn.Module) -> dict[str, float]:
    table = profile(model, 48, sites=list(SITES))
    found = {"plain": table["baseline"].gmacs, **{f"cropvote after {s}": table[s].gmacs for s in (*SITES, "input")}}
    found["cropvote after layer1, centre + mirror"] = table["layer1"].gmacs_by_views[2]
    found[HAND] = table["layer1"].gmacs
    for peer in (TTACH, TENCROP):
        found[peer] = table["input"].gmacs
    return found


def interleaved(calls: dict[str, Callable[[], Any]], device: torch.device, rounds: int) -> dict[str, dict[str, float]]:
    """Return the median seconds, and the median and quartiles over rounds of the ratio to the first call."""
    for call in calls.values():
        call(), call()
    taken = [{name: seconds(call, device) for name, call in calls.items()} for _ in range(rounds)]
    first = next(iter(calls))
    found = {}
    for name in calls:
        low, middle, high = statistics.quantiles([times[name] / times[first] for times in taken], n=4)
        found[name] = {"ms": 1e3 * statistics.median(t[name] for t in taken), "ratio": middle, "q1": low, "q3": high}
    return found


def inference(device: torch.device, batch: int, rounds: int, compiled: bool, half: bool) -> dict[str, Any]:
    """Measure all networks on one batch, in one mode."""
    torch.manual_seed(0)
    found = {name: network.to(device) for name, network in networks(fer_resnet18()).items()}
    images = torch.randn(batch, 3, 48, 48, device=device)
    with torch.no_grad():
        for ours, others in ALIKE.items():
            if max(float((found[ours](images) - found[other](images)).abs().max()) for other in others) > 1e-3:
                raise SystemExit(f"{ours} does not agree with {', '.join(others)}")
        if compiled:
            torch._dynamo.reset()
            found = {name: torch.compile(network) for name, network in found.items()}
        cast = torch.autocast(device.type, torch.bfloat16) if half else contextlib.nullcontext()
        with cast:
            return interleaved({n: (lambda m=m: m(images)) for n, m in found.items()}, device, rounds)


def training(device: torch.device, batch: int, rounds: int) -> dict[str, Any]:
    """Measure forward and backward passes, with a loss on every view."""
    torch.manual_seed(0)
    images, targets = torch.randn(batch, 3, 48, 48, device=device), torch.randint(7, (batch,), device=device)
    loss = CropVoteLoss(nn.CrossEntropyLoss())
    plain = fer_resnet18().to(device)
    calls: dict[str, Callable[[], Any]] = {"plain": lambda: loss(plain(images), targets).backward()}
    for site in SITES:
        model = inject_crop_vote(copy.deepcopy(plain), after=site, input_size=48).train()
        calls[f"cropvote after {site}"] = lambda model=model: loss(model(images), targets).backward()
    few = inject_crop_vote(copy.deepcopy(plain), after="layer1", input_size=48, train_views=3).train()
    calls["cropvote after layer1, three of ten views"] = lambda: loss(few(images), targets).backward()
    return interleaved(calls, device, rounds)


def page(stored: dict[str, Any], more: list[str]) -> str:
    """Return docs/speed.md; ``more`` is the section from benchmarks/throughput.py."""
    lines = [
        "# Speed and memory", "",
        *wrapped("""
            **What to do: on a CPU, a vote takes about as long as its multiply-add count suggests, so choose the site by
            the [cost table](guides/choosing-a-site.md). If you can afford only 1.3 times the plain network's time, use
            `eval_views="centre+mirror"` after `layer1`. Train with two or three views, not ten.**"""),
        "",
    ]  # fmt: skip
    how = """
        Made by `python benchmarks/speed.py`: the paper's network (11.2 M parameters, images 48×48, seven classes),
        with the same weights in every row, on random images. In each round, every network is timed once, in turn.
        Milliseconds per batch are medians over the rounds. We divide a network's time by the plain network's in the
        same round; the table gives the median and the quartiles of these ratios. `GMACs / plain` is the number of
        multiply-adds relative to the plain network's. A network's
        time ratio may be below its GMACs ratio, since a larger batch of smaller maps often runs more efficiently."""
    lines += folded("How it was measured", wrapped(how))
    for result in stored.values():
        lines += [f"## {result['machine']}", "", f"{result['versions']}; batch {result['batch']}, {result['rounds']} "
                  "rounds.", ""]  # fmt: skip
        first, *others = result["inference"].items()
        lines += [f"### Inference, {first[0]}", "", *table(first[1], result["gmacs"]), ""]
        lines += ["### Training step (forward and backward, float32, eager)", "", *table(result["training"], {}), ""]
        for title, times in others:
            lines += folded(f"Inference, {title}", table(times, result["gmacs"]))
    return "\n".join([*lines, *more])


def table(times: dict[str, Any], work: dict[str, float]) -> list[str]:
    head = ["network", "ms", "time / plain", "quartiles", *["GMACs / plain"] * bool(work)]
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    for name, row in times.items():
        cells = [
            LABELS.get(name, name),
            f"{row['ms']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['q1']:.2f} – {row['q3']:.2f}",
        ]
        cells += [f"{work[name] / work['plain']:.2f}"] if work else []
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, help="batch size; default: 8 on a CPU, 512 elsewhere")
    parser.add_argument("--page", action="store_true", help="rewrite docs/speed.md without measuring")
    arguments = parser.parse_args()
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not arguments.page:
        device = torch.device(arguments.device)
        batch, rounds = arguments.batch or (8 if device.type == "cpu" else 512), arguments.rounds
        modes = {f"{dtype}, {how}": (how == "compiled", dtype == "bfloat16 autocast")
                 for how in ("eager", "compiled") for dtype in ("float32", "bfloat16 autocast")}  # fmt: skip
        measured: dict[str, Any] = {}
        for title, (compiled, half) in modes.items():
            measured[title] = inference(device, batch, rounds, compiled, half)
            print(title, *table(measured[title], gmacs(fer_resnet18())), sep="\n", flush=True)
        stored[device.type] = {
            "machine": machine(device),
            "versions": f"torch {torch.__version__}, Python {platform.python_version()}",
            "batch": batch,
            "rounds": rounds,
            "gmacs": gmacs(fer_resnet18()),
            "inference": measured,
            "training": training(device, batch, rounds),
        }
        RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
    import throughput  # here, because it imports this file

    PAGE.write_text(page(stored, throughput.section()))


if __name__ == "__main__":
    main()
