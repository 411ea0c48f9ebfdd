"""Train the same small network twice on toy faces, plain and voting, and set them side by side.

python examples/fer48/demo.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from train import Config, train

#: Small enough for two CPU cores and five minutes; the paper's network has width 64.
DEMO: dict[str, Any] = {"width": 8, "epochs": 10, "batch": 32}


def main() -> None:
    runs = [train(Config(after=after, out=f"runs/demo-{after}", **DEMO)) for after in ("none", "layer1")]
    print(f"\n{table(runs)}\n")
    print("Synthetic faces, one seed, a narrow network: an example of the output, not evidence.")
    print("Confusion matrices:", *(Path(run["out"]).resolve() / "confusion_matrix.png" for run in runs), sep="\n  ")


def table(runs: list[dict[str, Any]]) -> str:
    """Plain, soft and hard, one line each; accuracy with half the width of its 95 % interval."""
    lines = [f"{'network':<34}{'vote':<7}{'accuracy (%)':<15}{'parameters':>11}{'GMACs':>9}{'seconds':>9}"]
    for run in runs:
        after, faces = run["config"]["after"], run["data"]["faces"][run["split"]]
        name = "plain" if after == "none" else f"ten views after {after}"
        for how, score in run["votes"].items():
            if after == "none" and how != "soft":
                continue
            accuracy = score["accuracy"]
            margin = 1.96 * (accuracy * (1 - accuracy) / faces) ** 0.5
            lines.append(
                f"{name:<34}{'-' if after == 'none' else how:<7}{f'{100 * accuracy:.1f} ± {100 * margin:.1f}':<15}"
                f"{run['parameters']:>11,}{run['gmacs']:>9.4f}{run['seconds']:>9.0f}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
