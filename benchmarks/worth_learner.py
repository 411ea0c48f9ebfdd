"""Training and prediction for worth.py: networks that split between stages, run as CUDA graphs on a GPU."""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from cropvote import CropVoteLoss, Views, hflip, vote
from worth_tasks import Network, Task, rows_of  # before batches: it adds examples/fer48 to the path

from batches import Strengths, erase  # isort: skip

#: Subsets of the views, as indices into ten_crop() or five_crop().
FEW = {"centre": [4], "centre + mirror": [4, 9], "five crops": [0, 1, 2, 3, 4]}


class Learner:
    """A model and its optimizer; on a GPU, each network's training steps are CUDA graphs, captured once."""

    def __init__(self, task: Task, device: torch.device, steps: int) -> None:
        self.task, self.device, self.cuda = task, device, device.type == "cuda"
        layout = torch.channels_last if self.cuda else torch.contiguous_format
        self.model = task.make().to(device).to(memory_format=layout)
        self.stages = task.stages(self.model)
        self.images, self.labels = (tensor.to(device) for tensor in task.splits["train"])
        self.sure = torch.eye(int(self.labels.max()) + 1, device=device)  # one-hot targets
        self.loss = CropVoteLoss(nn.CrossEntropyLoss(label_smoothing=task.smoothing))
        self.rate = torch.zeros((), device=device)
        decayed, others = [], []
        for parameter in self.model.parameters():
            (decayed if parameter.dim() > 1 else others).append(parameter)
        groups = [{"params": decayed, "weight_decay": task.decay}, {"params": others, "weight_decay": 0.0}]
        if task.sgd:
            self.optimizer: Any = torch.optim.SGD(groups, self.rate, momentum=0.9, nesterov=True, fused=self.cuda)
        else:
            self.optimizer = torch.optim.AdamW(groups, self.rate, fused=self.cuda, capturable=self.cuda)
        self.rates = torch.zeros(steps, device=device)  # the learning rate of each step of a phase
        self.order = torch.zeros(steps * 128, dtype=torch.long, device=device)  # and its images
        self.shares = torch.zeros(steps, device=device)  # mixup: the image's own share, by step
        self.at = torch.zeros(1, dtype=torch.long, device=device)
        self.averaged = [t.detach().clone() for t in self._floats()] if task.average else []
        self.teachers = [teacher_of(task, path).to(device).to(memory_format=layout) for path in task.teachers]
        self.total = torch.zeros((), device=device)
        self.steps: dict[Network, list[Callable[[], Any]]] = {}
        self.pool: Any = None

    def choices(self, network: Network) -> list[dict[str, Views]]:
        """Return the sites of every possible draw of views, or of all views if none are drawn.

        With two sites, all views of the first are kept, each with the same view of the last.
        """
        if network.train_views is None:
            return [network.sites]
        *first, (site, views) = network.sites.items()
        count = network.train_views // math.prod(len(theirs) for _, theirs in first)
        drawn = itertools.combinations(range(len(views)), count)
        return [{**dict(first), site: views.take(some)} for some in drawn]

    def step(self, sites: dict[str, Views], network: Network) -> None:
        batch = network.batch
        self.rate.copy_(self.rates.index_select(0, self.at).squeeze())  # nothing here may synchronise with the device
        rows = self.order.index_select(0, self.at * batch + torch.arange(batch, device=self.device))
        self.at += 1
        x = self.task.alter(self.images[rows])
        if self.cuda:
            x = x.contiguous(memory_format=torch.channels_last)
        labels = self.labels[rows]
        if self.task.mixup:
            share = self.shares.index_select(0, self.at - 1)
            x, shares = x.lerp(x.roll(1, 0), 1 - share), self.sure.index_select(0, labels)
            labels = shares.lerp(shares.roll(1, 0), 1 - share)
        if network.distil:
            told = self.told(x, network.sites)
            own = labels if labels.is_floating_point() else self.sure.index_select(0, labels)
            labels = own.lerp(told, network.distil)
        erased = Strengths(erase=network.erase)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.cuda, cache_enabled=False):
            found = rows_of(self.stages, x, sites, lambda views: erase(views, erased, 0.0) if erased.erase else views)
            loss = self.loss(found, labels)
        if network.teach:
            loss = loss + network.teach * divergence(found.unflatten(0, (batch, -1)).float())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.total += loss.detach()
        if self.averaged:
            torch._foreach_lerp_(self.averaged, self._floats(), 1 - self.task.average)

    @torch.no_grad()
    def told(self, x: Tensor, sites: dict[str, Views]) -> Tensor:
        """Return the teachers' probabilities, (n, k): of the mean logits of their centre views and mirror images."""
        two = {site: views.take(FEW["centre + mirror"]) if len(views) == 10 else views for site, views in sites.items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.cuda, cache_enabled=False):
            logits = torch.stack([rows_of(self.task.stages(teacher), x, two) for teacher in self.teachers])
        return logits.float().mean(0).unflatten(0, (len(x), -1)).mean(1).softmax(1)

    def prepare(self, network: Network) -> list[Callable[[], Any]]:
        """Return a network's training steps, one for each draw of its views."""
        if network in self.steps:
            return self.steps[network]
        choices = self.choices(network)
        if not self.cuda:
            self.steps[network] = [lambda s=s: self.step(s, network) for s in choices]
            return self.steps[network]
        kept = self.state()
        stream, graphs = torch.cuda.Stream(), []
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(4):
                self.step(choices[0], network)
            for sites in choices:
                graph = torch.cuda.CUDAGraph()
                self.optimizer.zero_grad(set_to_none=True)
                torch.cuda.synchronize()
                graph.capture_begin(pool=self.pool)
                self.step(sites, network)
                graph.capture_end()
                self.pool = self.pool or graph.pool()
                graphs.append(graph)
        torch.cuda.current_stream().wait_stream(stream)
        self.steps[network] = [graph.replay for graph in graphs]
        self.restore(kept)
        return self.steps[network]

    def run(self, network: Network, rates: Tensor, order: Tensor, seed: int, deadline: float) -> float:
        """Train one step per rate and return the mean loss. The seed decides augmentation and views.

        Raises:
            TimeoutError: If the deadline has passed.
        """
        self.model.train()
        steps = self.prepare(network)
        torch.manual_seed(seed)
        draw = random.Random(seed)  # noqa: S311
        self.rates[: len(rates)] = rates.to(self.device)
        self.order[: len(order)] = order.to(self.device)
        if self.task.mixup:
            drawn = np.random.default_rng(seed).beta(self.task.mixup, self.task.mixup, len(rates))
            self.shares[: len(rates)] = torch.from_numpy(drawn).to(self.shares)
        self.at.zero_()
        self.total.zero_()
        for i in range(len(rates)):
            draw.choice(steps)()
            if i % 100 == 99:
                if self.cuda:
                    torch.cuda.synchronize()
                if time.monotonic() > deadline:
                    raise TimeoutError
        return float(self.total) / max(1, len(rates))

    def state(self) -> list[Tensor]:
        """Return a copy of all weights, statistics and optimizer moments."""
        return [tensor.clone() for tensor in self._tensors()]

    def restore(self, state: list[Tensor]) -> None:
        for tensor, value in itertools.zip_longest(self._tensors(), state):
            if value is None:  # a moment the optimizer has created since: reset it
                tensor.zero_()
            else:
                tensor.copy_(value)

    @torch.no_grad()
    def _tensors(self) -> list[Tensor]:
        moments = [value for p in self.model.parameters() for value in self.optimizer.state.get(p, {}).values()
                   if isinstance(value, Tensor)]  # fmt: skip
        return [*(t.detach() for t in self.model.state_dict().values()), *self.averaged, *moments]

    @torch.no_grad()
    def _floats(self) -> list[Tensor]:
        """Return the weights and statistics, which can be averaged."""
        return [t.detach() for t in self.model.state_dict().values() if t.is_floating_point()]

    @contextlib.contextmanager
    def scored(self) -> Iterator[nn.Module]:
        """Yield the network to be scored, with averaged weights if the task uses them."""
        kept = self.state()
        if self.averaged:
            torch._foreach_copy_(self._floats(), self.averaged)
        yield self.model.eval()
        self.restore(kept)

    def start(self, seed: int) -> None:
        """Reset the weights and the optimizer."""
        torch.manual_seed(seed)
        self.model.load_state_dict(self.task.make().state_dict())
        if self.averaged:
            torch._foreach_copy_(self.averaged, self._floats())
        self.restore([*(t.clone() for t in self.model.state_dict().values()), *(t.clone() for t in self.averaged)])


