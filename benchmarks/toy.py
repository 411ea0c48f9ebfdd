"""The README's table: the flagship's narrow network on toy faces, plain and voting, over several seeds.

python benchmarks/toy.py run     trains what benchmarks/results/toy.json still lacks (20 minutes a seed)
python benchmarks/toy.py table   prints the table of the stored figures
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "toy.json"
SEEDS = (0, 1, 2)
#: Where to split and for how many epochs: the plain network also for the time that the voting one takes.
RUNS = (("none", 10), ("layer1", 10), ("none", 40), ("layer1", 40))


def run() -> None:
    sys.path.insert(0, str(ROOT / "examples" / "fer48"))
    from demo import DEMO

    from train import Config, train

    runs = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for seed in SEEDS:
        for after, epochs in RUNS:
            options = {**DEMO, "after": after, "epochs": epochs, "seed": seed, "final_test": True}
            config = Config(**options, out=f"runs/toy-{after}-{epochs}-{seed}")
            if any(old["config"] == asdict(config) for old in runs):
                continue
            result = train(config)
            kept = ("config", "versions", "data", "split", "chosen_on", "parameters", "gmacs", "seconds", "votes")
            runs.append({key: result[key] for key in kept})
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(runs, indent=1) + "\n")


def table() -> str:
    """Accuracy on the test faces, mean ± standard deviation over the seeds."""
    runs: list[dict[str, Any]] = json.loads(RESULTS.read_text())
    lines = [
        "| network | epochs | soft vote, % | hard vote, % | parameters | GMACs per image |",
        "|---|---|---|---|---|---|",
    ]
    for key in RUNS:
        mine = [one for one in runs if key == _key(one)]
        name, plain = (f"ten views after `{key[0]}`", False) if key[0] != "none" else ("plain (no vote)", True)
        soft, hard = (_spread([100 * one["votes"][how]["accuracy"] for one in mine]) for how in ("soft", "hard"))
        lines.append(
            f"| {name} | {key[1]} | {soft} | {'–' if plain else hard} | {mine[0]['parameters']:,} "
            f"| {mine[0]['gmacs']:.3f} |"
        )
    first = runs[0]
    lines += [
        "",
        f"Accuracy on toy faces (synthetic): {first['data']['faces']['train']:,} for training, "
        f"{first['data']['faces']['test']} for the test; width {first['config']['width']}; seeds "
        f"{', '.join(map(str, SEEDS))}, mean ± sd; torch {first['versions']['torch']}, CPU. "
        f"Made by `python benchmarks/toy.py`.",
    ]
    return "\n".join(lines)


def _spread(scores: list[float]) -> str:
    return f"{statistics.mean(scores):.1f} ± {statistics.stdev(scores):.1f}"


def _key(run: dict[str, Any]) -> tuple[str, int]:
    return run["config"]["after"], run["config"]["epochs"]


if __name__ == "__main__":
    if sys.argv[1:] == ["run"]:
        run()
    elif sys.argv[1:] != ["table"]:
        sys.exit(__doc__)
    print(table())
