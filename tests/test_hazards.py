"""The ways to get a wrong number without an error, each with its guard, and the proof that the guard is what helps.

Every hazard is a check that passes on the library as it is. ``without`` takes the guard out: the check must then fail.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cropvote import (
    CropVoteError,
    CropVoteLoss,
    Views,
    calls,
    checks,
    hflip,
    inject_crop_vote,
    layouts,
    outputs,
    per_view,
    settings,
    swapping,
    trials,
    walk,
)

import guards
import networks
import oracle
from toolchain import table

IMAGES = table.images(10)  # ten images and ten views: the worst numbers for a check of divisibility


class Hazard(NamedTuple):
    name: str
    guard: str
    check: Callable[[], None]
    without: Callable[[pytest.MonkeyPatch], None]


HAZARDS: list[Hazard] = []


def hazard(name: str, guard: str, *without: Callable[[pytest.MonkeyPatch], None]) -> Callable:
    def enter(check: Callable[[], None]) -> Callable[[], None]:
        HAZARDS.append(Hazard(name, guard, check, lambda patch: [take(patch) for take in without]))
        return check

    return enter


def refused(model: nn.Module, site: str, images: Tensor = IMAGES, **options: object) -> None:
    """Refused with a size, and at the first call."""
    with pytest.raises(CropVoteError):
        inject_crop_vote(model, after=site, input_size=tuple(images.shape[1:]), **options)
    inject_crop_vote(model, after=site, **options)
    with pytest.raises(CropVoteError):
        model(images)


def right(
    model: nn.Module, site: str, images: Tensor = IMAGES, cut: oracle.Cutter = oracle.ten_views, **options
) -> None:
    """The oracle's vote."""
    with torch.no_grad():
        wanted = oracle.vote(oracle.tail_rows(copy.deepcopy(model), site, images, cut), "soft")
    inject_crop_vote(model, after=site, input_size=tuple(images.shape[1:]), **options)
    table.agree(model(images), wanted)


# ---- the hazards -----------------------------------------------------------------------------------------------------


@hazard(
    "one image, whose gate broadcasts over the views",
    "paths of data; fake batch above 1",
    guards.no_paths,
    guards.batch_of_one,
)
def _() -> None:
    refused(networks.Gate().eval(), "site", IMAGES[:1])


@hazard("a path around the site that joins at the logits", "paths of data", guards.no_paths)
def _() -> None:
    refused(networks.LogitSkip().eval(), "site")


@hazard("a module that is called twice splits twice", "the walk's count; the rows", guards.no_probe, guards.no_rows)
def _() -> None:
    refused(networks.Twice().eval(), "site")


@hazard(
    "a site that is never called, and as many images as views", "the walk; the rows", guards.no_probe, guards.no_rows
)
def _() -> None:
    refused(networks.Unused().eval(), "site")


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
    for stage in (model.layer1, model.layer2):  # children one by one, the way timm's checkpoint_seq runs them
        children = list(stage)
        stage.forward = lambda x, run=children: [x := checkpoint(child, x, use_reentrant=False) for child in run][-1]
    if swapping.own_forward(model.layer2):
        model.layer2.__class__ = nn.Sequential
    table.agree(model(IMAGES), wanted)


@hazard(
    "a graph compiled before the injection",
    "classes, which guards of the graph see, not hooks",
    guards.by_hooks,
    guards.no_rows,
)
def _() -> None:
    model = networks.fer()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(IMAGES)
    inject_crop_vote(model, after="layer2", input_size=48)
    table.agree(compiled(IMAGES), table.expected(10))


@hazard("torch.fx, which records the plain forward", "a proxy is refused", guards.plain_wraps, guards.by_hooks)
def _() -> None:
    with pytest.raises(CropVoteError, match=r"torch\.fx cannot trace"):
        torch.fx.symbolic_trace(table.voting())


@hazard("rows in another order than the vote's", "one order for split and vote", guards.views_outermost)
def _() -> None:
    right(networks.fer(), "layer2")


