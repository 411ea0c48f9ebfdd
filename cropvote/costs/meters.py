"""Meters: the work and the memory of a fake model's call, plain or split at a site; and the time of real ones."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._torch import FlopCounterMode, StorageWeakRef, TorchDispatchMode, storage_key, uncounted_attention
from ..call import PLAIN, cut_views
from ..cuts import After, format_sites, join_parts, make_cuts
from ..errors import OptionError
from ..images import INPUT, Example, Spec, map_first_tensor
from ..layouts import Layout, sides
from ..options import NAMED, eval_indices
from ..probe.fakes import first_line
from ..probe.taint import tensors_in
from ..probe.trial import Split
from ..probe.verdicts import Probe, Site
from ..surgery import inject_crop_vote
from ..swapping import restore_forward, swap_forward
from ..views import Views

__all__ = ["SiteCost"]

BASELINE = "baseline"
MIB = 2**20
#: The batches whose difference gives the memory of an image; what does not grow with the batch drops out.
BATCHES = (4, 8)


class SiteCost(NamedTuple):
    """What one network costs per image: the plain one (``baseline``), or one that votes.

    Fields:
        site: the split's site, or "baseline"; of a plan over several sites, each with its views.
        shape: its output's shape without the batch; empty for the baseline.
        gmacs: multiply-adds / 1e9, in eval mode, for all views.
        ratio: ``gmacs`` over the baseline's.
        train_memory_mib: MiB of the distinct storages that autograd keeps for the backward pass, in training mode.
        inference_peak_mib: the largest sum of the activations alive at once, in MiB, in eval mode without gradients, in
            the order of eager PyTorch; the image counts, parameters and scratch space inside operations do not.
        parameters: their number, which the split does not change.
        tail_share: the share of the plain network's multiply-adds behind the site.
        distinct: how many of the views differ there.
        gmacs_by_views: multiply-adds / 1e9 where 1, 2, 5 or all views are computed (``eval_views``).
        milliseconds: per image, where measured.
    """

    site: str
    shape: tuple[int, ...]
    gmacs: float
    ratio: float
    train_memory_mib: float
    inference_peak_mib: float
    parameters: int
    tail_share: float
    distinct: int
    gmacs_by_views: dict[int, float]
    milliseconds: float | None = None


def size_of(example: Example) -> tuple[int, ...]:
    """The image's (C, H, W)."""
    return next(spec.shape[1:] for spec in example.args if isinstance(spec, Spec))


class _Run(NamedTuple):
    """What was counted in one call."""

    macs: float
    front: float  # of them, before the split
    kept: int  # bytes
    peak: int  # bytes
    maps: list[tuple[int, ...]]  # the shapes of the maps that were split


class Meter:
    """Counts calls of a fake model, plain and split at any site."""

    def __init__(self, probe: Probe) -> None:
        self.probe, self.model, self.views = probe, probe.model, probe.views
        tensors = [*self.model.parameters(), *self.model.buffers()]
        self.fixed = {storage_key(tensor)[1] for tensor in tensors}
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.counted: dict[str, SiteCost] = {}
        plain = self._run([], 1)
        self.plain = plain
        #: Whether all work grows with the batch; a table of position biases, say, may be made once a call.
        self.linear = self._run([], 2).macs == 2 * plain.macs
        self.baseline = SiteCost(
            BASELINE, (), plain.macs / 1e9, 1.0, self._memory([]), plain.peak / MIB, self.parameters, 1.0, 1, {}
        )

    def cost(self, site: Site) -> SiteCost:
        """Of a split at a single site; counted once."""
        if site.name not in self.counted:
            self.counted[site.name] = self._cost(site)
        return self.counted[site.name]

    def _cost(self, site: Site) -> SiteCost:
        splits = [Split(site.name, self.views, site.layout)]
        run = self._run(splits, 1)
        total = len(self.views)
        one = run if total == 1 else self._run(splits, 1, indices=[0]) if not self.linear else None
        view = (run.macs - run.front) / total if one is None else (run.macs - one.macs) / max(total - 1, 1)
        fewer = {n: (run.macs - (total - n) * view) / 1e9 for n in (1, 2, 5, total) if n <= total}
        return self._row(site.name, splits, run, site.distinct, fewer)

    def cost_of(self, splits: list[Split]) -> SiteCost:
        """Of a plan over several sites; of fewer views are those meant that ``eval_views`` calls by name."""
        run = self._run(splits, 1)
        maps = zip(splits, run.maps, strict=True)
        distinct = math.prod(split.views.distinct(*sides(shape, split.layout)) for split, shape in maps)
        views = join_parts([split.views for split in splits])
        fewer = {len(views): run.macs / 1e9}
        for named in NAMED:
            with suppress(OptionError):
                indices = eval_indices(views, named)  # type: ignore[arg-type]  # one of its names
                fewer[len(indices)] = self._run(splits, 1, indices=indices).macs / 1e9
        return self._row(format_sites({split.name: split.views for split in splits}), splits, run, distinct, fewer)

    def _row(self, name: str, splits: list[Split], run: _Run, distinct: int, fewer: dict[int, float]) -> SiteCost:
        plain = self.plain.macs
        return SiteCost(
            name,
            self.probe.shape(splits[0].name),
            run.macs / 1e9,
            run.macs / plain if plain else float("nan"),
            self._memory(splits),
            run.peak / MIB,
            self.parameters,
            1 - run.front / plain if plain else float("nan"),
            distinct,
            dict(sorted(fewer.items())),
        )

    def _memory(self, splits: list[Split]) -> float:
        """MiB that autograd keeps for one image in training mode, as the slope between two batches."""
        training = self.model.training
        self.model.train()
        try:
            small, large = (self._run(splits, batch, grad=True).kept for batch in BATCHES)
        finally:
            self.model.train(training)
        return (large - small) / (BATCHES[1] - BATCHES[0]) / MIB

    def _run(self, splits: list[Split], batch: int, grad: bool = False, indices: Sequence[int] | None = None) -> _Run:
        """One call, split as the plan says, of whose views only those of ``indices`` are cut."""
        cuts = make_cuts(join_parts([split.views for split in splits]), indices) if splits else PLAIN
        maps: list[tuple[int, ...]] = []
        kept: dict[int, Any] = {}
        fixed = self.fixed

        def pack(tensor: Tensor) -> None:  # PyTorch keeps this hook alive forever, so it must not reference the model
            storage, key = storage_key(tensor)
            if key not in fixed:
                kept[key] = storage
            # and it returns nothing: a packed output would hold its own graph, unseen by the garbage collector

        front = 0

        def cut(place: int, x: Tensor) -> Tensor:
            nonlocal front
            front = counter.get_total_flops() if place == 0 else front
            maps.append(tuple(x.shape[1:]))
            return cut_views(cuts.at[place], x, splits[place].layout)

        def at(place: int) -> Any:
            return lambda module, base, *a, **k: cut(place, base.forward(module, *a, **k))

        modes = {module: module.training for module in self.model.modules()}
        graded = [p for p in self.model.parameters() if p.requires_grad and not grad]
        if not grad:
            self.model.eval()
        for parameter in graded:  # FlopCounterMode fails on modules that take one, where no graph is made
            parameter.requires_grad_(False)
        args, kwargs = self.probe.example[:2]
        args = tuple(_images(leaf, batch) for leaf in args)
        inside = {place: self.probe.holders[s.name] for place, s in enumerate(splits) if s.name != INPUT}
        live, counter = _Live(self.fixed, args), FlopCounterMode(display=False, custom_mapping=uncounted_attention())
        saving = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        meters = (saving,) if grad else (live, counter)  # FlopCounterMode would keep the graph of a call with gradients
        for place, holder in inside.items():
            swap_forward(holder, at(place))
        try:
            with torch.set_grad_enabled(grad), ExitStack() as stack:
                for meter in meters:
                    stack.enter_context(meter)
                if splits and 0 not in inside:
                    args, kwargs = map_first_tensor(lambda x: cut(0, x), args, kwargs)
                output = self.model(*args, **kwargs)
            del output
        finally:
            for holder in inside.values():
                restore_forward(holder)
            for parameter in graded:
                parameter.requires_grad_(True)
            for module, mode in modes.items():
                module.training = mode
        size = sum(storage.nbytes() for storage in kept.values())
        kept.clear()
        return _Run(counter.get_total_flops() / 2, front / 2, size, live.peak, maps)


