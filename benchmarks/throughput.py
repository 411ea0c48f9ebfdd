"""Measure images per second in training and inference, against the device's limits: part of docs/speed.md.

    python benchmarks/throughput.py                        on a GPU: batch sizes 135 (the paper's), 512 and 2048
    python benchmarks/throughput.py --batches 8 --rounds 3     on a CPU

The paper's network at 48x48 on random images, plain and with ten views: eager in float32, and fast (bfloat16 autocast,
channels_last, torch.compile, a fused optimizer); on a GPU also in other modes, with the time by kind of kernel. Two
lower bounds on the time are measured too: the multiply-adds at the rate of a large matrix product, and the bytes saved
for backward, written and read once, at the rate of a copy. Each row is stored in benchmarks/results/throughput.json
when it is measured, and not measured again. `python benchmarks/speed.py --page` makes the page.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
from pages import folded, wrapped  # noqa: E402
from timing import commit, machine, peak, seconds  # noqa: E402

NETWORKS = ("none", "layer1", PLANS[0], "layer3", "layer2", "input")
WARM_UP, STEPS = 5, 10


@dataclass(frozen=True)
class Mode:
    """How a network runs: its precision, its layout, and torch.compile's mode (None: eager)."""

    kind: torch.dtype
    layout: torch.memory_format
    compiled: str | None = None

    @property
    def rate(self) -> str:
        """Return the name of the matrix product whose rate is the limit."""
        return "fast" if self.kind == torch.bfloat16 else "float32 eager"


MODES = {
    "fast": Mode(torch.bfloat16, torch.channels_last, "default"),
    "float32 eager": Mode(torch.float32, torch.contiguous_format),
}
#: Other modes, measured on a GPU with some networks and the first batch size.
WAYS = {
    "fast, as CUDA graphs": Mode(torch.bfloat16, torch.channels_last, "reduce-overhead"),
    "fast, contiguous": Mode(torch.bfloat16, torch.contiguous_format, "default"),
    "bfloat16 eager": Mode(torch.bfloat16, torch.channels_last),
}
#: Kinds of kernels by parts of their names; the first match counts, unmatched kernels are "the rest".
KERNELS = {
    "fused by the compiler (norms, activations, the split, sums)": ("triton",),
    "convolutions and matrix products": ("conv", "gemm", "wgrad", "dgrad", "fprop", "nvjet", "cutlass", "cudnn"),
    "optimizer": ("adam", "multi_tensor"),
}


def measure(device: torch.device, options: argparse.Namespace) -> None:
    """Measure the device's missing rows, most interesting network first, until the time is up."""
    started, out = time.monotonic(), Path(options.out)
    torch.backends.cudnn.benchmark = True
    stored = json.loads(out.read_text()) if out.exists() else {}
    mine = stored.setdefault(machine(device), {"rows": []})
    mine["commit"], mine["command"] = commit(), f"benchmarks/throughput.py {shlex.join(sys.argv[1:])}".strip()
    mine["versions"] = f"torch {torch.__version__}, Python {platform.python_version()}"
    known = {(row["network"], row["mode"], row["batch"]) for row in mine["rows"]}
    for network, mode, batch in asked(device, options):
        if (network, mode, batch) in known or time.monotonic() - started > 60 * options.minutes:
            continue
        try:
            mine["rows"].append(row(network, mode, batch, device, options.rounds))
        except torch.OutOfMemoryError:
            continue
        print(*mine["rows"][-1].items(), flush=True)
        out.write_text(json.dumps(stored, indent=1) + "\n")
    parts: dict[str, Callable[..., Any]] = {"floors": floors, "split": split}
    if device.type == "cuda":
        parts["kernels"] = kernels
    for name, make in parts.items():
        if name not in mine and not options.rows_only:
            mine[name] = make(device, options.rounds)
            print(name, mine[name], flush=True)
            out.write_text(json.dumps(stored, indent=1) + "\n")


