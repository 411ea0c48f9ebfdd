"""Images a second in training and inference, beside what the device could do at most: a part of docs/speed.md.

    python benchmarks/throughput.py                        on a GPU: batches 135 (the paper's), 512 and 2048
    python benchmarks/throughput.py --batches 8 --rounds 3     on a CPU

The paper's network at 48x48 on random images, plain and with ten views: eager in float32, and fast (bfloat16 autocast,
channels_last, torch.compile, a fused optimizer). Two floors are measured beside them: the multiply-adds at the rate of
a large matrix product, and the bytes that training keeps, written and read once, at the rate of a copy. Every row is
written to benchmarks/results/throughput.json as soon as it is measured, and not measured again; the page is made by
`python benchmarks/speed.py --page`.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cropvote import CropVoteLoss, inject_crop_vote, profile, split_views, ten_crop

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "benchmarks" / "results" / "throughput.json"
sys.path.insert(0, str(ROOT / "examples" / "fer48"))

from config import PLANS, sites_of  # noqa: E402
from model import fer_resnet18  # noqa: E402
from timing import commit, machine, peak, seconds  # noqa: E402

NETWORKS = ("none", "layer1", PLANS[0], "layer3", "layer2", "input")
MODES = {"fast": torch.bfloat16, "float32 eager": torch.float32}
WARM_UP, STEPS = 5, 10


def measure(device: torch.device, batches: list[int], rounds: int, minutes: float, out: Path) -> None:
    """What is missing of the device's rows, until the time is up; the networks in the order of their interest."""
    started = time.monotonic()
    stored = json.loads(out.read_text()) if out.exists() else {}
    mine = stored.setdefault(machine(device), {"rows": []})
    mine["commit"], mine["command"] = commit(), f"benchmarks/throughput.py {shlex.join(sys.argv[1:])}".strip()
    mine["versions"] = f"torch {torch.__version__}, Python {platform.python_version()}"
    for name, make in {"floors": floors, "split": split}.items():
        if name not in mine:
            mine[name] = make(device, rounds)
    known = {(row["network"], row["mode"], row["batch"]) for row in mine["rows"]}
    for batch in batches:
        for mode in MODES:
            for network in NETWORKS:
                if (network, mode, batch) in known or time.monotonic() - started > 60 * minutes:
                    continue
                try:
                    mine["rows"].append(row(network, mode, batch, device, rounds))
                except torch.OutOfMemoryError:
                    continue
                print(*mine["rows"][-1].items(), flush=True)
                out.write_text(json.dumps(stored, indent=1) + "\n")
    out.write_text(json.dumps(stored, indent=1) + "\n")


