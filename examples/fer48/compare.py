"""Reproduce the paper's Table 3 on any data: the plain network, and ten views at every site, over several seeds.

    python examples/fer48/compare.py --sites none layer1 --seeds 0 --width 8 --epochs 10     toy faces, in minutes
    python examples/fer48/compare.py --recipe fer2013 --data fer2013.csv --fast --out runs/fer2013   on a GPU

Every run has its own folder; complete runs are not repeated, and interrupted ones continue. Writes compare.md,
compare.json and compare.png into --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import binomtest
from torch import Tensor

from config import PLACES, PLANS, Config, add_options, differences, from_options, in_words
from cropvote import hflip, inject_crop_vote
from keeping import KeptError, load_model, write_whole
from learner import read
from machines import Machine, machine
from results import LOGITS, RESULT
from scoring import predictions, with_interval
from train import EXPECTED, read_faces, scored_split, train

MIRRORED = "plain, averaged with its mirror image"
VOTES = ("soft", "hard")
#: The colour of each network in plots.
COLOURS = {
    "none": "#444444",
    MIRRORED: "#999999",
    "input": "#8a5aa8",
    "layer1": "#2f6db0",
    "layer2": "#2e8b57",
    "layer3": "#e08a1e",
    **dict(zip(PLANS, ("#c0392b", "#b8860b", "#16a2a2"), strict=True)),
}


def main(argv: list[str] | None = None) -> None:
    config, sites, seeds = parse(argv)
    try:
        with machine(config.device, config.precision, config.fast) as here:
            runs = {site: [one_run(config, site, seed, here) for seed in seeds] for site in sites}
            rows = compare(runs, config, here)
            if here.first:
                write(Path(config.out), rows, config, seeds, runs)
    except EXPECTED as error:
        sys.exit(f"compare.py: {error}")


def one_run(config: Config, site: str, seed: int, here: Machine) -> dict[str, Any]:
    """Return the result of one network and seed: the stored one if it is complete and has the same options."""
    out = Path(config.out) / f"{site}-{seed}"
    drawn = None if site == "none" else config.train_views
    mine = dataclasses.replace(config, after=site, seed=seed, out=str(out), train_views=drawn)
    here.wait()
    if (out / RESULT).exists():
        result = json.loads((out / RESULT).read_text())
        same = not differences(mine, result["config"]) and result["config"]["final_test"] == mine.final_test
        if same and result["data"]["fingerprints"] == read_faces(mine).fingerprints():
            return {**result, "out": str(out)}
        if result["config"]["final_test"] and not mine.final_test:
            raise KeptError(f"{out} holds test figures: give --final-test, or another --out.")
    if here.first:
        print(f"\n{site}, seed {seed}:")
    return train(mine, here, resume=True)


def compare(runs: dict[str, list[dict[str, Any]]], config: Config, here: Machine) -> list[dict[str, Any]]:
    """Return a row per network and vote: accuracy by seed, cost, and McNemar's test against the plain network."""
    labels = [labels_of(same_seed) for same_seed in zip(*runs.values(), strict=True)]
    found: dict[tuple[str, str], list[Tensor]] = {}
    for site, results in runs.items():
        for how in VOTES[:1] if site == "none" else VOTES:
            found[site, how] = [predictions(stored(one, "logits"), how) for one in results]
    if "none" in runs:
        found[MIRRORED, "soft"] = [mirrored(config, one, here) for one in runs["none"]]
    rows = []
    for (site, how), predicted in found.items():
        one, twice = (runs["none"][0], 2) if site == MIRRORED else (runs[site][0], 1)
        right = [float((p == y).double().mean()) for p, y in zip(predicted, labels, strict=True)]
        row = {"site": site, "vote": how, "accuracy": right, "faces": len(labels[0])}
        row |= {"parameters": one["parameters"], "gmacs": twice * one["gmacs"], "train_mib": one["train_mib"]}
        if "none" in runs and site != "none":
            pairs = zip(predicted, found["none", "soft"], labels, strict=True)
            row["mcnemar"] = [mcnemar(ours, plain, y) for ours, plain, y in pairs]
        rows.append(row)
    return rows


def labels_of(runs: tuple[dict[str, Any], ...]) -> Tensor:
    """Return the labels that runs of one seed share; raise if they were scored on different faces."""
    labels = [stored(one, "labels") for one in runs]
    for one, theirs in zip(runs, labels, strict=True):
        if not torch.equal(labels[0], theirs):
            raise KeptError(f"{one['out']} was scored on other faces than {runs[0]['out']}.")
    return labels[0]


def stored(result: dict[str, Any], name: str) -> Tensor:
    """Return the ``logits`` (n, v, k) or ``labels`` (n,) of a finished run."""
    with np.load(Path(result["out"]) / LOGITS, allow_pickle=False) as arrays:
        return torch.from_numpy(arrays[name])


def mcnemar(ours: Tensor, plain: Tensor, labels: Tensor) -> dict[str, Any]:
    """Return McNemar's exact test on the faces that only one of the two networks gets right."""
    won = int(((ours == labels) & (plain != labels)).sum())
    lost = int(((ours != labels) & (plain == labels)).sum())
    return {"won": won, "lost": lost, "p": float(binomtest(won, won + lost).pvalue) if won + lost else 1.0}


