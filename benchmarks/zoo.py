"""Test which sites work in every family of timm and torchvision (and some of transformers), and check each verdict.

    python benchmarks/zoo.py                       all families; about an hour on two cores
    python benchmarks/zoo.py timm/resnet timm/dla  only these families; the other results are kept
    python benchmarks/zoo.py --table               rewrite docs/compatibility.md from the stored results

For each family, every entry of ``feature_info`` of two models is tried on fake tensors. The smaller model is also
injected and run: accepted sites are compared with the tests' oracle (hooks and slices), and modules are put through two
tests that share no code with the library. Is the module a cut point (with noise as its output, the model's output must
not depend on the image)? Does the network after it accept a smaller feature map of noise?
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cropvote import CropVoteError, Tokens, inject_crop_vote, remove_crop_vote, sites

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples" / "fer48")]

from zoo_models import calibrate, families, feature_sites, image_of, make, models, randomise  # noqa: E402
from zoo_page import PAGE, RESULTS, page, tools, versions  # noqa: E402
from zoo_witnesses import against_noise, against_oracle, against_plan  # noqa: E402


def sweep(family: str) -> dict[str, Any]:
    """Return all results for one family."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    start, found = time.time(), {"family": family, "models": []}
    try:
        for i, (name, small) in enumerate(models(family)):
            model = look_at(make(family, name, small), real=i == 0)
            found["models"].append({"model": name, "small": small, **model})
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {str(error)[:300]}"
    return {**found, "seconds": round(time.time() - start)}


def look_at(model: nn.Module, real: bool) -> dict[str, Any]:
    model = randomise(model).eval()
    size = image_of(model)
    if not real:
        return {"size": size, "tried": {site: attempt(model, site, size) for site in feature_sites(model, [], most=4)}}
    calibrate(model, size)
    rows = {site.name: site for site in sites(model, size, all=True)}
    listed = [site.name for site in sites(model, size)]
    tried = {site: attempt(model, site, size) for site in feature_sites(model, listed)}
    for site, verdict in tried.items():
        if site in rows and (verdict["verdict"] == "works") != (not rows[site].reason):
            verdict.update(verdict="wrong", reason=f"sites() says {rows[site].reason or 'valid'}: {verdict['reason']}")
    found: dict[str, Any] = {"size": size, "listed": listed, "tried": tried}
    with torch.no_grad():
        found["oracle"], found["alike"] = against_oracle(model.double(), size, rows, listed, list(tried))
        found["cut points"] = against_noise(model, size, rows)
        found["plan"] = against_plan(model, size, [site for site, v in tried.items() if v["verdict"] == "works"])
    return found


def plan_of(family: str, known: dict[str, Any]) -> dict[str, Any]:
    """Return only the result of a two-site plan, for a family whose sites are stored."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = randomise(make(family, known["model"], known["small"])).eval()
    calibrate(model, tuple(known["size"]))
    works = [site for site, verdict in known["tried"].items() if verdict["verdict"] == "works"]
    with torch.no_grad():
        return against_plan(model.double(), tuple(known["size"]), works)


def kind_of(layout: object) -> str:
    return "tokens" if isinstance(layout, Tokens) else str(layout)


def attempt(model: nn.Module, site: str, size: tuple[int, ...]) -> dict[str, str]:
    try:
        inject_crop_vote(model, after=site, input_size=size)
    except CropVoteError as error:
        return {"verdict": "refused", "reason": str(error)}
    except Exception as error:
        return {"verdict": "crashed", "reason": f"{type(error).__name__}: {str(error)[:300]}"}
    layout = kind_of(model._cropvote.layouts[0])
    remove_crop_vote(model)
    return {"verdict": "works", "reason": "", "layout": layout}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="timm/resnet, for example; default: all")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--plans", action="store_true", help="only the two-site plans, for the stored sites")
    parser.add_argument("--table", action="store_true", help="only rewrite the page, from the stored results")
    arguments = parser.parse_args()
    results, made_with = {}, versions()
    if arguments.table or arguments.families or arguments.plans:
        stored = json.loads(RESULTS.read_text())
        results = {result["family"]: result for result in stored["families"]}
        made_with = stored["versions"] if arguments.plans else made_with
    if arguments.plans:
        chosen = arguments.families or list(results)
        with ProcessPoolExecutor(arguments.jobs, max_tasks_per_child=1) as pool:
            futures = {pool.submit(plan_of, family, results[family]["models"][0]): family for family in chosen}
            for future in as_completed(futures):
                family = futures[future]
                results[family]["models"][0]["plan"] = future.result()
                print(family, future.result(), flush=True)
                store(results, made_with)
    elif not arguments.table:
        chosen = arguments.families or families()
        with ProcessPoolExecutor(arguments.jobs, max_tasks_per_child=1) as pool:
            for i, future in enumerate(as_completed([pool.submit(sweep, family) for family in chosen]), 1):
                result = future.result()
                results[result["family"]] = result
                print(f"[{i}/{len(chosen)}]", short(result), flush=True)
                store(results, made_with)
    PAGE.write_text(page(json.loads(RESULTS.read_text()), tools()))


def store(results: dict[str, Any], made_with: dict[str, str]) -> None:
    ordered = [results[family] for family in families() if family in results]
    stored = {"versions": made_with, "versions of the plans": versions(), "families": ordered}
    RESULTS.write_text(json.dumps(stored, indent=1) + "\n")


def short(result: dict[str, Any]) -> str:
    """Return one line for the terminal."""
    parts = [f"{result['family']:36} {result['seconds']:4} s"]
    for model in result["models"]:
        counts = Counter(verdict["verdict"] for verdict in model["tried"].values())
        parts.append(f"{model['model']} {dict(counts)} listed {len(model.get('listed', []))}")
        if "oracle" in model:
            points = model["cut points"]
            parts.append(f"error {max(model['oracle'].values(), default=0):.0e}, noise {points}")
        parts += [
            f"{s} {v['verdict'].upper()}: {v['reason']}" for s, v in model["tried"].items() if v["verdict"] in BAD
        ]
    return "; ".join([*parts, result.get("error", "")])


BAD = ("wrong", "crashed")

if __name__ == "__main__":
    main()
