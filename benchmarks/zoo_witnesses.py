"""Two independent checks that share no code with the library: the tests' oracle (hooks and slices), and noise."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import oracle
from cropvote import CropVoteError, Tokens, five_crop, hflip, inject_crop_vote, remove_crop_vote
from cropvote.probe.verdicts import Site

ORACLE_SITES = 4
BUDGET = 10  # seconds per model for each of the two checks
ALIKE = 1e-6
PLANS = 12  # pairs of sites to try
PLAN = (oracle.flip_views, oracle.five_views)
LEFT = 1e-6  # tolerance, relative to the difference between two images' outputs


class Logits(nn.Module):
    """The model, returning only its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        output = self.model(x)
        return output if isinstance(output, Tensor) else output.logits


def cutter(layout: object, views: oracle.Cutter = oracle.ten_views) -> oracle.Cutter:
    """Return the oracle's views for a layout other than NCHW."""
    if layout == "NHWC":
        return lambda x: [view.permute(0, 2, 3, 1) for view in views(x.permute(0, 3, 1, 2))]
    if isinstance(layout, Tokens):
        height, width, prefix = layout

        def cut(x: Tensor) -> list[Tensor]:
            maps = x[:, prefix:].transpose(1, 2).reshape(len(x), -1, height, width)
            return [torch.cat([x[:, :prefix], v.flatten(2).transpose(1, 2)], 1) for v in views(maps)]

        return cut
    return views


def last_of(model: nn.Module, site: str) -> str:
    """Return the Sequential's last child instead, because some models run the children one by one."""
    while (
        isinstance(module := model.get_submodule(site), nn.Sequential) and type(module).forward is nn.Sequential.forward
    ):
        site += f".{list(dict(module.named_children()))[-1]}"
    return site


