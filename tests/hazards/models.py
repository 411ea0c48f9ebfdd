"""Hazards of models: paths that bypass the views, and misleading outputs."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import guards
import networks
from cropvote import call, five_crop, hflip, inject_crop_vote, outputs, sites
from cropvote.errors import PlainModelError, RowsError, SiteError
from cropvote.probe import copying, fakes, subclasses, trace
from cropvote.probe import mode as check_mode
from cropvote.probe import sites as probe_sites
from cropvote.surgery import injection
from hazards.table import IMAGES, hazard, refused, right
from toolchain import table as tools


@hazard(
    "one image, whose gate broadcasts over the views",
    "data paths; fake batch above 1",
    guards.no_paths,
    guards.batch_of_one,
)
def _() -> None:
    refused(networks.Gate().eval(), "site", IMAGES[:1])


@hazard("a path around the site that joins at the logits", "data paths", guards.no_paths)
def _() -> None:
    refused(networks.LogitSkip().eval(), "site")


@hazard("a module that is called twice splits twice", "the trace's count; the rows", guards.no_probe, guards.no_rows)
def _() -> None:
    refused(networks.Twice().eval(), "site")


@hazard(
    "a site that is never called, and as many images as views", "the trace; the rows", guards.no_probe, guards.no_rows
)
def _() -> None:
    refused(networks.Unused().eval(), "site")


class Flagged(networks.Net):
    """A flag opens a gate that broadcasts over the views of one image."""

    def forward(self, x: Tensor, gate: bool = False) -> Tensor:
        x = self.front(x)
        return self.head(self.site(x) * x.mean((2, 3), keepdim=True)) if gate else self.head(self.site(x))


@hazard("a flag that opens a path, with one image", "checks are stored by flags; tracking",
        guards.no_check_of_calls, guards.no_tracking)  # fmt: skip
def _() -> None:
    model = inject_crop_vote(Flagged().eval(), after="site", input_size=48)
    assert model(IMAGES[:1], gate=False).shape == (1, 7)
    for arguments in ({"args": (True,)}, {"kwargs": {"gate": True}}):
        with pytest.raises(SiteError, match="CV101"):
            model(IMAGES[:1], *arguments.get("args", ()), **arguments.get("kwargs", {}))


class SqueezedLogits(networks.Net):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.site(self.front(x)).mean((2, 3))
        return {"logits": self.fc(x)[:, 0], "features": x}


def first_rows(patch: pytest.MonkeyPatch) -> None:
    """Take the first rows for the predictions."""

    def guess(output: object) -> list:
        rows = [place for place, x in outputs.tensors_of(output) if x.dim() == 2]
        return rows[:1]

    patch.setattr(call, "prediction_paths", guess)
    patch.setattr(trace, "prediction_paths", guess)


@hazard("features voted over instead of logits", "outputs named logits must be rows", first_rows)
def _() -> None:
    refused(SqueezedLogits().eval(), "site")


@dataclasses.dataclass
class Doubling:
    logits: Tensor

    def __post_init__(self) -> None:
        self.logits = 2 * self.logits


def by_constructor(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(outputs, "_replaced", lambda output, changed: type(output)(**changed))


@hazard("an output whose constructor computes", "outputs are copied, not reconstructed", by_constructor)
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
    tools.agree(model(IMAGES).logits, (plain[0] + plain[1]) / 2)


@hazard("an auxiliary head before the site, mixed into one after it", "data paths", guards.no_paths)
def _() -> None:
    class Mixed(networks.Net):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            front = self.front(x)
            rows = self.head(self.site(front))
            return rows, rows + self.head(front).mean(0)

    refused(Mixed().eval(), "site")


class ExactClass(networks.Net):
    """What follows a convolution depends on its exact class."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.site(self.front(x))
        return self.head(torch.relu(x) if type(self.site) is nn.Conv2d else x)


@hazard("a forward that tests the exact class of the site", "run with swapped classes too", lambda patch:
    patch.setattr(probe_sites, "why_not_swapped", lambda *_: ""))  # fmt: skip
def _() -> None:
    refused(ExactClass().eval(), "site")
    assert [site.name for site in sites(ExactClass().eval(), 48)] == ["input", "front"]


class FactorByClass(networks.Net):
    """The operations are the same for every class, and a number is not; in training mode or in eval mode.

    It is also another one while somebody looks on with hooks, as the trace does.
    """

    def __init__(self, of_root: bool, in_training: bool) -> None:
        super().__init__()
        self.of_root, self.in_training = of_root, in_training

    def forward(self, x: Tensor) -> Tensor:
        is_own = type(self) is FactorByClass if self.of_root else type(self.site) is nn.Conv2d
        is_own = is_own and not self.site._forward_hooks
        return self.head(self.site(self.front(x)) * (2.0 if is_own and self.training == self.in_training else 1.0))


@hazard("a number chosen by the exact class", "the operations' arguments are compared, in both modes", lambda patch:
    patch.setattr(subclasses, "_describe", lambda value: ""))  # fmt: skip
def _() -> None:
    for of_root in (False, True):
        for in_training in (False, True):
            refused(FactorByClass(of_root, in_training).train(in_training), "site")
            model = inject_crop_vote(FactorByClass(of_root, in_training).train(not in_training), "site", input_size=48)
            with pytest.raises(SiteError, match="CV112"):
                model.train(in_training)(IMAGES)


class Options(networks.Net):
    def forward(self, x: Tensor, options: object = None) -> Tensor:
        x = self.front(x)
        y = self.site(x)
        return self.head(y * x.mean().sigmoid() if options["gate"] else y)