def mirrored(config: Config, result: dict[str, Any], here: Machine) -> Tensor:
    """Return the plain network's classes, with logits averaged over the face and its mirror image."""
    model, _ = load_model(result["out"])
    inject_crop_vote(model, after="input", views=hflip(), input_size=48)
    split = scored_split(config, read_faces(dataclasses.replace(config, seed=result["config"]["seed"])))
    return predictions(read(model.to(here.device), split.images, here, voting=True), "soft")


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| network | vote | accuracy, % | against plain | won : lost (p) | parameters | GMACs | training MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    plain = next((statistics.mean(row["accuracy"]) for row in rows if row["site"] == "none"), None)
    for row in rows:
        against = statistics.mean(row["accuracy"]) - (plain or 0)
        tests = ", ".join(f"{t['won']} : {t['lost']} ({t['p']:.2g})" for t in row.get("mcnemar", []))
        cells = [
            name_of(row["site"]),
            "–" if row["site"] == "none" else row["vote"],
            spread(row["accuracy"]),
            f"{100 * against:+.1f}" if tests else "–",
            tests or "–",
            f"{row['parameters']:,}",
            f"{row['gmacs']:.3f}",
            f"{row['train_mib']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def name_of(site: str) -> str:
    return site if site == MIRRORED else in_words(site)


def spread(values: list[float]) -> str:
    """Return the mean and standard deviation over the seeds in %, such as ``57.3 ± 0.4``."""
    mean, sd = mean_and_sd(values)
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ± {sd:.1f}"


def mean_and_sd(values: list[float]) -> tuple[float, float]:
    """Return the mean and sample standard deviation in % (0 for a single value)."""
    return 100 * statistics.mean(values), 100 * statistics.stdev(values) if len(values) > 1 else 0.0


def write(
    out: Path, rows: list[dict[str, Any]], config: Config, seeds: list[int], runs: dict[str, list[dict[str, Any]]]
) -> None:
    one = next(iter(runs.values()))[0]
    where = f"{one['data']['name']} {one['split']}, {rows[0]['faces']:,} faces"
    example = with_interval(statistics.mean(rows[0]["accuracy"]), rows[0]["faces"])
    note = (
        f"{where}; seeds {', '.join(map(str, seeds))}{', mean ± sd' if len(seeds) > 1 else ''}; width {config.width}, "
        f"{one['config']['epochs']} epochs, recipe {config.recipe}; cost per face, all views. The first row's 95 % "
        f"interval, by the number of faces alone: {example}. won : lost: faces that only this network, or only the "
        f"plain one of the same seed, gets right; p: McNemar's exact test, for each seed. "
        f"{'Scored once, at the end' if config.final_test else 'The epoch was chosen on these same faces'}; "
        f"{one['data']['note']}; torch {one['versions']['torch']}, {one['versions']['device']}."
    )
    text = f"{table(rows)}\n\n{note}\n"
    write_whole(out / "compare.md", lambda file: file.write(text.encode()))
    kept = {
        "note": note,
        "config": dataclasses.asdict(config),
        "seeds": seeds,
        "versions": one["versions"],
        "rows": rows,
    }
    write_whole(out / "compare.json", lambda file: file.write(json.dumps(kept, indent=1).encode()))
    plot(out / "compare.png", rows, where)
    print(f"\n{text}\n{out.resolve()}: compare.md, compare.json, compare.png")


def plot(path: Path, rows: list[dict[str, Any]], where: str) -> None:
    """Plot accuracy against multiply-adds; bars are one standard deviation over the seeds."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        mean, sd = mean_and_sd(row["accuracy"])
        hard, shift = row["vote"] == "hard", 1.03 if row["vote"] == "hard" else 1
        axes.errorbar(
            row["gmacs"] * shift, mean, sd, fmt="s" if hard else "o", ms=7, capsize=3, color=COLOURS[row["site"]],
            mfc="white" if hard else None, label=None if hard else name_of(row["site"]),
        )  # fmt: skip
        if row["site"] == "none":
            axes.axhline(mean, lw=0.8, ls="--", color="#444444", zorder=0)
    axes.set(xscale="log", xlabel="GMACs per face, all views (log)", ylabel="accuracy, %", title=where)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="both", labelsize=8)
    axes.grid(alpha=0.3)
    legend = "filled: soft vote; hollow: hard, a little to the right"
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8, title=legend, title_fontsize=8)
    figure.savefig(path, dpi=150)


def parse(argv: list[str] | None) -> tuple[Config, list[str], list[int]]:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sites = ["none", "layer1", "layer2", "layer3", "input", PLANS[0]]
    text = f"the sites to compare, one network each (default: {' '.join(sites)}); also {' '.join(PLANS[1:])}"
    parser.add_argument("--sites", nargs="+", choices=PLACES, default=sites, metavar="SITE", help=text)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED", help="default: 0 1 2")
    add_options(parser, without=("after", "seed", "retrain", "target", "out"))
    parser.add_argument("--out", default="runs/compare", metavar="FOLDER", help="default: runs/compare")
    options = vars(parser.parse_args(argv))
    sites, seeds = list(dict.fromkeys(options.pop("sites"))), list(dict.fromkeys(options.pop("seeds")))
    if min(seeds) < 0:
        parser.error("--seeds must be whole numbers, 0 or more")
    try:
        config = from_options(options)
        if config.learn == "train+val" and not config.final_test:
            parser.error("--learn train+val leaves no faces to compare on; --final-test compares on the test faces")
        return config, sites, seeds
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
