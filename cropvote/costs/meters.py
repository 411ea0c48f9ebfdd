"""Meters: the work and the memory of a fake model's call, plain or split."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._torch import FlopCounterMode, StorageWeakRef, TorchDispatchMode, storage_key, uncounted_attention
from ..call import PLAIN, cut_views
from ..cuts import format_sites, join_parts, make_cuts
from ..errors import OptionError
from ..images import Example, Spec
from ..layouts import sides
from ..options import NAMED, eval_indices
from ..probe.mode import tensors_in
from ..probe.strides import tail_stride
from ..probe.trace import Trace
from ..probe.trial import Split, run_split
from ..probe.verdicts import Site
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


def image_size(example: Example) -> tuple[int, ...]:
    """Return the image's (C, H, W)."""
    return next(spec.shape[1:] for spec in example.args if isinstance(spec, Spec))


class _Run(NamedTuple):
    """What was counted in one call."""

    macs: float
    front: float  # of them, before the split
    kept: int  # bytes
    peak: int  # bytes
    maps: list[tuple[int, ...]]  # the shapes of the maps that were split


class Meter:
    """Counts calls of a fake model, plain and split at any site, with ``align`` into views on the strides behind it."""

    def __init__(self, trace: Trace, views: Views, align: bool = False) -> None:
        self.trace, self.model, self.views, self.align = trace, trace.model, views, align
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

    def views_at(self, site: str) -> Views:
        """Return the views that a split at the site cuts."""
        return self.views.aligned(tail_stride(self.trace, site)) if self.align else self.views

    def cost(self, site: Site) -> SiteCost:
        """Return the cost of a split at a single site, which is counted once."""
        if site.name not in self.counted:
            self.counted[site.name] = self._cost(site)
        return self.counted[site.name]

    def _cost(self, site: Site) -> SiteCost:
        splits = [Split(site.name, self.views_at(site.name), site.layout)]
        run = self._run(splits, 1)
        total = len(self.views)
        one = run if total == 1 else self._run(splits, 1, indices=[0]) if not self.linear else None
        view = (run.macs - run.front) / total if one is None else (run.macs - one.macs) / max(total - 1, 1)
        fewer = {n: (run.macs - (total - n) * view) / 1e9 for n in (1, 2, 5, total) if n <= total}
        return self._row(site.name, splits, run, site.distinct, fewer)

    def cost_of(self, splits: list[Split]) -> SiteCost:
        """Return the cost of splits at several sites; fewer views are those that ``eval_views`` has a name for."""
        run = self._run(splits, 1)
        maps = zip(splits, run.maps, strict=True)
        distinct = math.prod(split.views.distinct(*sides(shape, split.layout)) for split, shape in maps)
        views = join_parts([split.views for split in splits])
        fewer = {len(views): run.macs / 1e9}
        for named in NAMED:
            with suppress(OptionError):
                indices = eval_indices(views, named)  # type: ignore[arg-type]  # one of its names
                fewer[len(indices)] = self._run(splits, 1, indices=indices).macs / 1e9
        return self._row(format_sites({split.site: split.views for split in splits}), splits, run, distinct, fewer)

    def _row(self, name: str, splits: list[Split], run: _Run, distinct: int, fewer: dict[int, float]) -> SiteCost:
        plain = self.plain.macs
        return SiteCost(
            name,
            self.trace.shape(splits[0].site),
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
        """Return the MiB that autograd keeps for one image in training mode, as the slope between two batches."""
        training = self.model.training
        self.model.train()
        try:
            small, large = (self._run(splits, batch, grad=True).kept for batch in BATCHES)
        finally:
            self.model.train(training)
        return (large - small) / (BATCHES[1] - BATCHES[0]) / MIB

    def _run(self, splits: list[Split], batch: int, grad: bool = False, indices: Sequence[int] | None = None) -> _Run:
        """Count one call, split at these sites; only the views in ``indices`` are cut."""
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

        def cut(i: int, x: Tensor) -> Tensor:
            nonlocal front
            front = counter.get_total_flops() if i == 0 else front
            maps.append(tuple(x.shape[1:]))
            return cut_views(cuts.at[i], x, splits[i].layout)

        args = tuple(_images(leaf, batch) for leaf in self.trace.example.args)
        live, counter = _Live(self.fixed, args), FlopCounterMode(display=False, custom_mapping=uncounted_attention())
        saving = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        meters = (saving,) if grad else (live, counter)  # FlopCounterMode would keep the graph of a call with gradients
        with torch.set_grad_enabled(grad), ExitStack() as stack:
            if not grad:
                stack.enter_context(_without_gradients(self.model))
            for meter in meters:
                stack.enter_context(meter)
            run_split(self.trace, [split.site for split in splits], cut, args, self.trace.example.kwargs)
        size = sum(storage.nbytes() for storage in kept.values())
        kept.clear()
        return _Run(counter.get_total_flops() / 2, front / 2, size, live.peak, maps)


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, its parameters without gradients, which FlopCounterMode does not take."""
    modes = {module: module.training for module in model.modules()}
    graded = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in graded:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in graded:
            parameter.requires_grad_(True)
        for module, mode in modes.items():
            module.training = mode


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
