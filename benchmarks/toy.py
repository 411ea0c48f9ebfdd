"""The README's table: a narrow network on toy faces, plain and voting, over three seeds.

python benchmarks/toy.py run     train the runs missing from runs/toy (an hour), and store the figures
python benchmarks/toy.py table   print the stored figures as a table
python benchmarks/toy.py picture draw docs/figures/toy.svg from them: accuracy against multiply-adds
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "fer48"
RESULTS = ROOT / "benchmarks" / "results" / "toy.json"
#: Networks by number of epochs; an epoch with ten views after layer1 costs as much as 5.2 plain epochs.
RUNS = {10: "none layer1 layer1=hflip,layer3=five", 52: "none"}

sys.path.insert(0, str(EXAMPLE))
import compare  # noqa: E402


def run() -> None:
    stored = {}
    for epochs, networks in RUNS.items():
        out = f"runs/toy-{epochs}"
        options = f"--sites {networks} --seeds 0 1 2 --width 8 --batch 32 --epochs {epochs} --final-test --out {out}"
        compare.main(options.split())
        stored[epochs] = json.loads(Path(out, "compare.json").read_text())
    RESULTS.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n")


def picture() -> None:
    """Draw the networks that were trained for the same number of epochs."""
    (epochs, stored), *_ = json.loads(RESULTS.read_text()).items()
    where = f"700 toy test faces (synthetic), {epochs} epochs, three seeds"
    compare.plot(ROOT / "docs" / "figures" / "toy.svg", stored["rows"], where)


def table() -> str:
    """Return accuracy on the test faces, mean ± standard deviation over the seeds."""
    stored: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text())
    lines = [
        "| network | epochs | soft vote, % | hard vote, % | parameters | GMACs per image |",
        "|---|---|---|---|---|---|",
    ]
    for epochs, found in stored.items():
        rows = {(row["site"], row["vote"]): row for row in found["rows"]}
        for (site, vote), row in rows.items():
            if vote == "hard":
                continue
            name = compare.name_of(site).replace("layer1", "`layer1`").replace("layer3", "`layer3`")
            hard = compare.spread(rows[site, "hard"]["accuracy"]) if (site, "hard") in rows else "–"
            soft, cost = compare.spread(row["accuracy"]), f"{row['parameters']:,} | {row['gmacs']:.3f}"
            lines.append(f"| {name} | {epochs} | {soft} | {hard} | {cost} |")
    one = next(iter(stored.values()))
    lines += [
        "",
        f"Accuracy on {rows['none', 'soft']['faces']} toy test faces (synthetic) of each seed; width "
        f"{one['config']['width']}; seeds {', '.join(map(str, one['seeds']))}, mean ± sd; torch "
        f"{one['versions']['torch']}, CPU. Made by `python benchmarks/toy.py`.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:] == ["run"]:
        run()
    elif sys.argv[1:] not in (["table"], ["picture"]):
        sys.exit(__doc__)
    if sys.argv[1:] != ["table"]:
        picture()
    print(table())