@hazard("a hook that drops the split, and as many images as views", "the rows", guards.no_rows)
def _() -> None:
    model = table.voting()
    model.layer2.register_forward_hook(lambda module, args, output: output[::10])
    with pytest.raises(CropVoteError, match="rows"):
        model(IMAGES)


class StoredMask(networks.Net):
    """Windows of 5 x 5 pixels and a mask for each that was stored for a whole map of 10 x 25: two rows of five."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.randn(10, 1, 5, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.site(self.front(x))
        n, c, h, w = x.shape
        x = x.reshape(n, c, h // 5, 5, w // 5, 5).permute(0, 2, 4, 1, 3, 5).reshape(-1, 10, c, 5, 5) + self.mask
        return self.fc(self.act(x).reshape(n, -1, c, 5, 5).mean((1, 3, 4)))


@hazard(
    "masks stored for the whole map's windows",
    "a trial with a prime batch and a prime number of views",
    guards.all_views_at_once,
)
def _() -> None:
    """Three windows per view are thirty per image, which ten masks divide."""
    views = Views([(0, Fraction(i, 9)) for i in range(10)], scale=(Fraction(1, 2), Fraction(3, 5)))
    refused(StoredMask().eval(), "site", torch.randn(4, 3, 10, 25), views=views)


class Cached(networks.Net):
    """A table of positions that is made once, for the first map."""

    table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.site(self.front(x))
        if self.table is None:
            self.table = torch.linspace(0, 1, x.shape[3])
        return self.head(self.act(x + self.table))


@hazard("a table of positions cached for the whole map", "the trial comes after a plain call", guards.no_probe)
def _() -> None:
    for called_before in (False, True):
        model = Cached().eval()
        if called_before:
            model(IMAGES)
        with pytest.raises(CropVoteError):
            inject_crop_vote(model, after="site", input_size=48)


def wide_views(x: Tensor) -> list[Tensor]:
    maps = x.transpose(1, 2).reshape(len(x), 24, 4, 16)
    return [view.flatten(2).transpose(1, 2) for view in oracle.ten_views(maps)]


@hazard("tokens cut from the wrong grid", "the grid of patches is seen, not guessed", guards.guessed_grid)
def _() -> None:
    """4 x 16 patches and no prefix, as many as 8 x 8."""
    model = networks.tokens(img_size=(16, 64), patch_size=4, reg_tokens=0, class_token=False, global_pool="avg")
    right(model, "blocks.0", torch.randn(3, 3, 16, 64), cut=wide_views)


class Resizing(nn.Module):
    """Sees every image as a square."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = networks.tokens()

    def forward(self, x: Tensor) -> Tensor:
        return self.vit(nn.functional.interpolate(x, (48, 48)))


