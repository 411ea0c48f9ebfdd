"""docs/results.md and its pictures, from benchmarks/results/fer2013.json."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import worth_page
from compare import COLOURS, mean_and_sd, spread
from config import in_words
from fer2013_scores import ALL, CROPPED, FEW, MIRRORED, PLAIN, STORED, SURE, TUNING
from pages import folded, line

ROOT = Path(__file__).resolve().parents[1]
PAGE, FIGURES = ROOT / "docs" / "results.md", ROOT / "docs" / "figures"
#: The page's title for each list; the pictures show the first list that was run.
TITLES = {
    "full": "All faces, the paper's width",
    "small": "8,000 faces, a narrow network",
}
#: What a reader should know beside a list's figures.
SAID = {
    "full": [
        "**What to do: if you train all networks for the same number of epochs anyway, vote, and predict with centre",
        "and mirror (1.28 of the plain network's work) or with all ten views.** Ten views after `layer1` are",
        "significantly ahead of the plain network (p below 0.0001) and of the plain network with its mirrored input",
        "(p 0.022 and 0.0029) in both seeds. But a voting network needs more multiply-adds than the plain one for the",
        "same number of epochs: see [equal work](#equal-work) above. Centre and mirror come within 0.35 points of ten",
        "views; going on to ten views only where they are unsure adds nothing. Our aims, to come within 0.2 points of",
        "ten views and to reach 73.3 % on PrivateTest, were not met.",
        "A third seed, the paper's own recipe and the other sites were not run.",
        "",
    ],
}  # fmt: skip
rcParams["svg.hashsalt"] = "fer2013"  # the same figures give a byte-identical picture
Found = dict[str, Any]
Group = tuple[str, list[Found]]


def write() -> None:
    stored: dict[str, list[Found]] = json.loads(STORED.read_text())
    lines = [
        "# Results",
        "",
        *worth_page.section(FIGURES),
        "## Equal epochs",
        "",
        *folded(
            "How it was measured",
            [
                "Made by `benchmarks/fer2013.py`. Networks train on Training; epoch, confidence and views are chosen",
                "on PublicTest; PrivateTest is only scored. Figures are in %, mean ± standard deviation over the",
                "seeds; the same seed gives every network the same initial weights and order of faces. *Without",
                "copies*: without the test faces that are, pixel for pixel, among the training or validation faces.",
                "*won : lost*: the faces that only this network, or only the other one of the same seed, gets right;",
                "p: McNemar's exact test, seed by seed. Several runs shared the GPU, so rates and minutes do not",
                "measure speed: [speed](speed.md) does. (An earlier check of models seeded the GPU with 0. These runs",
                "were not affected: the examples seed all devices after the model is made, and no check runs later.)",
            ],
        ),
    ]
    for name, title in TITLES.items():
        if name not in stored:
            lines += [f"### {title}", "", f"Not run yet (`python benchmarks/fer2013.py train {name}`).", ""]
            continue
        lines += [f"### {title}", "", *SAID.get(name, []), *compact(stored[name]), *section(stored[name])]
        drawn: list[str] = []
        for stem, draw, text in PICTURES:
            if name == next(one for one in TITLES if one in stored):
                figure = Figure(figsize=(7.2, 4.4), layout="constrained")
                draw(figure.subplots(), main_recipe(stored[name]))
                long = stem == "reliability"
                figure.legend(loc="outside lower center", ncols=1 if long else 2, frameon=False, fontsize=8)
                figure.savefig(FIGURES / f"fer2013_{stem}.svg", metadata={"Date": None})
                drawn += [f"![{text}](figures/fer2013_{stem}.svg)", ""]
        if drawn:
            lines += folded("Pictures: accuracy against multiply-adds and number of views; calibration", drawn)
        if name == "full":
            lines += tuning(stored.get(TUNING, []))
    PAGE.write_text("\n".join(lines))


def tuning(found: list[Found]) -> list[str]:
    """Return the section on how the recipe was chosen."""
    if not found:
        return []
    one = found[0]
    return folded("How the recipe was chosen", [
        f"The plain network, {one['learnt_epochs']} epochs, one seed, by PublicTest alone, on top of the paper's "
        f"augmentations and mirroring (`python benchmarks/fer2013.py tune`; {one['versions']['device']}). The best one "
        "became the recipe for every network.", "",
        "| recipe | options | PublicTest, best epoch | mean of the last five |", "|---|---|---:|---:|",
        *(line(row["variant"], f"`{row['options']}`" if row["options"] else "–",
               *(f"{100 * row['epochs'][key]:.1f}" for key in ("best", "last_five"))) for row in found),
    ])  # fmt: skip


def section(runs: list[Found]) -> list[str]:
    lines = []
    for recipe in dict.fromkeys(run["config"]["recipe"] for run in runs):
        mine = [run for run in runs if run["config"]["recipe"] == recipe]
        one, grouped = mine[0], groups(mine)
        config = one["config"]
        seeds = sorted({run["config"]["seed"] for run in mine})
        text = (
            f"Recipe `{recipe}`: width {config['width']} ({one['parameters']:,} parameters), {config['epochs']} epochs "
            f"of {one['data']['faces']['train']:,} faces, batch {config['batch']}{', --fast' * config['fast']}; seeds "
            f"{', '.join(map(str, seeds))}; {one['faces']:,} faces of {one['data']['names']['test']}, {one['copies']} "
            f"of them copies; torch {one['versions']['torch']}, {one['versions']['device']}; commit {one['commit']}."
        )
        tables = [*accuracy(grouped), "", *training(grouped), "", *views(grouped), "", *classes(grouped)]
        lines += folded(f"All tables of the recipe `{recipe}`", [text, "", *tables])
    return lines


def compact(runs: list[Found]) -> list[str]:
    """Return the table that a reader sees first: soft votes of the main recipe."""
    lines = ["| network | GMACs per face | PrivateTest, % | without copies, % |", "|---|---:|---:|---:|"]
    for site, mine in main_recipe(runs):
        for (way, how), rows in rows_of(mine).items():
            if way in (PLAIN, MIRRORED, "centre + mirror", ALL) and how == "soft":
                name = PLAIN if way == PLAIN else f"{in_words(site)}{'' if way == ALL else f', {way}'}"
                gmacs = f"{statistics.mean(row['gmacs'] for row in rows):.2f}"
                scores = [spread([row[key] for row in rows]) for key in ("accuracy", "without_copies")]
                lines.append(line(name, gmacs, *scores))
    return [*lines, ""]


def groups(runs: list[Found]) -> list[Group]:
    """Group runs that differ only in the seed, by site, the plain network first."""
    found: dict[str, list[Found]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: (run["config"]["after"] != "none", run["config"]["seed"])):
        found[run["config"]["after"]].append(run)
    return list(found.items())


def rows_of(runs: list[Found]) -> dict[tuple[str, str], list[Found]]:
    """Return the rows of several seeds by way and vote."""
    found: dict[tuple[str, str], list[Found]] = defaultdict(list)
    for run in runs:
        for row in run["rows"]:
            found[row["way"], row["vote"]].append(row)
    return found


def accuracy(grouped: list[Group]) -> list[str]:
    lines = [
        "| network | predicts with | vote | GMACs per face | PrivateTest | without copies "
        "| won : lost (p) against plain | won : lost (p) against plain + mirror |",
        "|---|---|---|---:|---:|---:|---|---|",
    ]
    for site, runs in grouped:
        for (way, how), rows in rows_of(runs).items():
            tests = [", ".join(_test(row["against"][other]) for row in rows if other in row["against"]) or "–"
                     for other in (PLAIN, MIRRORED)]  # fmt: skip
            gmacs = statistics.mean(row["gmacs"] for row in rows)
            scores = [spread([row[key] for row in rows]) for key in ("accuracy", "without_copies")]
            cells = [in_words(site), way, "–" if way == PLAIN else how, f"{gmacs:.3f}", *scores, *tests]
            lines.append(line(*cells))
    return lines


def _test(found: dict[str, Any]) -> str:
    return f"{found['won']} : {found['lost']} ({found['p']:.2g})"


def short_table(runs: list[Found]) -> str:
    """Return the README's table: the main rows of the runs, soft votes."""
    lines = ["| network | GMACs per face | PrivateTest, % | won : lost (p) against plain |", "|---|---:|---:|---|"]
    for site, mine in main_recipe(runs):
        for (way, how), rows in rows_of(mine).items():
            few = ("centre", "centre + mirror") if "=" not in site else ()
            if how != "soft" or way not in (PLAIN, MIRRORED, *few, ALL):
                continue
            tests = ", ".join(_test(row["against"][PLAIN]) for row in rows if PLAIN in row["against"]) or "–"
            name = PLAIN if way == PLAIN else f"{in_words(site)}{'' if way == ALL else f', {way}'}"
            if way in FEW:
                name += " alone"
            name = name.replace("layer1", "`layer1`").replace("layer3", "`layer3`")
            cells = (f"{statistics.mean(row['gmacs'] for row in rows):.2f}", spread([r["accuracy"] for r in rows]))
            lines.append(line(name, *cells, tests))
    one = main_recipe(runs)[0][1][0]
    seeds = ", ".join(str(run["config"]["seed"]) for run in main_recipe(runs)[0][1])
    lines += [
        "",
        f"FER2013 at 48×48, from scratch, {one['parameters']:,} parameters and {one['config']['epochs']} epochs for "
        f"every network; {one['faces']:,} faces of PrivateTest, scored once; mean ± sd of seeds {seeds}. Won : lost, "
        "for each seed: the faces that only this network, or only the plain one, gets right (p of McNemar's exact "
        f"test). Made by `python benchmarks/fer2013.py` with torch {one['versions']['torch']} on one "
        f"{one['versions']['device'].removeprefix('cuda: ')}; full tables: [results](results.md).",
    ]
    return "\n".join(lines)


