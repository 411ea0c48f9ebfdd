"""Hazards of voting models at run time: compilers, copies, threads, modes, losses."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import guards
import networks
import oracle
from cropvote import CropVoteError, CropVoteLoss, hflip, inject_crop_vote, per_view, settings, swapping
from cropvote.errors import RowsError
from cropvote.surgery import injection
from hazards.table import IMAGES, hazard, right
from toolchain import table as tools


@hazard(
    "a split that checkpointing skips",
    "the Sequential's last child carries the split",
    guards.no_carrier,
    guards.no_rows,
)
def _() -> None:
    model = networks.timm_resnet()
    with torch.no_grad():
        wanted = oracle.vote(oracle.tail_rows(networks.timm_resnet(), "layer2", IMAGES), "soft")
    inject_crop_vote(model, after="layer2", input_size=48)
    for stage in (model.layer1, model.layer2):  # children one by one, as in timm's checkpoint_seq
        children = list(stage)
        stage.forward = lambda x, run=children: [x := checkpoint(child, x, use_reentrant=False) for child in run][-1]
    if swapping.own_forward(model.layer2):
        model.layer2.__class__ = nn.Sequential
    tools.agree(model(IMAGES), wanted)


@hazard(
    "a graph compiled before the injection",
    "classes, which the graph's guards see, instead of hooks",
    guards.by_hooks,
    guards.no_rows,
)
def _() -> None:
    model = networks.fer()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(IMAGES)
    inject_crop_vote(model, after="layer2", input_size=48)
    tools.agree(compiled(IMAGES), tools.expected(tools.ONE, 10))


@hazard("torch.fx, which records the plain forward", "a proxy is refused", guards.plain_wraps, guards.by_hooks)
def _() -> None:
    with pytest.raises(CropVoteError, match="CV506"):
        torch.fx.symbolic_trace(tools.voting())


@hazard("rows in another order than in the vote", "one order for split and vote", guards.views_outermost)
def _() -> None:
    right(networks.fer(), "layer2")


@hazard("a hook that drops the split, and as many images as views", "the rows", guards.no_rows)
def _() -> None:
    model = tools.voting()
    model.layer2.register_forward_hook(lambda module, args, output: output[::10])
    with pytest.raises(RowsError, match="CV302"):
        model(IMAGES)


@hazard("replicas of one model in threads", "a call keeps its own state", guards.rows_in_an_attribute)
def _() -> None:
    slow = threading.Barrier(2, timeout=20)

    class Meeting(networks.Net):
        meet = False

        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            if Meeting.meet:
                slow.wait()
            return x

    model = inject_crop_vote(Meeting().eval(), after="site", input_size=48)
    batches = [IMAGES[:2], IMAGES[:5]]
    wanted = [model(batch) for batch in batches]
    Meeting.meet, found = True, {}

    def wired() -> nn.Module:  # as torch.nn.parallel.replicate does it
        replica = model._replicate_for_data_parallel()
        for name, child in model.named_children():
            setattr(replica, name, child)
        return replica

    replicas = [wired(), wired()]
    threads = [threading.Thread(target=lambda i=i: found.update({i: guarded(replicas[i], batches[i])})) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in (0, 1):
        tools.agree(found[i], wanted[i])


def guarded(model: nn.Module, batch: Tensor) -> Tensor:
    try:
        return model(batch)
    except CropVoteError:
        return torch.zeros(0)


class Asking(networks.Net):
    """Calls itself for a vote during its own forward."""

    asked = False
    heard: list = []  # noqa: RUF012

    def forward(self, x: Tensor) -> Tensor:
        if not self.asked:
            self.asked = True
            vote = self(x[:2])
            self.heard.append(tuple(vote.shape))
            self.asked = False
        return super().forward(x)


@hazard("a vote in the middle of a training step", "a call keeps its own state", guards.rows_in_an_attribute)
def _() -> None:
    model = Asking().eval()
    inject_crop_vote(model, after="input", views=hflip())
    model._cropvote.checked = {(False, (("x", injection.TENSOR),)): None}
    model._cropvote.layouts = (("NCHW",),)
    found = guarded(model, IMAGES[:5])
    model.asked = True
    tools.agree(found, (networks.Net.forward(model, IMAGES[:5]) + networks.Net.forward(model, IMAGES[:5].flip(3))) / 2)


@hazard("a lost split that would not change the number of maps", "the splits that ran are counted", guards.no_watch)
def _() -> None:
    model = tools.voting(tools.TWO, eval_views="centre+mirror")
    model.layer2 = networks.fer().layer2
    with pytest.raises(CropVoteError, match="CV303"):
        model(IMAGES)


@hazard("settings shared by copies", "each copy has its own", guards.shared_settings)
def _() -> None:
    model = tools.voting()
    twin = copy.deepcopy(model)
    settings(twin).enabled = False
    tools.agree(model(IMAGES), tools.expected(tools.ONE, 10))


@hazard("a vote inside a call for all views", "calls are independent", guards.one_call_for_all, guards.no_rows)
def _() -> None:
    shapes: list[tuple[int, ...]] = []
    model = Asking().eval()
    inject_crop_vote(model, after="front")
    model.asked = True
    model(IMAGES)  # run the check, without an inner call
    model.asked, model.heard = False, shapes
    found = per_view(model, IMAGES)
    assert found.shape == (10, 10, 7)
    assert shapes == [(2, 7)], shapes


@hazard("a stage in another mode than its model", "the root's call decides", guards.own_modes)
def _() -> None:
    model = tools.voting(eval_views=[4, 9], train_views=2, eval_output="views")
    for module in (model.layer2, *model.layer2):
        module.training = True
    rows = oracle.tail_rows(networks.fer(), "layer2", IMAGES)[:, [4, 9]]
    tools.agree(model(IMAGES), oracle.sample_major(list(rows.unbind(1))))


@hazard("labels that do not match the rows", "the loss repeats them in the rows' order", lambda patch: patch.setattr(
    "cropvote.voting.repeat_targets", lambda targets, views: targets.repeat(views)))  # fmt: skip
def _() -> None:
    model = tools.still(tools.voting())
    loss = CropVoteLoss(nn.CrossEntropyLoss())(model(IMAGES[:4]), tools.TARGETS)
    rows = oracle.tail_rows(tools.still(networks.fer()), "layer2", IMAGES[:4])
    tools.agree(loss, oracle.loss_on_views(rows, tools.TARGETS))