def _images(leaf: Any, batch: int) -> Any:
    if not isinstance(leaf, Spec):
        return leaf
    return torch.zeros([batch if n == -1 else n for n in leaf.shape], dtype=leaf.dtype, device=leaf.device)


class _Live(TorchDispatchMode):
    """The largest sum of the storages alive at once that operations made, in bytes."""

    def __init__(self, fixed: set[int], inputs: tuple[Any, ...]) -> None:
        super().__init__()
        self.fixed, self.peak = fixed, 0
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._see(inputs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._see(out)
        return out

    def _see(self, tree: Any) -> None:
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        for tensor in tensors_in(tree):
            storage, key = storage_key(tensor)
            if key not in self.fixed:
                self.alive[key] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))


def measured(
    model: nn.Module,
    example: Example,
    views: Views,
    networks_at: list[tuple[After, Layout | None]],
    device: str | torch.device | None,
    batch: int,
    rounds: int,
) -> list[float]:
    """Milliseconds per image, plain and then of every split: the median of rounds in which the networks take turns."""
    for name, value in (("batch", batch), ("rounds", rounds)):
        if type(value) is not int or value < 1:
            raise OptionError(f"{name} must be a whole number above 0, got {value!r}.")
    twin = copy.deepcopy(model).eval()
    if device is not None:
        try:
            twin = twin.to(device)
        except (RuntimeError, AssertionError) as error:  # PyTorch's, where there is no such device
            raise OptionError(f"device={str(device)!r} cannot be used: {first_line(error)}") from error
    tensors = [*twin.parameters(), *twin.buffers()]
    where = tensors[0].device if tensors else torch.device(device or "cpu")
    if where.type == "meta":
        raise OptionError("a model on the meta device cannot be measured: it has no weights.")
    dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)
    images = torch.randn(batch, *size_of(example), generator=torch.Generator().manual_seed(0)).to(where, dtype)
    networks = [twin]
    for after, layout in networks_at:  # the same weights, in models of their own
        copied = copy.deepcopy(twin, {id(tensor): tensor for tensor in tensors})
        alone = views if isinstance(after, str) else None
        networks.append(inject_crop_vote(copied, after, views=alone, input_size=size_of(example), layout=layout))
    with torch.no_grad():
        for network in networks:
            network(images)
        taken = [[_seconds(network, images) for network in networks] for _ in range(rounds)]
    return [1e3 * statistics.median(times) / batch for times in zip(*taken, strict=True)]


def _seconds(network: nn.Module, images: Tensor) -> float:
    synchronise = getattr(getattr(torch, images.device.type, None), "synchronize", None)
    start = time.perf_counter()
    network(images)
    if synchronise is not None:
        synchronise()
    return time.perf_counter() - start
