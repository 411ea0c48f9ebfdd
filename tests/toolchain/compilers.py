"""Compilers and tracers."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import torch
from torch import nn

import networks
from cropvote import CropVoteLoss, inject_crop_vote, remove_crop_vote, settings
from toolchain.table import SIDE, TARGETS, Split, agree, expected, images, tool, voting


@tool("torch.compile", "`fullgraph=True, dynamic=True`, compiled after the injection; later changes of settings work")
def _(_path: Path, split: Split) -> None:
    model = voting(split)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (2, 3, 7):
        agree(compiled(images(count)), expected(split, count))
    settings(model).eval_output = "views"
    assert compiled(images()).shape == (30, 7)
    settings(model).enabled = False
    agree(compiled(images()), networks.fer()(images()))


@tool(
    "torch.compile before the injection",
    "the compiled model follows injection into and removal from the model inside; injecting into the wrapper raises",
    slow=True,
)
def _(_path: Path, split: Split) -> None:
    model = networks.fer()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    agree(compiled(images()), model(images()))
    inject_crop_vote(model, after=split.after, input_size=SIDE)
    for count in (2, 3):
        agree(compiled(images(count)), expected(split, count))
    remove_crop_vote(model)
    agree(compiled(images()), networks.fer()(images()))


@tool("torch.compile with Inductor", "training step and vote, dynamic batch", slow=True)
def _(_path: Path, split: Split) -> None:
    # Width 16: PyTorch 2.14 crashes in the backward pass of a strided 1 x 1 convolution of 8 channels_last channels.
    make = functools.partial(networks.fer, 16)
    model, plain = voting(split, make=make), voting(split, make=make)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for count in (2, 7):
        with torch.no_grad():
            agree(compiled(images(count)), expected(split, count, make), 1e-4)
    batch = images(4)
    torch._dynamo.mark_dynamic(batch, 0)  # PyTorch 2.14 cannot train through views of dynamic size; 2.15 can
    loss = CropVoteLoss(nn.CrossEntropyLoss())
    for step in (torch.compile(model, fullgraph=True), plain):
        loss(step.train()(batch), TARGETS).backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        agree(one.grad, other.grad, 1e-3)


@tool(
    "torch.export",
    "strict and non-strict, dynamic batch; later changes of settings have no effect on the exported program",
)
def _(_path: Path, split: Split) -> None:
    for strict in (True, False):
        model = voting(split)
        batch = {0: torch.export.Dim("batch", min=2, max=64)}
        program = torch.export.export(model, (images(4),), dynamic_shapes=(batch,), strict=strict).module()
        settings(model).vote = "hard"  # too late
        for count in (2, 3, 7):
            agree(program(images(count)), expected(split, count))


@tool("torch.export, AOTInductor", "compiled package, dynamic batch", slow=True)
def _(path: Path, split: Split) -> None:
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    with torch.no_grad():
        program = torch.export.export(voting(split), (images(4),), dynamic_shapes=(batch,))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(path / "model.pt2"))
    model = torch._inductor.aoti_load_package(package)
    for count in (2, 7):
        agree(model(images(count)), expected(split, count), 1e-4)


@tool("torch.jit.trace", "any batch size; later changes of settings have no effect on the traced model")
def _(_path: Path, split: Split) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        traced = torch.jit.trace(voting(split), images(2))
    for count in (1, 2, 7):
        agree(traced(images(count)), expected(split, count))


@tool("torch.jit.script", "use `torch.export`", raises="CV507")
def _(_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(voting())


@tool("torch.fx.symbolic_trace", "trace before the injection, or use `torch.export`", raises="CV506")
def _(_path: Path) -> None:
    torch.fx.symbolic_trace(voting())


@tool("torchvision's create_feature_extractor", "extract from the model before the injection", raises="CV506")
def _(_path: Path) -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    create_feature_extractor(voting(), ["layer2"])