def training(grouped: list[Group]) -> list[str]:
    """Return the table of training time and of the expected calibration error, of one view and of the vote."""
    lines = [
        "| network | training, faces / s | minutes | training memory per face, MiB | calibration error of one view "
        "| of the soft vote |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for site, runs in grouped:
        errors = [
            spread([run["calibration"][what]["ece"] for run in runs]) if what in runs[0]["calibration"] else "–"
            for what in ("one view", "soft vote")
        ]
        rate = statistics.median(run["faces_per_second"] for run in runs)
        minutes = statistics.mean(run["seconds"] for run in runs) / 60
        cells = [in_words(site), f"{rate:,.0f}", f"{minutes:.1f}", f"{runs[0]['train_mib']:.2f}", *errors]
        lines.append(line(*cells))
    return lines


def views(grouped: list[Group]) -> list[str]:
    """Return the table of accuracy by the number of views, added greedily."""
    voting = [(site, runs) for site, runs in grouped if site != "none"]
    sizes = range(1, 11)
    lines = [
        "Views are added one by one, each time the one that helps most on PublicTest. The table shows accuracy on",
        "PrivateTest by number of views (0–4 are crops, 4 the centre; 5–9 the same crops of the mirrored map):",
        "",
        f"| network | {' | '.join(map(str, sizes))} | order, by seed |",
        f"|---|{'---:|' * len(sizes)}---|",
    ]
    for site, runs in voting:
        cells = [f"{100 * statistics.mean(run['greedy']['accuracy'][size - 1] for run in runs):.1f}" for size in sizes]
        orders = "; ".join(" ".join(map(str, run["greedy"]["order"])) for run in runs)
        lines.append(line(in_words(site), *cells, orders))
    return lines


def classes(grouped: list[Group]) -> list[str]:
    """Return the recall of every class, soft vote of all views."""
    names = grouped[0][1][0]["outputs"]
    lines = [f"| recall | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    for site, runs in grouped:
        cells = [spread([run["recall"][name] for run in runs]) for name in names]
        lines.append(line(in_words(site), *cells))
    return lines


def main_recipe(runs: list[Found]) -> list[Group]:
    """Return the groups of the recipe with the most runs."""
    recipes = [run["config"]["recipe"] for run in runs]
    most = max(dict.fromkeys(recipes), key=recipes.count)
    return groups([run for run in runs if run["config"]["recipe"] == most])


def draw_cost(axes: Axes, grouped: list[Group]) -> None:
    """Draw accuracy against multiply-adds: a line per network, from one view to ten."""
    marks = {PLAIN: "o", MIRRORED: "D", CROPPED: "s", SURE: "*"}
    for site, runs in grouped:
        rows = {way: rows for (way, how), rows in rows_of(runs).items() if how == "soft"}
        points = {
            way: (statistics.mean(r["gmacs"] for r in found), *mean_and_sd([r["accuracy"] for r in found]))
            for way, found in rows.items()
        }
        line = sorted(points[way][:2] for way in points if way not in marks)
        axes.plot(*zip(*line, strict=True), color=COLOURS[site], lw=1) if line else None
        for way, (cost, mean, sd) in points.items():
            last = way in (ALL, PLAIN, MIRRORED, CROPPED)
            label = {ALL: in_words(site), PLAIN: "plain"}.get(way, f"plain, {way}") if last else None
            fill, size = "white" if way in (MIRRORED, CROPPED) else None, 11 if way == SURE else 6
            axes.errorbar(cost, mean, sd, fmt=marks.get(way, "o"), ms=size, capsize=3, lw=0.8, color=COLOURS[site],
                          mfc=fill, label=label)  # fmt: skip
        if PLAIN in points:
            axes.axhline(points[PLAIN][1], lw=0.8, ls="--", color="#888888", zorder=0)
    axes.set(xscale="log",
             xlabel="GMACs per face (log); one, two, five, ten views; stars: ten only where two are unsure",
             ylabel="accuracy on PrivateTest, %")  # fmt: skip
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="both", labelsize=7)


def draw_views(axes: Axes, grouped: list[Group]) -> None:
    """Draw accuracy by the number of views, the most helpful first."""
    for site, runs in grouped:
        if site == "none":
            mean, _ = mean_and_sd([run["rows"][0]["accuracy"] for run in runs])
            axes.axhline(mean, ls="--", color="#888888", label="plain")
            continue
        sizes = range(1, len(runs[0]["greedy"]["accuracy"]) + 1)
        means, sds = zip(*[mean_and_sd([run["greedy"]["accuracy"][s - 1] for run in runs]) for s in sizes], strict=True)
        axes.errorbar(sizes, means, sds, marker="o", ms=4, capsize=3, color=COLOURS[site], label=in_words(site))
    axes.set(xlabel="number of views, the most helpful on PublicTest first", ylabel="accuracy on PrivateTest, %")


def draw_reliability(axes: Axes, grouped: list[Group]) -> None:
    """Draw accuracy against confidence, for the first seed."""
    axes.plot([0, 100], [0, 100], lw=0.8, ls="--", color="#888888")
    for site, runs in grouped:
        for what, found in runs[0]["calibration"].items():
            bins = [one for one in found["bins"] if one["faces"] >= 20]
            points = [[100 * one[key] for one in bins] for key in ("confidence", "accuracy")]
            name, dotted = in_words(site), site != "none" and what == "one view"
            label = f"{name}{', one of them alone' * dotted}: {100 * found['ece']:.1f}"
            axes.plot(*points, marker="o", ms=4, color=COLOURS[site], ls=":" if dotted else "-", label=label)
    axes.set(xlabel="probability of the class, % (bins of 20 faces and more)", ylabel="right on PrivateTest, %")
    axes.set_title("with the expected calibration error", fontsize=9)


PICTURES: list[tuple[str, Callable[[Axes, list[Group]], None], str]] = [
    ("cost", draw_cost, "Accuracy against multiply-adds of every network, by the number of views."),
    ("views", draw_views, "Accuracy by the number of views."),
    ("reliability", draw_reliability, "Reliability diagram: how often a prediction with a given probability is right."),
]
