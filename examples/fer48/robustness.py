"""Measure robustness to shifted, covered and coarse faces, which the paper claims without a table.

    python examples/fer48/robustness.py runs/compare/none-0 runs/compare/layer1-0

Runs of the same site are averaged (seeds). Writes robustness.md, robustness.json and robustness.png into --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from compare import COLOURS, mean_and_sd, name_of, spread
from config import differences, from_dict
from keeping import KeptError, load_model, write_whole
from learner import read
from machines import Machine, machine
from results import RESULT
from scoring import predictions, with_interval
from train import EXPECTED, read_faces, scored_split

#: The corruptions, their amounts and units.
HARMS: dict[str, tuple[tuple[int, ...], str]] = {
    "shift": ((0, 2, 4, 6, 8), "pixels, mean of left, right, up and down"),
    "erase": ((0, 8, 16, 24), "pixels, the side of a grey square at a random place"),
    "resolution": ((48, 32, 24), "pixels, the side to which a face is shrunk before it is enlarged again"),
}

AXES = {"shift": "moved by, pixels", "erase": "side of the square, pixels", "resolution": "shrunk to, pixels"}
#: Options in which the runs may differ; runs that differ only in the seed are averaged.
FREE = ("after", "vote", "seed")


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    try:
        with machine(options.device) as here:
            rows = [one_run(run, options.final_test, here) for run in options.runs]
            write(Path(options.out), rows)
    except EXPECTED as error:
        sys.exit(f"robustness.py: {error}")


def one_run(run: str, final_test: bool, here: Machine) -> dict[str, Any]:
    """Return one network's accuracy under each corruption, on the validation or test faces."""
    model, card = load_model(run)
    stored = json.loads((Path(card["folder"]) / RESULT).read_text())
    config = dataclasses.replace(from_dict(stored["config"]), final_test=final_test)
    if config.target != "expression":
        raise KeptError(f"{run}: was trained on {config.target}; this script counts right classes.")
    faces = read_faces(config)
    split = scored_split(config, faces)
    if stored["data"]["fingerprints"] != faces.fingerprints():
        raise KeptError(
            f"{run}: the faces in {config.data}, their labels or their split have changed since it was trained."
        )
    model = model.to(here.device)
    row: dict[str, Any] = {
        "run": run, "site": card["after"], "vote": card["vote"], "data": card["data"], "split": split.name,
        "faces": len(split), "config": dataclasses.asdict(config),
        "fingerprints": stored["data"]["fingerprints"], "accuracy": {},
    }  # fmt: skip
    work = [(harm, amount) for harm, (amounts, _) in HARMS.items() for amount in amounts]
    for harm, amount in tqdm(work, desc=run, leave=False, disable=None):
        versions = harmed(split.images, harm, amount)
        right = [
            (predictions(read(model, images, here, card["after"] != "none"), card["vote"]) == split.labels)
            .double()
            .mean()
            for images in versions
        ]
        row["accuracy"].setdefault(harm, {})[str(amount)] = float(torch.stack(right).mean())
    return row


def harmed(images: Tensor, harm: str, amount: int) -> list[Tensor]:
    """Return corrupted versions of the faces, uint8 (n, c, H, W), to average over; the same for every network."""
    makers: dict[str, Callable[[Tensor, int], list[Tensor]]] = {"shift": shifted, "erase": erased, "resolution": coarse}
    return makers[harm](images, amount)


def shifted(images: Tensor, pixels: int) -> list[Tensor]:
    """Return four versions, shifted right, left, down and up; the gap repeats the last row or column."""
    if pixels == 0:
        return [images]
    height, width = images.shape[-2:]
    wide = F.pad(images.float(), (pixels,) * 4, mode="replicate").to(torch.uint8)
    places = ((pixels, 0), (pixels, 2 * pixels), (0, pixels), (2 * pixels, pixels))
    return [wide[..., top : top + height, left : left + width] for top, left in places]


def erased(images: Tensor, side: int) -> list[Tensor]:
    """Put a grey square inside every face, at a random place that is the same for every network."""
    n, _, height, width = images.shape
    generator = torch.Generator().manual_seed(0)
    top = torch.randint(height - side + 1, (n, 1), generator=generator)
    left = torch.randint(width - side + 1, (n, 1), generator=generator)
    rows, columns = torch.arange(height), torch.arange(width)
    inside = ((rows >= top) & (rows < top + side)).unsqueeze(2) & (
        (columns >= left) & (columns < left + side)
    ).unsqueeze(1)
    return [images.masked_fill(inside.unsqueeze(1), 128)]


