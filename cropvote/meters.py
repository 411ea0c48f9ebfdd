"""Meters: the work and the memory of a fake model's call, plain or split at a site; and the time of real ones."""

from __future__ import annotations

import copy
import statistics
import time
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

from .errors import OptionError
from .fakes import Example, Spec, map_first_tensor, tensors_in
from .layouts import Layout
from .splitting import split_views
from .surgery import inject_crop_vote
from .swapping import restore_forward, swap_forward
from .trials import Probe, Site
from .views import Views
from .walk import INPUT

__all__ = ["SiteCost"]

BASELINE = "baseline"
MIB = 2**20
#: The batches whose difference gives the memory of an image; what does not grow with the batch drops out.
BATCHES = (4, 8)


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


#: What PyTorch before 2.15 does not count by itself: attention on a CPU.
UNCOUNTED = {
    operation: _attention
    for operation in (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,)
    if operation not in flop_registry
}


class SiteCost(NamedTuple):
    """What one network costs per image: the plain one (``baseline``), or one that votes.

    Fields:
        site: the split's site, or "baseline".
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


class Meter:
    """Counts calls of a fake model, plain and split at any site."""

    def __init__(self, probe: Probe) -> None:
        self.probe, self.model, self.views = probe, probe.model, probe.views
        tensors = [*self.model.parameters(), *self.model.buffers()]
        self.fixed = {tensor.untyped_storage()._cdata for tensor in tensors}
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        plain = self._run(None, self.views, 1)
        self.plain = plain
        #: Whether all work grows with the batch; a table of position biases, say, may be made once a call.
        self.linear = self._run(None, self.views, 2).macs == 2 * plain.macs
        self.baseline = SiteCost(
            BASELINE, (), plain.macs / 1e9, 1.0, self._memory(None), plain.peak / MIB, self.parameters, 1.0, 1, {}
        )

    def cost(self, site: Site) -> SiteCost:
        run = self._run(site, self.views, 1)
        total = len(self.views)
        one = run if total == 1 else self._run(site, self.views.take([0]), 1) if not self.linear else None
        view = (run.macs - run.front) / total if one is None else (run.macs - one.macs) / max(total - 1, 1)
        fewer = {n: (run.macs - (total - n) * view) / 1e9 for n in (1, 2, 5, total) if n <= total}
        plain = self.plain.macs
        return SiteCost(
            site.name,
            site.shape,
            run.macs / 1e9,
            run.macs / plain if plain else float("nan"),
            self._memory(site),
            run.peak / MIB,
            self.parameters,
            1 - run.front / plain if plain else float("nan"),
            site.distinct,
            fewer,
        )

    def _memory(self, site: Site | None) -> float:
        """MiB that autograd keeps for one image in training mode, as the slope between two batches."""
        training = self.model.training
        self.model.train()
        try:
            small, large = (self._run(site, self.views, batch, grad=True).kept for batch in BATCHES)
        finally:
            self.model.train(training)
        return (large - small) / (BATCHES[1] - BATCHES[0]) / MIB

    def _run(self, site: Site | None, views: Views, batch: int, grad: bool = False) -> _Run:
        kept: dict[int, int] = {}
        fixed = self.fixed

        def pack(tensor: Tensor) -> Tensor:  # which PyTorch never lets go: it must not hold the model
            storage = tensor.untyped_storage()
            if storage._cdata not in fixed:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        front = 0

        def split(x: Tensor) -> Tensor:
            nonlocal front
            front = counter.get_total_flops()
            return split_views(x, views, layout=site.layout) if site else x

        modes = {module: module.training for module in self.model.modules()}
        if not grad:
            self.model.eval()
        args, kwargs = self.probe.example[:2]
        args = tuple(_images(leaf, batch) for leaf in args)
        holder = None if site is None or site.name == INPUT else self.probe.holders[site.name]
        live, counter = _Live(self.fixed, args), FlopCounterMode(display=False, custom_mapping=UNCOUNTED)
        saving = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        meters = (saving,) if grad else (live, counter)  # FlopCounterMode would keep the graph of a call with gradients
        if holder is not None:
            swap_forward(holder, lambda module, base, *a, **k: split(base.forward(module, *a, **k)))
        try:
            with torch.set_grad_enabled(grad), ExitStack() as stack:
                for meter in meters:
                    stack.enter_context(meter)
                if site is not None and site.name == INPUT:
                    args, kwargs = map_first_tensor(split, args, kwargs)
                output = self.model(*args, **kwargs)
            del output
        finally:
            if holder is not None:
                restore_forward(holder)
            for module, mode in modes.items():
                module.training = mode
        return _Run(counter.get_total_flops() / 2, front / 2, sum(kept.values()), live.peak)


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
            storage = tensor.untyped_storage()
            if storage._cdata not in self.fixed:
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))


def measured(
    model: nn.Module,
    example: Example,
    views: Views,
    layouts: dict[str, Layout],
    device: str | torch.device | None,
    batch: int,
    rounds: int,
) -> dict[str, float]:
    """Milliseconds per image, by site: the median of rounds in which the networks take turns."""
    for name, value in (("batch", batch), ("rounds", rounds)):
        if type(value) is not int or value < 1:
            raise OptionError(f"{name} must be a whole number above 0, got {value!r}.")
    twin = copy.deepcopy(model).eval()
    if device is not None:
        twin = twin.to(device)
    tensors = [*twin.parameters(), *twin.buffers()]
    where = tensors[0].device if tensors else torch.device(device or "cpu")
    if where.type == "meta":
        raise OptionError("a model on the meta device cannot be measured: it has no weights.")
    dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)
    images = torch.randn(batch, *size_of(example), generator=torch.Generator().manual_seed(0)).to(where, dtype)
    networks = {BASELINE: twin}
    for site, layout in layouts.items():
        if site != BASELINE:  # the same weights, in a model of its own
            copied = copy.deepcopy(twin, {id(tensor): tensor for tensor in tensors})
            networks[site] = inject_crop_vote(copied, site, views=views, input_size=size_of(example), layout=layout)
    with torch.no_grad():
        for network in networks.values():
            network(images)
        taken = [{site: _seconds(network, images) for site, network in networks.items()} for _ in range(rounds)]
    return {site: 1e3 * statistics.median(times[site] for times in taken) / batch for site in networks}


def _seconds(network: nn.Module, images: Tensor) -> float:
    synchronise = getattr(getattr(torch, images.device.type, None), "synchronize", None)
    start = time.perf_counter()
    network(images)
    if synchronise is not None:
        synchronise()
    return time.perf_counter() - start