def teacher_of(task: Task, path: Path) -> nn.Module:
    """Return a network of the task with the weights that worth.py stored."""
    model = task.make()
    model.load_state_dict({name: tensor.to(model.state_dict()[name].dtype) for name, tensor in load_file(path).items()})
    return model.eval().requires_grad_(False)


def divergence(views: Tensor) -> Tensor:
    """Return the KL divergence of each view's prediction from its sample's detached mean; ``views`` is (n, v, k)."""
    each = views.log_softmax(-1)
    mean = each.exp().mean(1, keepdim=True).detach()
    return F.kl_div(each, mean.expand_as(each), reduction="sum") / (each.shape[0] * each.shape[1])


@torch.no_grad()
def ask(learner: Learner, network: Network, split: str, batch: int = 512) -> dict[str, Tensor]:
    """Return the logits or votes, (n, k), for each way to predict."""
    images = learner.task.splits[split][0]
    sites = network.sites or {"input": hflip()}
    found = []
    for some in images.split(batch):
        x = learner.task.plainly(some.to(learner.device))
        rows = rows_of(learner.stages, x, sites)
        found.append(rows.unflatten(0, (len(some), -1)).float().cpu())
    rows = torch.cat(found)
    if not network.sites:
        return {"plain": rows[:, 0], "mirrored input": rows.mean(1)}
    ways = {name: rows[:, views].mean(1) for name, views in FEW.items() if max(views) < rows.shape[1]}
    everything = "ten views" if rows.shape[1] == 10 else "five crops"
    ways[everything] = rows.mean(1)
    ways[f"{everything}, hard"] = vote(rows.flatten(0, 1), rows.shape[1], "hard")
    return ways