def coarse(images: Tensor, side: int) -> list[Tensor]:
    """Shrink with antialiasing and enlarge again, both bilinear."""
    if side == images.shape[-1]:
        return [images]
    small = F.interpolate(images.float(), size=side, mode="bilinear", antialias=True)
    large = F.interpolate(small.round(), size=images.shape[-1], mode="bilinear")
    return [large.round().clamp(0, 255).to(torch.uint8)]


def table(rows: list[dict[str, Any]]) -> str:
    """Return Markdown: a table per corruption, a line per site, in %."""
    parts = []
    for harm, (amounts, unit) in HARMS.items():
        lines = [
            f"**{harm}** ({unit})",
            "",
            f"| network | {' | '.join(map(str, amounts))} |",
            "|---" * (len(amounts) + 1) + "|",
        ]
        for (site, how), mine in groups(rows).items():
            cells = [spread([row["accuracy"][harm][str(amount)] for row in mine]) for amount in amounts]
            lines.append(f"| {name_of(site)}{'' if site == 'none' else f', {how}'} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def groups(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Group runs by site and vote; each group holds the seeds."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["site"], row["vote"]), []).append(row)
    return found


def write(out: Path, rows: list[dict[str, Any]]) -> None:
    one = rows[0]
    for row in rows[1:]:
        changed = [f"{key} {one[key]}, now {row[key]}" for key in ("data", "split", "faces") if one[key] != row[key]]
        alike = dataclasses.replace(from_dict(row["config"]), **{key: one["config"][key] for key in FREE})
        changed += differences(alike, one["config"])
        if changed:
            raise KeptError(
                f"{one['run']} and {row['run']} differ in more than {', '.join(FREE)}: {'; '.join(changed)}."
            )
    of_groups = [{json.dumps(row["fingerprints"]) for row in mine} for mine in groups(rows).values()]
    if any(theirs != of_groups[0] for theirs in of_groups):
        raise KeptError("the networks were trained or scored on different faces; toy faces differ with the seed.")
    example = with_interval(one["accuracy"]["shift"]["0"], one["faces"])
    seeds = max(len(mine) for mine in groups(rows).values())
    spreading = ", mean ± sd of the runs" if seeds > 1 else ""
    where = f"{one['data']} {one['split']}, {one['faces']:,} faces"
    note = f"{where}, % right{spreading}; the first network's 95 % interval, by the number of faces alone: {example}."
    text = f"{table(rows)}\n\n{note}\n"
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "robustness.md", lambda file: file.write(text.encode()))
    stored = json.dumps({"note": note, "harms": HARMS, "rows": rows}, indent=1)
    write_whole(out / "robustness.json", lambda file: file.write(stored.encode()))
    plot(out / "robustness.png", rows, where)
    print(f"\n{text}\n{out.resolve()}: robustness.md, robustness.json, robustness.png")


def plot(path: Path, rows: list[dict[str, Any]], where: str) -> None:
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, (harm, (amounts, _)) in zip(figure.subplots(1, len(HARMS), sharey=True), HARMS.items(), strict=True):
        for (site, how), mine in groups(rows).items():
            figures = [[row["accuracy"][harm][str(amount)] for row in mine] for amount in amounts]
            label = f"{name_of(site)}{'' if site == 'none' else f', {how}'}"
            means, sds = zip(*map(mean_and_sd, figures), strict=True)
            axes.errorbar(amounts, means, sds, marker="o", ms=4, capsize=2, color=COLOURS[site], label=label)
        axes.set(title=harm, xlabel=AXES[harm], xticks=amounts)
        axes.grid(alpha=0.3)
        if harm == "resolution":
            axes.invert_xaxis()
    figure.axes[0].set_ylabel("accuracy, %")
    names = figure.axes[0].get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.suptitle(where, fontsize=10)
    figure.savefig(path, dpi=150)


def parse(argv: list[str] | None) -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a finished run")
    parser.add_argument("--final-test", action="store_true", help="score the test faces: once, at the very end")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--out", default="runs/robustness", metavar="FOLDER", help="default: runs/robustness")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