def asked(device: torch.device, options: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Yield network, mode and batch size: all networks for the first batch size, two networks for the others."""
    for batch in options.batches:
        first = batch == options.batches[0]
        for mode in MODES:
            for network in options.networks:
                if first or network in ("none", "layer1"):
                    yield network, mode, batch
        if first and device.type == "cuda":
            yield from ((n, mode, batch) for mode in WAYS for n in options.networks if n in ("none", "layer1"))


def training(network: str, mode: Mode, batch: int, device: torch.device) -> tuple[nn.Module, Callable[[], Any], Any]:
    """Return the network, a function for one training step, and one for inference."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = fer_resnet18()
    if network != "none":
        inject_crop_vote(model, after=sites_of(network), input_size=48)
    model = model.to(device).to(memory_format=mode.layout)
    run = torch.compile(model, mode=mode.compiled) if mode.compiled else model
    images = torch.randn(batch, 3, 48, 48, device=device).contiguous(memory_format=mode.layout)
    targets = torch.randint(7, (batch,), device=device)
    loss = CropVoteLoss(nn.CrossEntropyLoss())
    optimizer = torch.optim.AdamW(model.parameters(), fused=mode.compiled is not None and device.type == "cuda")
    cast = mode.kind != torch.float32

    def step() -> None:
        with torch.autocast(device.type, mode.kind, enabled=cast):
            value = loss(run(images), targets)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()

    @torch.no_grad()
    def infer() -> Tensor:
        with torch.autocast(device.type, mode.kind, enabled=cast):
            return run(images)

    return model, step, infer


def row(network: str, mode: str, batch: int, device: torch.device, rounds: int) -> dict[str, Any]:
    """Measure images per second (median of the rounds), and a training step's peak memory per image."""
    model, step, infer = training(network, {**MODES, **WAYS}[mode], batch, device)
    found: dict[str, Any] = {"network": network, "mode": mode, "batch": batch}
    for what, call in (("training", step), ("inference", infer)):
        model.train(what == "training")
        taken = repeated(call, device, rounds)
        found[what] = batch / statistics.median(taken)
        found[f"{what}_range"] = [batch / max(taken), batch / min(taken)]
    model.train()
    found["peak_mib"] = peak(step, device) / batch
    return found


def kernels(device: torch.device, rounds: int) -> dict[str, Any]:
    """Measure a fast training step with ten views after layer1, batch size 135: total ms, and ms per kind of kernel."""
    _, step, _ = training("layer1", MODES["fast"], 135, device)
    taken = 1e3 * statistics.median(repeated(step, device, rounds))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    times, longest = dict.fromkeys([*KERNELS, "the rest"], 0.0), dict[str, float]()
    for event in seen.key_averages():
        kind = next((k for k, parts in KERNELS.items() if any(p in event.key.lower() for p in parts)), "the rest")
        spent = event.self_device_time_total / 1e3 / STEPS
        times[kind] += spent
        longest[event.key] = spent
    top = sorted(longest.items(), key=lambda item: -item[1])[:12]
    return {"step": taken, "kinds": times, "longest": dict(top)}


def repeated(call: Callable[[], Any], device: torch.device, rounds: int) -> list[float]:
    """Return the seconds per call, one value per round, each the mean of several queued calls."""
    steps, warm_up = (STEPS, WARM_UP) if device.type == "cuda" else (1, 1)
    for _ in range(warm_up):
        call()
    return [seconds(lambda: [call() for _ in range(steps)], device) / steps for _ in range(rounds)]


def floors(device: torch.device, rounds: int) -> dict[str, float]:
    """Measure multiply-adds per second of a large matrix product in both precisions, and bytes per second of a copy."""
    side, size = (8192, 2**30) if device.type == "cuda" else (2048, 2**26)
    found = {}
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # TensorFloat-32 on a GPU: PyTorch's default for convolutions
    for name, mode in MODES.items():
        one = torch.randn(side, side, device=device, dtype=mode.kind)
        found[name] = side**3 / min(repeated(lambda one=one: one @ one, device, max(rounds, 7)))
    torch.set_float32_matmul_precision(before)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found["copy"] = 2 * size / min(repeated(lambda: target.copy_(source), device, max(rounds, 7)))
    return found


def split(device: torch.device, rounds: int) -> dict[str, dict[str, float]]:
    """Return the time of a plain copy of the views over the time of the split after layer1, forward and backward."""
    batch = 135 if device.type == "cuda" else 8
    copying = floors(device, rounds)["copy"]
    found = {}
    for name, mode in MODES.items():
        x = torch.randn(batch, 64, 48, 48, device=device, dtype=mode.kind)
        x = x.contiguous(memory_format=mode.layout).requires_grad_()
        for how, function in {"eager": split_views, "compiled": torch.compile(split_views)}.items():
            y = function(x, ten_crop())
            gradient = torch.randn_like(y)
            copied = 2 * y.nbytes / copying  # seconds to copy the views
            forward = min(repeated(lambda f=function, x=x: f(x.detach(), ten_crop()), device, rounds))
            back = lambda y=y, x=x, g=gradient: torch.autograd.grad(y, x, g, retain_graph=True)  # noqa: E731
            backward = min(repeated(back, device, rounds))
            found[f"{name}, {how}"] = {"forward": copied / forward, "backward": copied / backward}
    return found


def section() -> list[str]:
    """Return this script's section of docs/speed.md, empty if nothing was measured."""
    if not STORED.exists():
        return []
    stored = json.loads(STORED.read_text())
    plain = fer_resnet18()
    table = profile(plain, 48, sites=[sites_of(name) for name in NETWORKS if name not in ("none", "input")])
    costs = {name: table["baseline" if name == "none" else name] for name in NETWORKS}
    lines = [
        "## Images a second", "",
        *wrapped("""
            **On a GPU, measure with large batches.** With a small batch, a fast GPU waits for the CPU, particularly
            when it runs the plain network, and this makes the vote look cheaper than it is. The rates below were
            measured by `python benchmarks/throughput.py` in a different run from the tables above: compare rates only
            within a table."""),
        "",
    ]  # fmt: skip
    how = """
        *fast*: bfloat16 autocast, channels_last, `torch.compile` and, on a GPU, a fused optimizer. *fast, as CUDA
        graphs*: the same, compiled with `mode="reduce-overhead"`. *fast, contiguous*: the same as *fast* but without
        channels_last. *bfloat16 eager*: bfloat16 autocast and channels_last, not compiled. *float32 eager*: PyTorch's
        defaults, which means TF32 convolutions on a GPU. A training step here is a forward pass, a backward pass and an
        AdamW update. Two upper limits are given for each training rate, in images per second. The *work limit* is the
        rate that training would reach if three times the multiply-adds of the forward pass ran at the speed of a large
        matrix product in the same precision. The *bytes limit* is the rate that it would reach if the only cost were
        writing and reading once, at copy speed, the data that training keeps for the backward pass. Limits and rates
        were measured minutes apart: on a shared machine, a rate may be above its limit, as the float32 rates on the
        CPU are."""
    for name, found in stored.items():
        rates, cells = found["floors"], found["split"]
        mine = [
            *wrapped(how), "",
            *wrapped(
                f"{found['versions']}, commit {found['commit']}. A large matrix product does "
                f"{rates['fast'] / 1e9:,.0f} × 10⁹ (bfloat16) or {rates['float32 eager'] / 1e9:,.0f} × 10⁹ (float32) "
                f"multiply-adds a second; a copy moves {rates['copy'] / 1e9:,.0f} GB a second, reading and writing "
                f"counted together."
            ), "",
            "| ten views after | mode | batch | training, images / s | training time / plain "
            "| GMACs / plain | work limit | bytes limit "
            "| inference, images / s | training peak, MiB per image |",
            "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]  # fmt: skip
        plains = {(r["mode"], r["batch"]): r["training"] for r in found["rows"] if r["network"] == "none"}
        modes = {**MODES, **WAYS}
        places = {name: place for place, name in enumerate([*modes, *NETWORKS])}
        for row in sorted(found["rows"], key=lambda r: (places[r["mode"]], r["batch"], places[r["network"]])):
            cost, base = costs[row["network"]], plains.get((row["mode"], row["batch"]))
            rate = modes[row["mode"]].rate
            size = cost.train_memory_mib * 2**20 / (2 if rate == "fast" else 1)
            ratio = f"{base / row['training']:.2f}" if base else "–"
            peak_of = "–" if "graphs" in row["mode"] else f"{row['peak_mib']:.1f}"  # CUDA graphs allocate it beforehand
            label = "plain" if row["network"] == "none" else f"`{row['network']}`"
            work, moved = rates[rate] / (3e9 * cost.gmacs), rates["copy"] / (2 * size)
            mine.append(
                f"| {label} | {row['mode']} | {row['batch']} | {_rate(row['training'])} | "
                f"{ratio} | {cost.gmacs / costs['none'].gmacs:.2f} | "
                f"{_rate(work)} | {_rate(moved)} | {_rate(row['inference'])} | {peak_of} |"
            )
        mine += ["", *wrapped("""
            The time that a plain copy of the ten views would take, relative to the time of the split alone (after
            `layer1`); above 100% the split is faster than the copy:"""), "", "| | forward | backward |",
                 "|---|---:|---:|"]  # fmt: skip
        for mode, one in cells.items():
            precision = mode.replace("float32 eager", "float32").replace("fast", "bfloat16")
            mine.append(f"| {precision} | {one['forward']:.0%} | {one['backward']:.0%} |")
        lines += folded(f"{name}: all rates", [*mine, "", *_kernels(found.get("kernels"))])
    return lines


def _kernels(found: dict[str, Any] | None) -> list[str]:
    """Return the table of a step's time by kind of kernel, if it was measured."""
    if found is None:
        return []
    spent = sum(found["kinds"].values())
    lines = [
        f"A training step with ten views after `layer1`, fast, batch 135: {found['step']:.1f} ms; the device",
        f"works in {spent:.1f} ms of them:", "", "| kernels | ms a step | share |", "|---|---:|---:|",
    ]  # fmt: skip
    return [*lines, *(f"| {kind} | {ms:.2f} | {ms / spent:.0%} |" for kind, ms in found["kinds"].items()), ""]


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def main(argv: list[str] | None = None) -> None:
    summary, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", type=int, nargs="+", default=[135, 512, 2048])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS, metavar="NAME")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=1e6, help="start no further row after this time")
    parser.add_argument("--rows-only", action="store_true", help="measure no limits, split or kernels")
    parser.add_argument("--out", default=str(STORED), metavar="FILE")
    options = parser.parse_args(argv)
    measure(torch.device(options.device), options)


if __name__ == "__main__":
    main()
