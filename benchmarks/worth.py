"""Is voting worth its cost? Train networks for the same multiply-adds, plain and with views.

    python benchmarks/worth.py next --data fer2013.npz --device cuda --minutes 9     train the missing runs
    python benchmarks/worth.py next --data fer2013.npz --width 16 --budgets 6.5 13 26
    python benchmarks/worth.py next --task cifar10 --data cifar10_jpeg.npz --device cuda
    python benchmarks/worth.py next --task finetune --data cifar10_jpeg.npz --budgets 6 12
    python benchmarks/worth.py next --task longest --width 64 --budgets 320 --data fer2013.npz --device cuda
    python benchmarks/worth.py list                                                  list the done and missing runs

Work is counted in epochs of the plain network: for every network, a budget of 40 is the multiply-adds of 40 plain
epochs. A run has a warm-up, a constant learning rate and a decay to 0 over the last quarter of its work; the final
weights are scored. Runs with the same network and seed share the constant part: a run of 10 leaves it at 7.5, and a run
of 20 continues from there to 15. So a network can also train plain first and with views in the last quarter ("late").

Every finished run adds a line to benchmarks/results/worth.jsonl: its settings, and for every way to predict, which
images it got right (one bit each, base64), so any two runs can be compared later. Weights and logits stay in --runs.
The same command can be started several times in parallel; the processes share the runs. Test images choose nothing.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import fcntl
import itertools
import json
import math
import platform
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from timing import commit
from timing import machine as name_of
from worth_learner import Learner, ask
from worth_tasks import FALL, TASKS, Arm, Task, costs_of

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "benchmarks" / "results" / "worth.jsonl"
#: The warm-up, in plain epochs of work.
RISE = 0.5


def family(task: Task, arms: list[Arm], seed: int, options: argparse.Namespace, deadline: float) -> None:
    """Train all missing runs that share a first network and seed."""
    device, cost = torch.device(options.device), costs_of(task)
    known = {line["run"] for line in stored(Path(options.results))}
    wanted = [(arm, budget) for budget in sorted(options.budgets) for arm in arms]
    wanted = [one for one in wanted if named(task, *one, seed) not in known]
    if not wanted:
        return
    faces = len(task.splits["train"][0])
    plain_step = lambda network: network.batch * cost(network) / faces  # noqa: E731  # plain epochs of work per step
    share = arms[0].share
    longest = max(options.budgets) * max(share, 1 - share)
    most = max(math.ceil(longest / plain_step(n)) for arm in arms for n in (arm.first, arm.last)) + 1
    learner = Learner(task, device, most)
    for network in dict.fromkeys(n for arm in arms for n in (arm.first, arm.last)):
        learner.prepare(network)
    learner.start(seed)
    first, order = arms[0].first, torch.Generator().manual_seed(seed)
    done, started, spent = 0.0, time.monotonic(), 0.0
    for budget in sorted({budget for _, budget in wanted}):
        steps = round((budget * share - done) / plain_step(first))
        peak = task.rate * math.sqrt(first.batch / 128)
        rates = torch.full((steps,), peak)
        if done == 0:
            rise = max(1, round(RISE / plain_step(first)))
            rates[:rise] *= torch.linspace(1 / rise, 1, rise)[: len(rates)]
        learner.run(first, rates, pictures(order, faces, steps * first.batch), 100 * seed + round(done), deadline)
        done, trunk = budget * share, learner.state()
        spent = time.monotonic() - started
        for arm in [arm for arm, one in wanted if one == budget]:
            begun, last = time.monotonic(), arm.last
            held = round(budget * (1 - FALL - share) / plain_step(last))
            steps = round(budget * FALL / plain_step(last))
            fresh = torch.Generator().manual_seed(seed + 1)
            rates = torch.cat([torch.ones(held), torch.linspace(1, 0, steps + 1)[:-1]])
            rates *= task.rate * math.sqrt(last.batch / 128)
            loss = learner.run(last, rates, pictures(fresh, faces, len(rates) * last.batch), 1000 + seed, deadline)
            took = spent + time.monotonic() - begun
            keep(learner, task, arm, budget, seed, loss, took, cost(last), options)
            learner.restore(trunk)


def pictures(generator: torch.Generator, total: int, count: int) -> Tensor:
    """Return the indices of ``count`` images, reshuffled every epoch, (count,)."""
    turns = [torch.randperm(total, generator=generator) for _ in range(math.ceil(count / total))]
    return torch.cat(turns)[:count] if turns else torch.zeros(0, dtype=torch.long)


def named(task: Task, arm: Arm, budget: float, seed: int) -> str:
    told = "-".join(f"{name}{value}" for name, value in task.told.items() if value is not None)
    return f"{task.name}/{told}/{arm.name}/{budget:g}/{seed}"


def keep(
    learner: Learner, task: Task, arm: Arm, budget: float, seed: int, loss: float, seconds: float, cost: float,
    options: argparse.Namespace,
) -> None:  # fmt: skip
    """Score a finished run, append its line, and save its weights in float16."""
    right: dict[str, dict[str, str]] = {}
    accuracy: dict[str, dict[str, float]] = {}
    for split in ("val", "test"):
        labels = task.splits[split][1]
        with learner.scored():
            hits = {way: rows.argmax(1) == labels for way, rows in ask(learner, arm.last, split).items()}
        right[split] = {way: base64.b64encode(np.packbits(hit.numpy()).tobytes()).decode() for way, hit in hits.items()}
        accuracy[split] = {way: round(float(hit.double().mean()), 6) for way, hit in hits.items()}
    name = named(task, arm, budget, seed)
    line = {
        "run": name, "task": task.name, **task.told, "arm": arm.name, "after": arm.last.after, "budget": budget,
        "seed": seed, "cost": round(cost, 4), "batch": arm.last.batch, "loss": round(loss, 4),
        "seconds": round(seconds, 1), "device": name_of(learner.device), "commit": options.commit or commit(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "accuracy": accuracy, "right": right,
    }  # fmt: skip
    out = Path(options.results)
    with out.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
    runs = Path(options.runs)
    runs.mkdir(parents=True, exist_ok=True)
    with learner.scored() as model:
        weights = {k: (v.half() if v.is_floating_point() else v).cpu().clone() for k, v in model.state_dict().items()}
    weights = {k: v.contiguous() for k, v in weights.items()}
    save_file(weights, runs / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}.safetensors")
    shown = ", ".join(f"{way} {100 * share:.2f}" for way, share in accuracy["val"].items())
    print(f"{name}  {seconds:.0f} s  loss {loss:.3f}  validation: {shown}", flush=True)


def stored(path: Path = STORED) -> list[dict[str, Any]]:
    """Return the lines of the finished runs."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@contextlib.contextmanager
