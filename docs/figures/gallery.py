"""Draw the pictures of docs/gallery.md, from two finished runs on toy faces.

python benchmarks/toy.py run                                                  trains them
python docs/figures/gallery.py runs/toy-10/none-0 runs/toy-10/layer1-0
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from cropvote import profile, remove_crop_vote, split_views, ten_crop
from cropvote.plots import plot_agreement
from cropvote.uncertainty import agreement

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "examples" / "fer48"))

from batches import to_input  # noqa: E402
from config import from_dict  # noqa: E402
from keeping import load_model  # noqa: E402
from model import fer_resnet18  # noqa: E402
from scoring import normalised  # noqa: E402
from train import read_faces, scored_split  # noqa: E402

BLUE, ORANGE, GREY = "#3b7dd8", "#e8853d", "#8a8f98"
#: One colour a class, for the bars of votes.
CLASSES = ("#c0392b", "#8a5aa8", "#2e8b57", "#e8b53d", "#3b7dd8", "#e8853d", "#8a8f98")


def main(plain: str, voting: str) -> None:
    model, _ = load_model(voting)
    result, other = (json.loads((Path(run) / "result.json").read_text()) for run in (voting, plain))
    split = scored_split(from_dict(result["config"]), read_faces(from_dict(result["config"])))
    names = result["outputs"]
    with np.load(Path(voting) / "logits.npz", allow_pickle=False) as arrays:
        logits, labels = torch.from_numpy(arrays["logits"]), torch.from_numpy(arrays["labels"])
    sure = agreement(logits)
    pick = [int(torch.nonzero(labels == label)[0]) for label in range(4)]
    on_the_map(model, split.images[pick[3]], HERE / "views.png")
    votes(split.images, logits, labels, names, sure, HERE / "votes.png")
    plot_agreement(logits, HERE / "agreement.png", targets=labels)
    confusions({"plain": other, "ten views after layer1": result}, names, HERE / "confusion.png")
    profile(fer_resnet18(), 48).plot(HERE / "frontier.svg")


def on_the_map(model: nn.Module, image: Tensor, path: Path) -> None:
    """One face, its map at the site with the five windows, and the ten views of the map (the mean of its channels)."""
    with torch.no_grad():
        remove_crop_vote(model)
        mean = model.layer1(model.relu(model.bn1(model.conv1(to_input(image[None]))))).mean(1, keepdim=True)
    views = ten_crop()
    crops = split_views(mean, views)
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    grid = figure.add_gridspec(2, 8)
    for place, picture, title in ((grid[0, 0], image[0], "a face"), (grid[1, 0], mean[0, 0], "its map")):
        axes = figure.add_subplot(place)
        axes.imshow(picture, cmap="gray" if title == "a face" else "viridis")
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
    height, width = mean.shape[2:]
    h, w = views.crop_size(height, width)
    axes = figure.add_subplot(grid[:, 1:3])
    axes.imshow(mean[0, 0], cmap="viridis")
    corners = ("#ffffff", "#e6d04a", "#7fd4c1", "#e38fb0", ORANGE)
    for (top, left), colour in zip(views.offsets(height, width)[:5], corners, strict=True):
        axes.add_patch(Rectangle((left - 0.5, top - 0.5), w, h, fill=False, ec=colour, lw=2))
    axes.set_title("five windows of 5/6 of the side", fontsize=9)
    axes.set_axis_off()
    for i, crop in enumerate(crops):
        axes = figure.add_subplot(grid[i // 5, 3 + i % 5])
        axes.imshow(crop[0], cmap="viridis")
        axes.set_title(f"view {i}", fontsize=8)
        axes.set_axis_off()
    figure.savefig(path, dpi=140)


def votes(images: Tensor, logits: Tensor, labels: Tensor, names: list[str], sure: Tensor, path: Path) -> None:
    """Faces on which all views agree, and on which they agree least; under each, how many views said what."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)
    agreed = [int(i) for i in order if sure[i] == 1][:6]
    least = sorted(range(len(labels)), key=lambda i: float(sure[i]))[:6]
    figure = Figure(figsize=(9, 5), layout="tight")
    rows = figure.subplots(4, 6, height_ratios=[5, 1, 5, 1])
    for above, below, some in ((rows[0], rows[1], agreed), (rows[2], rows[3], least)):
        for face, bars, i in zip(above, below, some, strict=True):
            face.imshow(images[i, 0], cmap="gray", vmin=0, vmax=255)
            vote = names[int(logits[i].mean(0).argmax())]
            right = vote == names[labels[i]]
            face.set_title(
                f"{vote}{'' if right else f' (is {names[labels[i]]})'}", fontsize=9, color=BLUE if right else ORANGE
            )
            counts = torch.bincount(logits[i].argmax(1), minlength=len(names)).tolist()
            left = 0
            for name, count, colour in zip(names, counts, CLASSES, strict=True):
                bars.barh(0, count, left=left, color=colour)
                if count > 1:
                    bars.text(
                        left + count / 2, 0, name if count > 3 else name[:3], ha="center", va="center", fontsize=7
                    )
                left += count
            bars.set_xlim(0, logits.shape[1])
            for axes in (face, bars):
                axes.set_axis_off()
    figure.suptitle("all ten views agree (above), and agree least (below); the bar is what the views said", fontsize=10)
    figure.savefig(path, dpi=140)


def confusions(results: dict[str, dict[str, Any]], names: list[str], path: Path) -> None:
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    for axes, (title, result) in zip(figure.subplots(1, 2), results.items(), strict=True):
        shares = 100 * normalised(result["votes"]["soft"]["confusion"])
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        for (row, column), share in np.ndenumerate(shares):
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=8,
                      color="white" if share > 60 else "#24292f")  # fmt: skip
        axes.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set(xlabel="predicted", ylabel="true")
        axes.set_title(f"{title}: {100 * result['votes']['soft']['accuracy']:.1f} %", fontsize=10)
    figure.suptitle("toy test faces, % of the true class", fontsize=10)
    figure.savefig(path, dpi=140)


if __name__ == "__main__":
    main(*sys.argv[1:])