@hazard("a path opened by a container's contents", "containers are inspected", lambda patch: patch.setattr(
    injection, "_kind", lambda value: type(value).__name__))  # fmt: skip
def _() -> None:
    model = inject_crop_vote(Options().eval(), after="site", input_size=None)
    model(IMAGES, {"gate": False})
    with pytest.raises(SiteError, match="CV101"):
        model(IMAGES, {"gate": True})


class OwnStatistics(networks.Net):
    """In training mode, the tail reads the batch statistics written by BatchNorm before the site."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.site(self.norm(self.front(x)))
        return self.head(x - self.norm.running_mean.view(1, -1, 1, 1))


@hazard("running statistics written before the site and read after it", "they count as written", lambda patch:
    patch.setattr(check_mode, "written_arguments", lambda *_: []))  # fmt: skip
def _() -> None:
    refused(OwnStatistics().train(), "site")
    right(OwnStatistics().eval(), "site")


class Alias(networks.Net):
    """The front writes into a parameter's memory under another name, and the tail reads the parameter."""

    def __init__(self, in_graph: bool) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1, 8, 1, 1))
        self.alias = self.shift[:] if in_graph else self.shift.data[:]

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(x)
        with torch.no_grad():
            self.alias.copy_(x.mean((0, 2, 3), keepdim=True))
        return self.head(self.site(x) + self.shift)


def in_memory_of_its_own(patch: pytest.MonkeyPatch) -> None:
    share = copying.CopyMode.fake
    patch.setattr(copying.CopyMode, "fake", lambda mode, tensor: mode.storages.clear() or share(mode, tensor))


@hazard("a parameter's memory under another name", "the copy shares memory as the model does", in_memory_of_its_own)
def _() -> None:
    for in_graph in (False, True):
        refused(Alias(in_graph).eval(), "site")


class SkipsSmall(networks.Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.front(x)
        return self.head(self.site(x) if x.shape[3] > 20 else x)


@hazard("one view, and a split skipped for small images", "the splits that ran are counted; tracking",
        guards.no_watch, guards.no_tracking)  # fmt: skip
def _() -> None:
    model = inject_crop_vote(SkipsSmall().eval(), after="site", input_size=48, eval_views="centre")
    with pytest.raises(RowsError):
        model(IMAGES[:, :, :16, :16])


class Caching(networks.Net):
    """Caches a ramp for each width, then does something that a check cannot follow."""

    ramps: ClassVar[dict[int, Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        x = self.site(self.front(x))
        ramp = self.ramps.setdefault(x.shape[3], torch.linspace(0, 1, x.shape[3]))
        return self.head(x + ramp) * float(self.fc.bias.sum())


@hazard("a failed check leaves fake tensors in a cache", "emptied after a failure, too", lambda patch:
    patch.setattr(fakes, "_empty_stores", lambda *_: None))  # fmt: skip
def _() -> None:
    Caching.ramps.clear()
    with pytest.raises(PlainModelError):
        inject_crop_vote(Caching().eval(), after="site", input_size=48)
    assert not Caching.ramps


class Switched(networks.Net):
    """Attributes, numbers and options open a gate that broadcasts over the views of one image."""

    gate = False

    def forward(self, x: Tensor, level: float = 0.0) -> Tensor:
        x = self.front(x)
        y = self.site(x)
        return self.head(y * x.mean((2, 3), keepdim=True).sigmoid() if self.gate or level > 1 else y)


@hazard("a path that an attribute opens after the check, with one image", "tracking", guards.no_tracking)
def _() -> None:
    model = inject_crop_vote(Switched().eval(), after="site", input_size=48)
    right_now = model(IMAGES[:1])
    model.gate = True
    with pytest.raises(SiteError):
        model(IMAGES[:1])
    model.gate = False
    tools.agree(model(IMAGES[:1]), right_now)


@hazard("a path that a number opens, with one image", "tracking", guards.no_tracking)
def _() -> None:
    model = inject_crop_vote(Switched().eval(), after="site", input_size=48)
    model(IMAGES[:1], 0.5)
    with pytest.raises(SiteError):
        model(IMAGES[:1], 2.0)


@hazard("a path that an attribute opens, with one view of each image", "tracking", guards.no_tracking)
def _() -> None:
    model = inject_crop_vote(Switched(), after="site", input_size=48, train_views=1, eval_views="centre")
    for mode in (True, False):
        model.train(mode).gate = False
        model(IMAGES)
        model.gate = True
        with pytest.raises(SiteError):
            model(IMAGES)


@hazard("a hook that adds front features after the site, with one image", "tracking", guards.no_tracking)
def _() -> None:
    model = inject_crop_vote(networks.Net().eval(), after="site", views=hflip(), input_size=48)
    kept: list[Tensor] = []
    model.front.register_forward_hook(lambda module, args, output: kept.append(output))
    model.site.register_forward_hook(lambda module, args, output: output + kept.pop())
    with pytest.raises(SiteError):
        model(IMAGES[:1])


@hazard("a path between two sites, with one image", "tracking counts the sites passed", guards.no_tracking)
def _() -> None:
    class Chain(networks.Net):
        around = False

        def forward(self, x: Tensor) -> Tensor:
            front = self.front(x)
            y = self.site(front + x.mean() if self.around else front)
            return self.head(y)

    model = Chain().eval()
    inject_crop_vote(model, after={"front": hflip(), "site": five_crop()}, input_size=48)
    model(IMAGES[:1])
    model.around = True
    with pytest.raises(SiteError):
        model(IMAGES[:1])