def lock(path: Path) -> Iterator[bool]:
    """Yield whether this process got the file's lock, which is released at the end or when the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def run_next(options: argparse.Namespace) -> None:
    deadline = time.monotonic() + 60 * options.minutes
    torch.backends.cudnn.benchmark = True
    task = TASKS[options.task](options.data, options.width, options.limit)
    task.teachers = options.teachers
    families = [[arm for arm in arms if task.teachers or not arm.last.distil] for arms in task.families]
    task.families = [arms for arms in families if arms]
    chosen = [task.families[i] for i in options.families] if options.families else task.families
    if options.arms:
        chosen = [arms for arms in ([a for a in family if a.name in options.arms] for family in chosen) if arms]
    for seed, (place, arms) in itertools.product(options.seeds, enumerate(chosen)):
        with lock(Path(options.runs) / f"{task.name}-{options.width}-{arms[0].name}-{seed}-{place}.lock") as mine:
            if mine:
                try:
                    family(task, arms, seed, options, deadline)
                except TimeoutError:
                    print("the time is up", flush=True)
                    return


def main() -> None:
    summary, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=("next", "list"))
    parser.add_argument("--task", choices=tuple(TASKS), default="fer2013")
    parser.add_argument("--data", default="", metavar="FILE", help="the images, .npz")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--width", type=int, default=16, help="width of the face network (default: 16)")
    parser.add_argument("--limit", type=int, help="use only this many training images")
    parser.add_argument("--budgets", type=float, nargs="+", default=[10, 20, 40, 80], help="in plain epochs of work")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--families", type=int, nargs="+", help="indices of the task's families of runs, from 0")
    parser.add_argument("--arms", nargs="+", metavar="NAME", help="run only the arms with these names")
    parser.add_argument(
        "--teachers",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="weights from --runs whose mean is half of the target, for runs that distil",
    )
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after this time; an unfinished run is lost")
    parser.add_argument("--results", default=str(STORED), metavar="FILE")
    parser.add_argument("--runs", default=str(ROOT / "runs" / "worth"), metavar="FOLDER")
    parser.add_argument("--commit", default="", help="the commit to record, if git does not know it")
    options = parser.parse_args()
    if options.step == "list":
        for line in stored(Path(options.results)):
            print(line["run"], line["accuracy"]["val"])
        return
    run_next(options)


if __name__ == "__main__":
    main()
