"""Views at test time only: published pretrained networks, without further training.

    python benchmarks/at_test_time.py run --data cifar10_jpeg.npz     benchmarks/results/test_time.json
    python benchmarks/at_test_time.py run --data cifar10_jpeg.npz --networks resnet56 --shown    only the table's rows
    python benchmarks/at_test_time.py table                           print the stored results as a table

ResNet-20 and ResNet-56 on all 10,000 CIFAR-10 test images, as JPEGs: plain, with the mirrored input, with ten crops of
the input, and with views of the feature map after each stage: five crops of several sizes, with and without mirroring,
at the site or at the input. The weights, resnet20.safetensors and resnet56.safetensors, are in the data file's folder.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from scipy.stats import binomtest
from torch import Tensor

import cifar
from cropvote import Views, five_crop, hflip, inject_crop_vote, per_view, profile, remove_crop_vote, ten_crop

STORED = Path(__file__).parent / "results" / "test_time.json"
NETWORKS = {"resnet20": 3, "resnet56": 9}
SIDES = {"input": 32, "layer1": 32, "layer2": 16, "layer3": 8}
#: The stride from each site's feature map to the last feature map.
STRIDES = {"input": 4, "layer1": 4, "layer2": 2, "layer3": 1}


def ways() -> Iterator[tuple[str, dict[str, Views]]]:
    """Yield the name of each way to vote, and its sites."""
    yield "mirrored input", {"input": hflip()}
    yield "ten crops of the input", {"input": ten_crop(scale=Fraction(7, 8))}
    for site, side in SIDES.items():
        if site == "input":
            continue
        yield f"{site}: mirrored", {site: hflip()}
        for crop in range(side * 3 // 4, side):
            views = five_crop(scale=Fraction(crop, side))
            yield f"{site}: five crops of {crop}", {site: views}
            if (side - crop) % 2 == 0 and crop >= side * 5 // 6:
                yield f"{site}: ten crops of {crop}", {site: ten_crop(scale=Fraction(crop, side))}
                yield f"mirrored input, {site}: five crops of {crop}", {"input": hflip(), site: views}


def aligned(sites: dict[str, Views]) -> bool:
    """Return whether every view is aligned with the pixels of the last feature map."""
    for site, views in sites.items():
        side = SIDES[site]
        corners = [offset for pair in views.offsets(side, side) for offset in pair]
        if any(offset % STRIDES[site] for offset in [*corners, side - views.crop_size(side, side)[0]]):
            return False
    return True


@torch.no_grad()
def classes(model: torch.nn.Module, images: Tensor, sites: dict[str, Views]) -> Tensor:
    """Return the predicted classes, (n,), from the mean logits of all views."""
    if sites:
        inject_crop_vote(model, after=sites, input_size=32)
    found = [per_view(model, x).mean(1) if sites else model(x) for x in map(cifar.to_input, images.split(250))]
    if sites:
        remove_crop_vote(model)
    return torch.cat(found).argmax(1)


def run(data: str, networks: list[str], shown: bool, path: Path) -> None:
    images, labels = cifar.read_pictures(data, "test")
    stored: dict[str, Any] = {"versions": {"torch": torch.__version__, "python": platform.python_version()}, "rows": []}
    if path.exists():
        kept = [row for row in json.loads(path.read_text())["rows"] if row["network"] not in networks]
        stored["rows"] = kept
    for name in networks:
        model = cifar.CifarResNet(NETWORKS[name]).eval()
        model.load_state_dict(load_file(Path(data).with_name(f"{name}.safetensors")))
        right = {}
        for way, sites in [("plain", {}), *ways()]:
            if shown and way not in SHOWN:
                continue
            hits = classes(model, images, sites) == labels
            right[way] = hits
            table = profile(model, 32, sites=[sites or "layer1"])
            gmacs = list(table)[-1].gmacs if sites else table["baseline"].gmacs
            row = {"network": name, "way": way, "accuracy": float(hits.double().mean()), "work": gmacs}
            row["aligned"] = aligned(sites)
            for other in ("plain", "mirrored input"):
                if other in right and other != way:
                    won, lost = int((hits & ~right[other]).sum()), int((~hits & right[other]).sum())
                    row[f"against {other}"] = [
                        won,
                        lost,
                        float(binomtest(won, won + lost).pvalue) if won + lost else 1.0,
                    ]
            stored["rows"].append(row)
            print(row, flush=True)
            path.write_text(json.dumps(stored, indent=1) + "\n")


#: The rows shown in the guide's table.
SHOWN = [
    "plain", "mirrored input", "ten crops of the input", "layer1: five crops of 28", "layer1: ten crops of 28",
    "layer2: five crops of 12", "layer2: five crops of 13", "layer2: five crops of 14", "layer2: five crops of 15",
    "layer2: ten crops of 14", "mirrored input, layer1: five crops of 28", "mirrored input, layer2: five crops of 14",
    "layer3: five crops of 6", "mirrored input, layer3: five crops of 6",
]  # fmt: skip


def table(network: str = "resnet20") -> str:
    """Return the guide's table: accuracy, work relative to the plain network, and McNemar's test."""
    lines = [
        "| views | accuracy, % | work | won : lost (p) against plain | against mirrored input |",
        "|---|---:|---:|---|---|",
    ]
    rows = {row["way"]: row for row in json.loads(STORED.read_text())["rows"] if row["network"] == network}
    for way in SHOWN:
        row = rows[way]
        against = [row.get(f"against {other}") for other in ("plain", "mirrored input")]
        told = ["–" if found is None else f"{found[0]} : {found[1]} ({found[2]:.2g})" for found in against]
        work = row["work"] / rows["plain"]["work"]
        lines.append(f"| {way} | {100 * row['accuracy']:.2f} | {work:.2f} | {' | '.join(told)} |")
    return "\n".join(lines)


def deeper() -> str:
    """Return the guide's sentence about ResNet-56."""
    rows = {row["way"]: row for row in json.loads(STORED.read_text())["rows"] if row["network"] == "resnet56"}
    best = "mirrored input, layer2: five crops of 14"
    ways = ["plain", "mirrored input", "layer2: five crops of 13", "layer2: five crops of 14", best]
    figures = [f"{100 * rows[way]['accuracy']:.1f}" for way in ways]
    won, lost, p = rows[best]["against mirrored input"]
    return (
        f"ResNet-56, measured the same way, gets {figures[0]} % right plain, {figures[1]} % with the mirrored input, "
        f"{figures[2]} % with five crops of 13 after `layer2` and {figures[3]} % with five of 14. The mirrored input "
        f"together with five crops of 14 gets {figures[4]} %, no better than the mirrored input alone (won : lost "
        f"{won} : {lost}, p = {p:.2g})."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("step", choices=("run", "table"))
    parser.add_argument("--data", default="", metavar="FILE")
    parser.add_argument("--networks", nargs="+", choices=tuple(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--shown", action="store_true", help="only run the rows shown in the guide")
    parser.add_argument("--results", type=Path, default=STORED, metavar="FILE")
    options = parser.parse_args()
    if options.step == "run":
        run(options.data, options.networks, options.shown, options.results)
    else:
        print(table())
        print(deeper())
