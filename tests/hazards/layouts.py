"""Hazards of layouts: the axes of height, width and tokens, and what the tail stores for them."""

from __future__ import annotations

import copy
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

import guards
import networks
import oracle
from cropvote import CropVoteError, Views, hflip, inject_crop_vote, layouts
from cropvote.errors import SiteError, SurgeryError
from cropvote.probe import layout
from cropvote.probe.trace import Trace
from hazards.table import IMAGES, hazard, refused, right
from toolchain import table as tools


class StoredMask(networks.Net):
    """Windows of 5 x 5 pixels, with a stored mask for each window of the full 10 x 25 map: two rows of five."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.randn(10, 1, 5, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.site(self.front(x))
        n, c, h, w = x.shape
        x = x.reshape(n, c, h // 5, 5, w // 5, 5).permute(0, 2, 4, 1, 3, 5).reshape(-1, 10, c, 5, 5) + self.mask
        return self.fc(self.act(x).reshape(n, -1, c, 5, 5).mean((1, 3, 4)))


@hazard(
    "masks stored for the full map's windows",
    "a trial with a prime batch and a prime number of views",
    guards.all_views_at_once,
)
def _() -> None:
    """Three windows per view make thirty per image, a multiple of ten masks."""
    views = Views([(0, Fraction(i, 9)) for i in range(10)], scale=(Fraction(1, 2), Fraction(3, 5)))
    refused(StoredMask().eval(), "site", torch.randn(4, 3, 10, 25), views=views)


class Cached(networks.Net):
    """A table of positions, made once for the first map."""

    table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.site(self.front(x))
        if self.table is None:
            self.table = torch.linspace(0, 1, x.shape[3])
        return self.head(self.act(x + self.table))


@hazard("a table of positions cached for the full map", "the trial comes after a plain call", guards.no_probe)
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


@hazard("tokens cut from the wrong grid", "the patch grid is observed, not guessed", guards.guessed_grid)
def _() -> None:
    """4 x 16 patches without prefix: the same number as 8 x 8."""
    model = networks.tokens(img_size=(16, 64), patch_size=4, reg_tokens=0, class_token=False, global_pool="avg")
    right(model, "blocks.0", torch.randn(3, 3, 16, 64), cut=wide_views)


class Resizing(nn.Module):
    """Resizes every image to a square."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = networks.tokens()

    def forward(self, x: Tensor) -> Tensor:
        return self.vit(nn.functional.interpolate(x, (48, 48)))