def row(network: str, mode: str, batch: int, device: torch.device, rounds: int) -> dict[str, Any]:
    """Images a second of one network, mode and batch, median of the rounds; and the peak memory of a training step."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    fast, kind = mode == "fast", MODES[mode]
    layout = torch.channels_last if fast else torch.contiguous_format
    model = fer_resnet18()
    if network != "none":
        inject_crop_vote(model, after=sites_of(network), input_size=48)
    model = model.to(device).to(memory_format=layout)
    run = torch.compile(model) if fast else model
    images = torch.randn(batch, 3, 48, 48, device=device).contiguous(memory_format=layout)
    targets = torch.randint(7, (batch,), device=device)
    loss = CropVoteLoss(nn.CrossEntropyLoss())
    optimizer = torch.optim.AdamW(model.parameters(), fused=fast and device.type == "cuda")

    def step() -> None:
        with torch.autocast(device.type, kind, enabled=fast):
            value = loss(run(images), targets)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()

    @torch.no_grad()
    def infer() -> Tensor:
        with torch.autocast(device.type, kind, enabled=fast):
            return run(images)

    found: dict[str, Any] = {"network": network, "mode": mode, "batch": batch}
    for what, call in (("training", step), ("inference", infer)):
        model.train(what == "training")
        taken = repeated(call, device, rounds)
        found[what] = batch / statistics.median(taken)
        found[f"{what}_range"] = [batch / max(taken), batch / min(taken)]
    model.train()
    found["peak_mib"] = peak(step, device) / batch
    return found


def repeated(call: Callable[[], Any], device: torch.device, rounds: int) -> list[float]:
    """Seconds of one call, each the mean of several that the device may queue."""
    steps, warm_up = (STEPS, WARM_UP) if device.type == "cuda" else (1, 1)
    for _ in range(warm_up):
        call()
    return [seconds(lambda: [call() for _ in range(steps)], device) / steps for _ in range(rounds)]


def floors(device: torch.device, rounds: int) -> dict[str, float]:
    """Multiply-adds a second of a large matrix product, in both precisions, and bytes a second of a copy."""
    side, size = (8192, 2**30) if device.type == "cuda" else (2048, 2**26)
    found = {}
    for name, kind in MODES.items():
        one = torch.randn(side, side, device=device, dtype=kind)
        found[name] = side**3 / min(repeated(lambda one=one: one @ one, device, max(rounds, 7)))
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found["copy"] = 2 * size / min(repeated(lambda: target.copy_(source), device, max(rounds, 7)))
    return found


def split(device: torch.device, rounds: int) -> dict[str, dict[str, float]]:
    """The split after layer1 alone: bytes read and written a second, forward and backward, over the rate of a copy."""
    batch = 135 if device.type == "cuda" else 8
    copying = floors(device, rounds)["copy"]
    found = {}
    for name, kind in MODES.items():
        layout = torch.channels_last if name == "fast" else torch.contiguous_format
        x = torch.randn(batch, 64, 48, 48, device=device, dtype=kind).contiguous(memory_format=layout).requires_grad_()
        for how, function in {"eager": split_views, "compiled": torch.compile(split_views)}.items():
            y = function(x, ten_crop())
            gradient = torch.randn_like(y)
            moved = 2 * y.nbytes  # every view is read once and written once
            forward = min(repeated(lambda f=function, x=x: f(x.detach(), ten_crop()), device, rounds))
            back = lambda y=y, x=x, g=gradient: torch.autograd.grad(y, x, g, retain_graph=True)  # noqa: E731
            backward = min(repeated(back, device, rounds))
            found[f"{name}, {how}"] = {"forward": moved / forward / copying, "backward": moved / backward / copying}
    return found


def section() -> list[str]:
    """The part of docs/speed.md, once something is measured."""
    if not STORED.exists():
        return []
    stored = json.loads(STORED.read_text())
    plain = fer_resnet18()
    table = profile(plain, 48, sites=[sites_of(name) for name in NETWORKS if name not in ("none", "input")])
    costs = {name: table["baseline" if name == "none" else name] for name in NETWORKS}
    lines = [
        "## Images a second", "",
        "Made by `python benchmarks/throughput.py`. *fast*: bfloat16 autocast, channels_last, `torch.compile` and, on",
        "a GPU, a fused optimizer. A training step is forward, backward, AdamW. The floors are what the device could",
        "do at most, as images a second; *work*: three times the multiply-adds at the rate of a large matrix",
        "product of that precision; *bytes*: what training keeps, written and read once, at the rate of a copy. Floors",
        "and networks are measured minutes apart: on a machine that others share, a figure may stand above its floor.",
        "",
    ]  # fmt: skip
    for name, found in stored.items():
        rates, cells = found["floors"], found["split"]
        lines += [
            f"### {name}", "",
            f"{found['versions']}, commit {found['commit']}; a matrix product: {rates['fast'] / 1e9:,.0f} (bfloat16) "
            f"and {rates['float32 eager'] / 1e9:,.0f} (float32) 10⁹ multiply-adds a second; a copy: "
            f"{rates['copy'] / 1e9:,.0f} GB a second, read and written.", "",
            "| ten views after | mode | batch | training, images / s | time over the plain one's "
            "| GMACs over the plain one's | floor of the work | floor of the bytes "
            "| inference, images / s | peak MiB an image |",
            "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]  # fmt: skip
        plains = {(r["mode"], r["batch"]): r["training"] for r in found["rows"] if r["network"] == "none"}
        for row in sorted(found["rows"], key=lambda r: (r["mode"], r["batch"], NETWORKS.index(r["network"]))):
            cost, base = costs[row["network"]], plains.get((row["mode"], row["batch"]))
            size = cost.train_memory_mib * 2**20 / (2 if row["mode"] == "fast" else 1)
            ratio = f"{base / row['training']:.2f}" if base else "–"
            label = "plain" if row["network"] == "none" else f"`{row['network']}`"
            work, memory = rates[row["mode"]] / (3e9 * cost.gmacs), rates["copy"] / (2 * size)
            lines.append(
                f"| {label} | {row['mode']} | {row['batch']} | {_rate(row['training'])} | "
                f"{ratio} | {cost.gmacs / costs['none'].gmacs:.2f} | "
                f"{_rate(work)} | {_rate(memory)} | {_rate(row['inference'])} | {row['peak_mib']:.1f} |"
            )
        lines += ["", "The split after `layer1` alone, bytes a second over those of a copy:", "",
                  "| | forward | backward |", "|---|---:|---:|"]  # fmt: skip
        lines += [f"| {how} | {one['forward']:.0%} | {one['backward']:.0%} |" for how, one in cells.items()]
        lines += [""]
    return lines


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def main() -> None:
    summary, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", type=int, nargs="+", default=[135, 512, 2048])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=1e6, help="measure no further row after them")
    parser.add_argument("--out", default=str(STORED), metavar="FILE")
    options = parser.parse_args()
    measure(torch.device(options.device), options.batches, options.rounds, options.minutes, Path(options.out))


if __name__ == "__main__":
    main()
