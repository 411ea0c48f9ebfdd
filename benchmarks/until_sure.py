"""Compare votes that stop when sure with the vote of all views: share that stops, accuracy, multiply-adds and time.

    python benchmarks/until_sure.py runs/toy-10/layer1-0 runs/toy-10/layer1-1      finished runs of examples/fer48
    python benchmarks/until_sure.py runs/FER2013-layer1-0 --final-test
    python benchmarks/until_sure.py --shipped fer2013.csv                          the network of examples/fer48/weights

The confidence is chosen on one half of the validation faces and scored on the other; with --final-test it is chosen on
all of them and scored on the test faces. Runs that differ only in the seed are averaged. Writes a table and JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cropvote import per_view, profile, settings, vote_until_sure
from cropvote.stopping import choose_confidence

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "benchmarks" / "results" / "until_sure.json"
WEIGHTS = ROOT / "examples" / "fer48" / "weights"
sys.path.insert(0, str(ROOT / "examples" / "fer48"))

from batches import to_input  # noqa: E402
from compare import spread  # noqa: E402
from config import from_dict, sites_of  # noqa: E402
from data import Split, load  # noqa: E402
from keeping import load_model  # noqa: E402
from machines import Machine  # noqa: E402
from model import fer_resnet18  # noqa: E402
from results import versions  # noqa: E402
from train import read_faces  # noqa: E402

BATCH, ROUNDS, MAX_LOSS = 64, 9, 0.001
SIX = [0, 1, 2, 3, 4, 9]  # the exact stop needs more than half of the views


def look_at(run: str, final_test: bool) -> dict[str, Any]:
    """Return the figures of one run."""
    model, card = load_model(run)
    stored = json.loads((Path(card["folder"]) / "result.json").read_text())
    config = dataclasses.replace(from_dict(stored["config"]), final_test=final_test)
    splits = read_faces(config).splits
    val, count = splits["val"], len(splits["val"])
    known = val if final_test else val.select(torch.arange(0, count, 2))
    scored = splits["test"] if final_test else val.select(torch.arange(1, count, 2))
    told = {**stored["config"], "data": Path(config.data).name, "out": "", "cache": ""}  # no local paths
    found = figures(model, card, known, scored)
    return {"run": Path(run).name, "config": told, "scored": name_of(scored, final_test), **found}


def look_at_shipped(data: str) -> dict[str, Any]:
    """Return the figures of the network in examples/fer48/weights: confidence by PublicTest, scored on PrivateTest."""
    model, card = load_model(WEIGHTS)
    splits = load(data).splits
    told = {"after": card["after"], "width": card["width"], "data": Path(data).name, "seed": 1}
    found = figures(model, card, splits["val"], splits["test"])
    return {"run": card["run"], "config": told, "scored": splits["test"].name, **found}


@torch.no_grad()
def figures(model: nn.Module, card: dict[str, Any], known: Split, scored: Split) -> dict[str, Any]:
    """Return the figures of a network whose confidence is chosen on ``known``."""
    logits = torch.cat([per_view(model, x) for x in to_input(known.images).split(256)])
    confidence = choose_confidence(logits, known.labels, max_loss=MAX_LOSS)
    cost = profile(fer_resnet18(num_classes=7, width=card["width"]), 48, sites=[sites_of(card["after"])])
    row = list(cost)[-1]
    found: dict[str, Any] = {}
    ways: dict[str, tuple[str, Callable[[Tensor], tuple[Tensor, Tensor]]]] = {
        "all views, soft": ("soft", lambda x: (model(x), torch.full((len(x),), 10))),
        "centre and mirror alone": ("soft", lambda x: vote_until_sure(model, x, confidence=0.0)),
        "until sure": ("soft", lambda x: vote_until_sure(model, x, confidence=confidence)),
        "all views, hard": ("hard", lambda x: (model(x), torch.full((len(x),), 10))),
        "until the majority is certain": ("hard", lambda x: vote_until_sure(model, x, first=SIX, confidence=None)),
    }
    taken = timed(model, ways, to_input(scored.images[:BATCH]))
    for name, (how, way) in ways.items():
        settings(model).vote = how  # type: ignore[assignment]
        votes, used = zip(*[way(x) for x in to_input(scored.images).split(256)], strict=True)
        right, stopped = torch.cat(votes).argmax(1) == scored.labels, torch.cat(used) < 10
        share, first = float(stopped.double().mean()), len(SIX) if name.startswith("until the") else 2
        found[name] = {
            "stopped": share, "accuracy": float(right.double().mean()), "gmacs": work(row, share, first),
            "time": taken[name] / taken["all views, soft"],
        }  # fmt: skip
    return {"faces": len(scored), "confidence": confidence, "plain": cost["baseline"].gmacs, "rows": found}


def name_of(scored: Split, final_test: bool) -> str:
    return scored.name if final_test else f"half of {scored.name}"


def work(row: Any, stopped: float, first: int) -> float:
    """Return the multiply-adds of an image: the first views, and for those that go on, the front again for the rest."""
    if stopped == 0:
        return float(row.gmacs)
    return gmacs_of(row.gmacs_by_views, first) + (1 - stopped) * gmacs_of(row.gmacs_by_views, 10 - first)


def gmacs_of(by_views: dict[int, float], count: int) -> float:
    """Return the multiply-adds of ``count`` views, interpolated if the table lacks them."""
    (one, first), (most, last) = min(by_views.items()), max(by_views.items())
    return by_views.get(count, first + (last - first) * (count - one) / (most - one))


def timed(model: nn.Module, ways: dict[str, tuple[str, Callable[[Tensor], Any]]], x: Tensor) -> dict[str, float]:
    """Return the median seconds per batch over interleaved rounds."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, (how, way) in ways.items():
            settings(model).vote = how  # type: ignore[assignment]
            start = time.perf_counter()
            way(x)
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def table(runs: list[dict[str, Any]]) -> str:
    """Return a Markdown table, mean ± standard deviation over the runs."""
    lines = ["| vote | samples that stop, % | accuracy, % | GMACs per image | time |", "|---|---|---|---|---|"]
    for name in runs[0]["rows"]:
        rows = [run["rows"][name] for run in runs]
        stopped, right = (spread([row[key] for row in rows]) for key in ("stopped", "accuracy"))
        gmacs, taken = (statistics.mean(row[key] for row in rows) for key in ("gmacs", "time"))
        lines.append(f"| {name} | {stopped} | {right} | {gmacs:.3f} | {taken:.2f} |")
    one = runs[0]
    config, chosen = one["config"], ", ".join(f"{run['confidence']:.2f}" for run in runs)
    data, seeds = Path(config["data"]).stem, ", ".join(str(run["config"]["seed"]) for run in runs)
    timing = f"Time: relative to all views, batch {BATCH}, median of {ROUNDS} interleaved rounds."
    lines += [
        "",
        f"{data}, {one['scored']}: {one['faces']:,} faces; ten views after `{config['after']}`, width "
        f"{config['width']}; seeds {seeds}; confidence {chosen}, chosen on other faces so "
        f"that accuracy drops by at most {100 * MAX_LOSS:g} points. The plain network has "
        f"{one['plain']:.3f} GMACs. {timing} Made by `python benchmarks/until_sure.py`.",
    ]
    return "\n".join(lines)


def main() -> None:
    summary, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="the folder of a finished voting run")
    parser.add_argument("--shipped", metavar="FILE", help="these FER2013 faces, and the network of examples/fer48")
    parser.add_argument("--final-test", action="store_true", help="score the test faces: once, at the very end")
    parser.add_argument("--out", metavar="FILE", help="by default in benchmarks/results")
    parser.add_argument("--table", action="store_true", help="only print the table of the stored figures")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(STORED.read_text())["runs"]))
        return
    if not options.runs and not options.shipped:
        parser.error("name at least one run, or --shipped FILE")
    shipped = [look_at_shipped(options.shipped)] if options.shipped else []
    runs = shipped or [look_at(run, options.final_test) for run in options.runs]
    here = versions(Machine(torch.device("cpu"), torch.float32, fast=False))
    out = Path(options.out or STORED.with_stem("until_sure_shipped" if options.shipped else STORED.stem))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"versions": here, "runs": runs}, indent=1) + "\n")
    print(f"{table(runs)}\n\n{out.resolve()}")


if __name__ == "__main__":
    main()