def grid_of_the_images(patch: pytest.MonkeyPatch) -> None:
    def guess(trace: Trace, name: str, length: int) -> layouts.Tokens:
        height, width = (side // 8 for side in trace.shape("input")[1:])
        return layouts.Tokens(height, width, length - height * width)

    patch.setattr(layout, "_known_tokens", guess)


@hazard("a token grid with another shape than the images", "the patch grid is observed", grid_of_the_images)
def _() -> None:
    def cut(x: Tensor) -> list[Tensor]:
        maps = x[:, 3:].transpose(1, 2).reshape(len(x), 24, 6, 6)
        return [torch.cat([x[:, :3], v.flatten(2).transpose(1, 2)], 1) for v in oracle.ten_views(maps)]

    right(Resizing().eval(), "vit.blocks.0", torch.randn(3, 3, 32, 72), cut=cut)


class ClassTokenLast(nn.Module):
    """An unknown transformer with the attribute names of a known one."""

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
    patch.setattr(layout, "stated_tokens", lambda part: (1, "conv_proj"))


@hazard("a class token taken for the grid's first token", "only known libraries are trusted", any_library)
def _() -> None:
    refused(ClassTokenLast().eval(), "site", torch.randn(3, 3, 48, 48))


@hazard(
    "a stated grid used for images of another shape",
    "one image shape if the user states the tokens",
    guards.no_check_of_calls,
)
def _() -> None:
    model = networks.tokens(dynamic_img_size=True)
    inject_crop_vote(model, after="blocks.0", layout=layouts.Tokens(6, 6, 3), input_size=48)
    with pytest.raises(SurgeryError, match="CV415"):
        model(torch.randn(2, 3, 24, 96))


@hazard("equally many tokens from another image shape", "a grid for each shape", guards.grids_by_length)
def _() -> None:
    def cut(x: Tensor) -> list[Tensor]:
        maps = x[:, 3:].transpose(1, 2).reshape(len(x), 24, 4, 9)
        return [torch.cat([x[:, :3], v.flatten(2).transpose(1, 2)], 1) for v in oracle.ten_views(maps)]

    model = networks.tokens(dynamic_img_size=True)
    wide = torch.randn(2, 3, 32, 72)
    with torch.no_grad():
        wanted = oracle.vote(oracle.tail_rows(copy.deepcopy(model), "blocks.0", wide, cut), "soft")
    inject_crop_vote(model, after="blocks.0", input_size=48)
    model(torch.randn(2, 3, 48, 48))
    tools.agree(model(wide), wanted)


@hazard("channels taken for columns", "the layout is found, not assumed", guards.channels_first)
def _() -> None:
    def cut(x: Tensor) -> list[Tensor]:
        return [x, x.flip(2)]

    torch.manual_seed(0)
    right(networks.Slanted().eval(), "site", cut=cut, views=hflip())


class ChannelsLast(nn.Module):
    """Takes images as (N, H, W, C), of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 11 * 11, 7))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.permute(0, 3, 1, 2))


def images_channels_first(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(layout, "_seen_image_layout", lambda _: "NCHW")


@hazard("images whose channels are mirrored", "the channel axis is observed", images_channels_first)
def _() -> None:
    torch.manual_seed(0)
    model, images = ChannelsLast().eval(), torch.randn(10, 24, 24, 3)
    with torch.no_grad():
        wanted = (model(images) + model(images.flip(2))) / 2
    inject_crop_vote(model, after="input", views=hflip())
    tools.agree(model(images), wanted)


@hazard("grey images whose channel axis is unclear", "the layout must be stated", images_channels_first)
def _() -> None:
    class Grey(networks.Net):
        def __init__(self) -> None:
            super().__init__()
            self.front = nn.Conv2d(1, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mean(3).unsqueeze(1))

    model, images = Grey().eval(), torch.randn(10, 24, 24, 3)
    with torch.no_grad():
        wanted = (model(images) + model(images.flip(2))) / 2
    twin = copy.deepcopy(model)
    inject_crop_vote(model, after="input", views=hflip())
    with pytest.raises(SiteError, match="CV114"):
        model(images)
    tools.agree(inject_crop_vote(twin, after="input", views=hflip(), layout="NHWC")(images), wanted)


class Shuffled(nn.Module):
    """Shuffles its patches in each call, as a masked autoencoder does."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = networks.tokens(reg_tokens=0)
        self.vit.norm_pre = Shuffle()

    def forward(self, x: Tensor) -> Tensor:
        return self.vit(x)


class Shuffle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        order = torch.rand((*x.shape[:1], x.shape[1] - 1)).argsort(1)[:, :, None].expand(-1, -1, x.shape[2])
        return torch.cat([x[:, :1], x[:, 1:].gather(1, order)], 1)


class TokenLast(nn.Module):
    """Runs the parts of a known transformer in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = networks.tokens(reg_tokens=0)

    def forward(self, x: Tensor) -> Tensor:
        vit = self.vit
        x = vit._pos_embed(vit.patch_embed(x))
        x = torch.cat([x[:, 1:], x[:, :1]], 1)
        return vit.head(vit.norm(vit.blocks(x))[:, -1])


def tokens_stay(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(layout, "_were_moved", lambda *_: False)


@hazard("tokens in another order than their patches", "moves of tokens are detected", tokens_stay)
def _() -> None:
    refused(Shuffled().eval(), "vit.blocks.0")


@hazard("a class token moved behind the grid", "moves of tokens are detected", tokens_stay)
def _() -> None:
    refused(TokenLast().eval(), "vit.blocks.0")


@hazard("as many tokens dropped as the prefix has", "moves of tokens are detected", tokens_stay)
def _() -> None:
    refused(networks.tokens(reg_tokens=0, patch_drop_rate=0.02).train(), "blocks.0")
