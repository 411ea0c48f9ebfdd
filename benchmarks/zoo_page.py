"""Make docs/compatibility.md from the zoo's stored results and the table of PyTorch's tools."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision

from pages import folded

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "zoo.json"
PAGE = ROOT / "docs" / "compatibility.md"
TOLERANCE = 1e-4

KINDS = {
    r"depends on the images by a path around": "inside a branch",
    r"is called \d+ times": "called more than once",
    r"is never called": "never called",
    r"returns (tuple|list|dict|\w+); a site": "does not return a single tensor",
    r"does not say of which grid": "tokens without a stated grid",
    r"cannot take the views": "the network behind it cannot take a map of the views' size",
    r"a site returns a map|one map per sample": "not a map",
    r"no module named": "no module with that name",
    r"the whole side|leaves nothing": "map too small",
    r"so which of them are height and width": "layout unclear",
}


def kind(reason: str) -> str:
    text = reason.partition("cannot be a site: ")[2] or reason
    return next((name for pattern, name in KINDS.items() if re.search(pattern, reason)), text.partition(";")[0])


def page(stored: dict[str, Any], toolchain: str) -> str:
    """Return docs/compatibility.md."""
    seen, of_plans = (
        ", ".join(f"{library} {version}" for library, version in stored[key].items())
        for key in ("versions", "versions of the plans")
    )
    results = stored["families"]
    return "\n".join(
        [
            *HEADER,
            f"Versions: {seen}. For models split at two sites: {of_plans}.",
            "",
            *summary(results),
            "",
            *folded(f"All {sum(len(result['models']) for result in results)} models", table(results)),
            *TOOLS_HEADER,
            toolchain,
            "",
        ]
    )


HEADER = [
    "# Compatibility",
    "",
    "Made by `python benchmarks/zoo.py`. `inject_crop_vote` was tried at every entry of `feature_info` of one or two",
    "models of every timm module, and at modules of every torchvision classifier and of six Hugging Face models,",
    "with ten views and random weights. A site that does not work is refused with an error that says why and names the",
    "valid ones. A family's first model was also run on images: its votes were compared with the tests' oracle, and a",
    "random sample of its modules was tested with noise: does noise in place of their output hide the image, and",
    "do views of noise pass through the rest? Neither test shares code with the library.",
    "",
]
TOOLS_HEADER = [
    "## PyTorch's tools",
    "",
    "Made from the table in `tests/toolchain/`; each row is a test that compares results with an independent oracle,",
    "with a split at one site and, if the column says so, at two (`layer1` mirrored, `layer2` cropped).",
    "",
]


def summary(results: list[dict[str, Any]]) -> list[str]:
    looked = [model for result in results for model in result["models"]]
    verdicts = Counter(v["verdict"] for model in looked for v in model["tried"].values())
    alike = sum(len(model.get("alike", [])) for model in looked)
    errors = [error for model in looked for error in model.get("oracle", {}).values()]
    points: Counter[str] = Counter()
    for model in looked:
        points.update({k: v for k, v in model.get("cut points", {}).items() if isinstance(v, int)})
    missed = sum(len(model.get("cut points", {}).get("missed", [])) for model in looked)
    invented = sum(len(model.get("cut points", {}).get("invented", [])) for model in looked)
    plans = [
        model["plan"]
        for model in looked
        if "fewer than two" not in model.get("plan", {"refused": "fewer than two"}).get("refused", "")
    ]
    ran = [plan["error"] for plan in plans if "error" in plan]
    wrong = verdicts["wrong"] + sum(error > TOLERANCE for error in errors + ran)
    return [
        "| counted | number |",
        "|---|---|",
        f"| families | {len(results)} |",
        f"| models | {len(looked)} |",
        f"| sites tried | {sum(verdicts.values())} |",
        f"| working | {verdicts['works']} |",
        f"| refused, with the reason | {verdicts['refused']} |",
        f"| crashed | {verdicts['crashed'] + sum('error' in result for result in results)} |",
        f"| wrong | {wrong} |",
        f"| votes compared with the oracle on random inputs | {len(errors)} |",
        f"| largest relative error among them | {max(errors, default=0):.0e} |",
        f"| families with two working sites, tried with a plan over them (mirrored, later cropped) | {len(plans)} |",
        f"| of these, working | {len(ran)} |",
        f"| largest relative error of their votes against the oracle | {max(ran, default=0):.0e} |",
        f"| sites after which all views give the same output (class-token model, after the last attention) | {alike} |",
        f"| modules also tested with noise | {points['modules']} |",
        f"| valid sites among them, according to the noise tests | {points['true sites']} |",
        f"| of these, accepted | {points['true sites'] - missed} ({rate(points['true sites'], missed)}) |",
        f"| accepted, but not valid sites according to the noise tests | {invented} |",
    ]


def rate(total: int, missed: int) -> str:
    return f"{100 * (total - missed) / max(total, 1):.2f} %"


def table(results: list[dict[str, Any]]) -> list[str]:
    lines = ["| family | model | sites that work | layout | why the others do not |", "|---|---|---|---|---|"]
    for result in results:
        for model in result["models"]:
            tried = model["tried"]
            works = [site for site, verdict in tried.items() if verdict["verdict"] == "works"]
            why: dict[str, list[str]] = {}
            for site, verdict in tried.items():
                if verdict["verdict"] != "works":
                    why.setdefault(kind(verdict["reason"]), []).append(site)
            others = "; ".join(f"{reason}: {names(sites)}" for reason, sites in why.items())
            if not works and "listed" in model:
                others += f" (valid: {names(model['listed']) or 'none'})"
            layouts = ", ".join(sorted({v["layout"] for v in tried.values() if v["verdict"] == "works"}))
            lines.append(f"| {result['family']} | {model['model']} | {names(works)} | {layouts} | {others} |")
    return lines


def names(sites: list[str], most: int = 6) -> str:
    """Join the site names, shortened if there are many."""
    some = sites if len(sites) <= most else [*sites[:3], f"… ({len(sites)})", sites[-1]]
    return ", ".join(name if name.startswith("…") else f"`{name}`" for name in some)


def tools() -> str:
    from toolchain import LIMITS, RAISES, TOOLS

    lines = ["| tool | verdict | sites | note |", "|---|---|---|---|"]
    for tool in TOOLS:
        verdict = "raises" if tool.name in RAISES else "does not work yet" if tool.name in LIMITS else "works"
        sites = "one, two" if tool.splits else "one"
        lines.append(f"| {tool.name} | {verdict} | {sites} | {LIMITS.get(tool.name) or tool.note} |")
    return "\n".join(lines)


def versions() -> dict[str, str]:
    import transformers

    return {m.__name__: m.__version__ for m in (torch, torchvision, timm, transformers)}