def grid_of_the_images(patch: pytest.MonkeyPatch) -> None:
    def guess(probe: trials.Probe, name: str, length: int) -> layouts.Tokens:
        height, width = (side // 8 for side in probe.shape("input")[1:])
        return layouts.Tokens(height, width, length - height * width)

    patch.setattr(trials.Probe, "_stated_tokens", guess)


@hazard("a grid of tokens that is not that of the images", "the grid of patches is seen", grid_of_the_images)
def _() -> None:
    def cut(x: Tensor) -> list[Tensor]:
        maps = x[:, 3:].transpose(1, 2).reshape(len(x), 24, 6, 6)
        return [torch.cat([x[:, :3], v.flatten(2).transpose(1, 2)], 1) for v in oracle.ten_views(maps)]

    right(Resizing().eval(), "vit.blocks.0", torch.randn(3, 3, 32, 72), cut=cut)


class ClassTokenLast(nn.Module):
    """Another library's transformer, with the names of a known one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch_size, self.image_size = 8, 48
        self.conv_proj = nn.Conv2d(3, 8, 8, 8)
        self.class_token = nn.Parameter(torch.randn(1, 1, 8))
        self.site, self.mix = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_proj(x).flatten(2).transpose(1, 2)
        x = self.site(torch.cat([x, self.class_token.expand(len(x), -1, -1)], 1))
        return self.fc(self.mix(x, x, x)[0][:, -1])


def any_library(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(trials, "stated_tokens", lambda part: (1, "conv_proj"))


@hazard("a class token taken for the first of the grid", "only known libraries are believed", any_library)
def _() -> None:
    refused(ClassTokenLast().eval(), "site", torch.randn(3, 3, 48, 48))


@hazard(
    "a stated grid kept for images of another shape",
    "one shape of image where the user states tokens",
    guards.by_length,
)
def _() -> None:
    model = networks.tokens(dynamic_img_size=True)
    inject_crop_vote(model, after="blocks.0", layout=layouts.Tokens(6, 6, 3), input_size=48)
    with pytest.raises(CropVoteError, match="was stated for images of another shape"):
        model(torch.randn(2, 3, 24, 96))


class Flagged(networks.Net):
    """A flag opens a gate, which broadcasts over the views of one image."""

    def forward(self, x: Tensor, gate: bool = False) -> Tensor:
        x = self.front(x)
        return self.head(self.site(x) * x.mean((2, 3), keepdim=True)) if gate else self.head(self.site(x))


@hazard("a flag that opens a path, with one image", "flags are part of what was checked", guards.by_length)
def _() -> None:
    model = inject_crop_vote(Flagged().eval(), after="site", input_size=48)
    assert model(IMAGES[:1], gate=False).shape == (1, 7)
    for arguments in ({"args": (True,)}, {"kwargs": {"gate": True}}):
        with pytest.raises(CropVoteError, match="a path around it"):
            model(IMAGES[:1], *arguments.get("args", ()), **arguments.get("kwargs", {}))


class SqueezedLogits(networks.Net):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.site(self.front(x)).mean((2, 3))
        return {"logits": self.fc(x)[:, 0], "features": x}


def first_rows(patch: pytest.MonkeyPatch) -> None:
    """The predictions taken for the first rows that there are."""

    def guess(output: object) -> list:
        rows = [place for place, x in outputs.tensors_of(output) if x.dim() == 2]
        return rows[:1]

    patch.setattr(calls, "prediction_places", guess)
    patch.setattr(walk, "prediction_places", guess)


@hazard("features voted over in place of logits", "what is named logits must be rows", first_rows)
def _() -> None:
    refused(SqueezedLogits().eval(), "site")


@dataclasses.dataclass
class Doubling:
    logits: Tensor

    def __post_init__(self) -> None:
        self.logits = 2 * self.logits


def by_constructor(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(outputs, "_replaced", lambda output, changed: type(output)(**changed))


@hazard("an output whose constructor computes", "outputs are copied, not constructed again", by_constructor)
def _() -> None:
    class Answering(networks.Net):
        def forward(self, x: Tensor) -> Doubling:
            return Doubling(super().forward(x))

    torch.manual_seed(0)
    model = Answering().eval()
    plain = [model(IMAGES).logits]
    hook = model.site.register_forward_hook(lambda module, args, output: output.flip(3))
    plain.append(model(IMAGES).logits)
    hook.remove()
    inject_crop_vote(model, after="site", views=hflip(), input_size=48)
    table.agree(model(IMAGES).logits, (plain[0] + plain[1]) / 2)


@hazard("as many tokens, from another shape of image", "checked at each size", guards.by_length)
def _() -> None:
    model = networks.tokens(dynamic_img_size=True)
    inject_crop_vote(model, after="blocks.0", input_size=48)
    model(torch.randn(2, 3, 48, 48))
    with pytest.raises(CropVoteError):
        model(torch.randn(2, 3, 24, 96))


@hazard("channels taken for columns", "the layout is found, not assumed", guards.channels_first)
def _() -> None:
    def cut(x: Tensor) -> list[Tensor]:
        return [x, x.flip(2)]

    torch.manual_seed(0)
    right(networks.Slanted().eval(), "site", cut=cut, views=hflip())


@hazard("an auxiliary head in front of the site, mixed into one behind it", "paths of data", guards.no_paths)
def _() -> None:
    class Mixed(networks.Net):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            front = self.front(x)
            rows = self.head(self.site(front))
            return rows, rows + self.head(front).mean(0)

    refused(Mixed().eval(), "site")


@hazard("replicas of one model in threads", "state of a call is in the call", guards.rows_in_an_attribute)
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
        table.agree(found[i], wanted[i])


def guarded(model: nn.Module, batch: Tensor) -> Tensor:
    try:
        return model(batch)
    except CropVoteError:
        return torch.zeros(0)


class Asking(networks.Net):
    """It is called for a vote while its own forward runs."""

    asked = False
    heard: list = []  # noqa: RUF012

    def forward(self, x: Tensor) -> Tensor:
        if not self.asked:
            self.asked = True
            vote = self(x[:2])
            self.heard.append(tuple(vote.shape))
            self.asked = False
        return super().forward(x)


@hazard("a vote in the middle of a training step", "state of a call is in the call", guards.rows_in_an_attribute)
def _() -> None:
    model = Asking().eval()
    inject_crop_vote(model, after="input", views=hflip())
    model._cropvote.checked = frozenset({(False, (("x", checks.TENSOR),))})
    model._cropvote.layout = "NCHW"
    found = guarded(model, IMAGES[:5])
    model.asked = True
    table.agree(found, (networks.Net.forward(model, IMAGES[:5]) + networks.Net.forward(model, IMAGES[:5].flip(3))) / 2)


@hazard("settings shared by copies", "a copy has its own", guards.shared_settings)
def _() -> None:
    model = table.voting()
    twin = copy.deepcopy(model)
    settings(twin).enabled = False
    table.agree(model(IMAGES), table.expected(10))


@hazard("a vote inside a call that gives every view", "each call has its own plan", guards.one_plan_for_all)
def _() -> None:
    shapes: list[tuple[int, ...]] = []
    model = Asking().eval()
    inject_crop_vote(model, after="front", views_per_pass=3)
    model.asked = True
    model(IMAGES)  # checked, without a call inside
    model.asked, model.heard = False, shapes
    found = per_view(model, IMAGES)
    assert found.shape == (10, 10, 7)
    assert shapes == [(2, 7), (1, 7), (1, 7), (1, 7)], shapes  # a vote inside each pass


@hazard("a stage in another mode than its model", "the root's mode decides", lambda patch: patch.setattr(
    checks.Injection, "training", lambda injection, module: module.training))  # fmt: skip
def _() -> None:
    model = table.voting(eval_views=[4, 9], train_views=2, eval_output="views")
    for module in (model.layer2, *model.layer2):
        module.training = True
    rows = oracle.tail_rows(networks.fer(), "layer2", IMAGES)[:, [4, 9]]
    table.agree(model(IMAGES), oracle.sample_major(list(rows.unbind(1))))


@hazard("labels that do not match the rows", "the loss repeats them in the rows' order", lambda patch: patch.setattr(
    "cropvote.voting.repeat_targets", lambda targets, views: targets.repeat(views)))  # fmt: skip
def _() -> None:
    model = table.still(table.voting())
    loss = CropVoteLoss(nn.CrossEntropyLoss())(model(IMAGES[:4]), table.TARGETS)
    rows = oracle.tail_rows(table.still(networks.fer()), "layer2", IMAGES[:4])
    table.agree(loss, oracle.loss_on_views(rows, table.TARGETS))


@pytest.mark.parametrize("case", HAZARDS, ids=lambda case: case.name)
def test_it_is_right_or_it_raises(case):
    case.check()


@pytest.mark.parametrize("case", HAZARDS, ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which dynamo reads
def test_without_its_guard_the_check_fails(case, monkeypatch):
    """Else the check would prove nothing."""
    case.without(monkeypatch)
    swapping._classes.clear()
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        case.check()
    swapping._classes.clear()
