"""Train a network (optimizer, learning rate, averaged weights, state), and read its outputs for faces."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ExponentialLR, LRScheduler, OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms.v2 import CutMix, MixUp, RandomChoice

from batches import to_input
from config import VALENCE_AROUSAL, Config
from cropvote import CropVoteLoss, per_view
from keeping import build, start_from
from machines import Machine


class Learner:
    """Everything that changes during training.

    ``model`` is the network itself; ``network`` wraps it for running, distributed or compiled.
    """

    def __init__(self, config: Config, outputs: tuple[str, ...], steps: int, here: Machine) -> None:
        mood = config.target == VALENCE_AROUSAL
        self.config, self.here = config, here
        rule = "mean" if mood else config.vote
        model = build(len(outputs), config.width, config.after, rule, config.train_views)
        if config.init:
            start_from(model, config.init, outputs)
        self.model = model.to(here.device).to(memory_format=self._layout())
        self.mix = _mixing(config, len(outputs))
        self.loss = CropVoteLoss(nn.MSELoss() if mood else nn.CrossEntropyLoss(label_smoothing=config.label_smoothing))
        self.optimizer = _optimizer(self.model, config, here)
        self.schedule = _schedule(self.optimizer, config, steps)
        self.scaler = torch.amp.GradScaler(here.device.type, enabled=here.precision == torch.float16)
        self.averaged: AveragedModel | None = None
        if config.ema:
            self.averaged = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
        self.network: nn.Module = self.model
        if here.size > 1:
            ids = [here.device.index] if here.device.type == "cuda" else None
            self.network = DistributedDataParallel(self.model, device_ids=ids)
        if config.fast:
            torch.compiler.reset()  # it keeps at most eight versions of a forward, and each run adds one
            self.network = torch.compile(self.network)  # type: ignore[assignment]

    @property
    def kept(self) -> nn.Module:
        """Return the network to score and keep: the averaged one, if there is one."""
        return self.model if self.averaged is None else self.averaged.module

    @property
    def rate(self) -> float:
        return float(self.schedule.get_last_lr()[0])

    def learn(self, x: Tensor, targets: Tensor) -> Tensor:
        """Train one step on a batch, (n, 3, H, W), and return its loss, on the device."""
        if self.mix is not None:
            x, targets = self.mix(x, targets)
        with self.here.autocast():
            loss: Tensor = self.loss(self.network(x.contiguous(memory_format=self._layout())), targets)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.config.schedule == "onecycle":
            self.schedule.step()
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)
        return loss.detach()

    def end_epoch(self) -> None:
        """Lower the exponential schedule's rate, as in the paper."""
        if self.config.schedule == "exponential":
            self.schedule.step()

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule, "scaler": self.scaler}
        return parts if self.averaged is None else {**parts, "averaged": self.averaged}

    def _layout(self) -> torch.memory_format:
        return torch.channels_last if self.config.fast else torch.contiguous_format


def _optimizer(model: nn.Module, config: Config, here: Machine) -> torch.optim.Optimizer:
    """Build the optimizer, without weight decay on norms and biases."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    fused = config.fast and here.device.type == "cuda"
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, config.rate, momentum=0.9, nesterov=True, fused=fused)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, config.rate, fused=fused)


def _mixing(config: Config, classes: int) -> nn.Module | None:
    """Return a module: faces (n, 3, H, W) and labels (n,) -> mixed faces and class probabilities (n, classes)."""
    kinds = {MixUp: config.mixup, CutMix: config.cutmix}
    mixes = [kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds.items() if alpha]
    return RandomChoice(mixes) if mixes else None


def _schedule(optimizer: torch.optim.Optimizer, config: Config, steps: int) -> LRScheduler:
    if config.schedule == "exponential":
        return ExponentialLR(optimizer, config.decay)
    return OneCycleLR(optimizer, config.rate, total_steps=config.epochs * steps, pct_start=config.warmup)


@torch.no_grad()
def read(model: nn.Module, images: Tensor, here: Machine, voting: bool, batch: int = 256) -> Tensor:
    """Return every view's outputs for every face, (n, v, k) in float32 on the CPU; processes share the work.

    ``images`` are uint8 (n, c, 48, 48). A plain network has one view.
    """
    here.share_buffers(model)
    model.eval()
    batches = here.mine(torch.arange(len(images))).split(batch)  # at least one in every process, even if it is empty
    rows = torch.cat([look(model, to_input(images[some].to(here.device)), here, voting).cpu() for some in batches])
    whole = torch.empty(len(images), *rows.shape[1:])
    for rank, theirs in enumerate(here.gather(rows)):
        whole[rank :: here.size] = theirs
    return whole


@torch.no_grad()
def look(model: nn.Module, x: Tensor, here: Machine, voting: bool) -> Tensor:
    """Return every view's outputs for one batch on the device, (n, 3, H, W) -> (n, v, k) in float32."""
    with here.autocast():
        found = per_view(model, x) if voting else model(x).unsqueeze(1)
    return found.float()