def against_oracle(
    model: nn.Module,
    size: tuple[int, ...],
    rows: dict[str, Site],
    listed: list[str],
    first: list[str],
    most: int = ORACLE_SITES,
) -> tuple[dict[str, float], list[str]]:
    """Return the vote's largest error per site, relative to the largest output, and the sites whose views all agree."""
    valid = [site for site in listed if site != "input"]
    some = valid[:: max(1, len(valid) // most)]
    images = torch.randn(2, *size, dtype=next(model.parameters()).dtype)
    found: dict[str, float] = {}
    alike, start = [], time.time()
    for site in dict.fromkeys([site for site in first if site in rows and not rows[site].reason] + some):
        if time.time() - start > BUDGET and found:
            break
        by_view = oracle.tail_rows(Logits(model), f"model.{last_of(model, site)}", images, cutter(rows[site].layout))
        wanted = oracle.vote(by_view, "soft")
        inject_crop_vote(model, after=site, input_size=size)
        vote = Logits(model)(images)
        remove_crop_vote(model)
        found[site] = float((vote - wanted).abs().max() / wanted.abs().max())
        if by_view.std(1).max() < ALIKE * wanted.abs().max():
            alike.append(site)
    return found, alike


def against_plan(model: nn.Module, size: tuple[int, ...], works: list[str]) -> dict[str, Any]:
    """Compare the first accepted plan that mirrors at one site and crops at a later one with the oracle."""
    reason = "fewer than two sites work"
    pairs = sorted(itertools.combinations(enumerate(works), 2), key=lambda p: abs(p[1][0] - p[0][0] - len(works) / 2))
    for (_, early), (_, late) in pairs[:PLANS]:  # first the pairs half a network apart
        try:
            inject_crop_vote(model, after={early: hflip(), late: five_crop()}, input_size=size)
        except CropVoteError as error:
            reason = str(error)
            continue
        injection = model._cropvote
        cutters = [cutter(layout, v) for layout, v in zip(injection.layouts, PLAN, strict=True)]
        images = torch.randn(2, *size, dtype=next(model.parameters()).dtype)
        vote, order = Logits(model)(images), injection.sites
        remove_crop_vote(model)
        names = [f"model.{last_of(model, site)}" for site in order]
        by_view = oracle.nested_rows(Logits(model), list(zip(names, cutters, strict=True)), images)
        wanted = oracle.vote(by_view, "soft")
        return {"sites": list(order), "error": float((vote - wanted).abs().max() / wanted.abs().max())}
    return {"refused": reason}


def against_noise(
    model: nn.Module, size: tuple[int, ...], rows: dict[str, Site], budget: float = BUDGET
) -> dict[str, Any]:
    """Compare the library's verdict with noise, for every module called once that returns a feature map or tokens."""
    network = Logits(model.double())  # float64, to detect even a tiny dependence
    images, start = torch.randn(2, *size, dtype=torch.float64), time.time()
    outputs: dict[str, list[Any]] = {}
    modules = [(name, module) for name, module in model.named_modules() if name]
    hooks = [m.register_forward_hook(lambda m, a, out, n=n: outputs.setdefault(n, []).append(out)) for n, m in modules]
    plain = network(images)
    difference = (plain[0] - plain[1]).abs().max()
    if difference < 1e-7 * plain.abs().max():
        raise RuntimeError("the output hardly depends on the images, so noise would prove nothing")
    for hook in hooks:
        hook.remove()
    counts: Counter[str] = Counter()
    missed, invented = [], []
    random.Random(0).shuffle(modules)  # noqa: S311  # the modules checked in time are a fair sample
    for name, module in modules:
        called = outputs.get(name, [])
        if name not in rows or len(called) != 1 or not isinstance(called[0], Tensor) or called[0].dim() not in (3, 4):
            continue
        x = called[0]
        if x.shape[0] != 2:
            continue
        if time.time() - start > budget:
            break
        y = replaced(network, module, torch.randn_like(x[:1]).expand_as(x), images)
        is_cut = bool((y[0] - y[1]).abs().max() <= LEFT * difference)
        takes = is_cut and any(takes_smaller(network, module, views, images) for views in smaller(model, x))
        counts["modules"] += 1
        counts["cut points"] += is_cut
        counts["true sites"] += takes
        valid = not rows[name].reason
        counts["valid"] += valid
        if valid and not takes:
            invented.append(name)
        if takes and not valid:
            missed.append(f"{name}: {rows[name].reason[:160]}")
    return {**counts, "missed": missed, "invented": invented}


def replaced(network: nn.Module, module: nn.Module, output: Tensor, images: Tensor) -> Tensor:
    hook = module.register_forward_hook(lambda m, args, out: output.clone())
    try:
        return network(images)
    finally:
        hook.remove()


def smaller(model: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Yield ten views of noise per image, in the size of a view, for each layout the feature map may have."""

    def side(n: int) -> int:
        return (5 * n + 3) // 6

    if x.dim() == 3:
        grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
        most = getattr(model, "num_prefix_tokens", 0)
        if hasattr(getattr(model, "config", None), "patch_size"):  # transformers
            grid, most = [model.config.image_size // model.config.patch_size] * 2, 2
        if hasattr(model, "conv_proj"):  # torchvision
            grid, most = [model.image_size // model.patch_size] * 2, 1
        if grid and 0 <= x.shape[1] - grid[0] * grid[1] <= most:
            length = x.shape[1] - grid[0] * grid[1] + side(grid[0]) * side(grid[1])
            yield x.new_empty(20, length, x.shape[2]).normal_()
        return
    for first in (2, 1):
        shape = list(x.shape)
        shape[first], shape[first + 1] = side(shape[first]), side(shape[first + 1])
        if shape[first] < x.shape[first] and shape[first + 1] < x.shape[first + 1]:
            yield x.new_empty(20, *shape[1:]).normal_()


def takes_smaller(network: nn.Module, module: nn.Module, views: Tensor, images: Tensor) -> bool:
    try:
        return replaced(network, module, views, images).shape == (20, 7)
    except Exception:
        return False
