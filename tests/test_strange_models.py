"""Unusual models and calls give the right result, or an error with its reason."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import warnings
import weakref
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

import networks
from cropvote import CropVoteError, CropVoteLoss, hflip, inject_crop_vote, profile, sites
from cropvote.errors import InputTypeError, PlainModelError, SiteError, SurgeryError
from cropvote.probe import fakes
from networks import IMAGES

AROUND = "CV101"


def mirrored(model, name, images, axis):
    """Return the oracle of hflip at a site: the mean of the plain output and the one with a mirrored map."""
    plain = model(images)
    hook = model.get_submodule(name).register_forward_hook(lambda module, args, output: output.flip(axis))
    other = model(images)
    hook.remove()
    return (plain + other) / 2


@pytest.mark.parametrize(("site", "axis"), [("patch_embed.proj", 3), ("layers.0", 2)])
def test_a_swin_has_maps_of_both_layouts(site, axis):
    """timm states NHWC for the model, but the patch embedding's convolution is NCHW."""
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5).eval()
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = mirrored(model, site, images, axis)
        inject_crop_vote(model, after=site, views=hflip())
        assert torch.allclose(model(images), expected, atol=1e-5)


class LastImages(networks.Net):
    """Takes channels-last images."""

    def forward(self, x):
        return super().forward(x.permute(0, 3, 1, 2))


def test_images_may_have_their_channels_last():
    model, images = LastImages().eval(), torch.randn(2, 24, 24, 3)
    expected = (model(images) + model(images.flip(2))) / 2
    inject_crop_vote(model, after="input", views=hflip())
    assert torch.allclose(model(images), expected, atol=1e-6)


class Cached(networks.Net):
    """Keeps a tensor in its class."""

    cache: dict = {}  # noqa: RUF012

    def forward(self, x):
        ramp = self.cache.setdefault(x.shape[-1], torch.linspace(0, 1, x.shape[-1]))
        return super().forward(x * ramp)


def test_a_check_empties_the_caches_that_it_filled():
    Cached.cache.clear()
    model = inject_crop_vote(Cached().eval(), after="site", input_size=48)
    assert not Cached.cache
    assert type(model(IMAGES)) is torch.Tensor
    assert all(type(ramp) is torch.Tensor for ramp in Cached.cache.values())
    kept = dict(Cached.cache)
    inject_crop_vote(Cached().eval(), after="site", input_size=36)
    assert Cached.cache == kept  # existing entries stay


@functools.lru_cache
def grid(height: int, width: int) -> torch.Tensor:
    return torch.linspace(0, 1, width).expand(height, width)


class Coordinates(networks.Net):
    """Adds coordinates from a cached function of the size, both before and after the site."""

    def forward(self, x):
        x = self.front(x)
        x = self.site(x + grid(*x.shape[2:]))
        return self.head(x + grid(*x.shape[2:]))


@pytest.mark.parametrize("size", [None, 48])
def test_a_function_cache_never_keeps_a_tensor_without_data(size):
    """This also holds after a failed check, and for sizes that only the check has used."""
    grid.cache_clear()
    with pytest.raises(CropVoteError):
        inject_crop_vote(Coordinates().eval(), after="site", views=hflip(), input_size=(5, 48, 48))
    model = inject_crop_vote(Coordinates(), after="site", input_size=size)
    loss = CropVoteLoss(nn.CrossEntropyLoss())(model(IMAGES), torch.tensor([0, 1, 2]))
    assert type(loss) is torch.Tensor
    for height, width in ((24, 24), (48, 24), (24, 48), (48, 48), (20, 20)):
        assert type(grid(height, width)) is torch.Tensor


class Attribute(networks.Net):
    """Keeps a tensor in its class, which a check cannot restore."""

    ramp = None

    def forward(self, x):
        if Attribute.ramp is None:
            Attribute.ramp = torch.linspace(0, 1, x.shape[-1])
        return super().forward(x * Attribute.ramp)


def test_a_tensor_that_a_check_left_is_remembered_and_never_returned():
    Attribute.ramp = None
    model = Attribute().eval()
    for _ in range(2):  # the second check must also notice it
        with pytest.raises(SurgeryError, match="CV412"):
            inject_crop_vote(model, after="site", input_size=48)
    unchecked = inject_crop_vote(model, after="site", check=False)
    with pytest.raises(SurgeryError, match="CV410"), torch.no_grad():
        unchecked(IMAGES)
    Attribute.ramp = None
    assert type(unchecked(IMAGES)) is torch.Tensor


@pytest.mark.parametrize(
    "name", ["resnet10t", "vit_tiny_patch16_224", pytest.param("inception_v3", marks=pytest.mark.slow)]
)
def test_a_check_needs_no_garbage_collection(name, monkeypatch):
    """A garbage collection is slow; reference counting frees the fake tensors."""
    collected: list[object] = []
    monkeypatch.setattr(fakes, "gc", SimpleNamespace(collect=lambda *_: collected.append(1)))
    model = timm.create_model(name, num_classes=7).eval()
    found = sites(model)
    profile(model, sites=[found[1].name])
    inject_crop_vote(model, after=found[1].name)
    assert not collected


def test_a_refused_model_is_freed_at_once():
    """A handled error holds neither the model nor the check; no garbage collection is needed."""
    model = networks.fer()
    alive = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(SiteError, match=AROUND):
            inject_crop_vote(model, after="layer1.0.conv1", input_size=48)
        del model
        assert alive() is None
    finally:
        gc.enable()


def test_a_hook_that_collects_outputs_is_detected():
    model, seen = networks.Net().eval(), []
    model.front.register_forward_hook(lambda module, args, output: seen.append(output))
    with pytest.raises(SurgeryError, match="CV412"):
        inject_crop_vote(model, after="site", input_size=12)


class Teacher(networks.Net):
    """Copied by reference, like some shared, frozen networks."""

    def __deepcopy__(self, memo):
        return self


def test_a_module_that_deepcopy_shares_is_not_touched():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Teacher()).eval()
    with pytest.raises(PlainModelError, match="CV413"):
        inject_crop_vote(model, after="0", input_size=12)
    assert not any(module.training for module in model.modules())


class Direct(networks.Net):
    """Never uses forward."""

    def __call__(self, x):
        return self.head(self.site(self.front(x)))


class Recursive(networks.Net):
    def forward(self, x, norm=True):
        return self(x - 0.5, norm=False) if norm else super().forward(x)


@pytest.mark.parametrize("make", [Direct, Recursive])
@pytest.mark.parametrize("site", ["input", "site"])
def test_a_forward_that_does_not_run_once_is_refused(make, site):
    with pytest.raises(SiteError, match="CV117"):
        inject_crop_vote(make().eval(), after=site, input_size=12)


def test_scripted_children_are_not_sites_but_harmless():
    model = networks.Net().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.act = torch.jit.script(nn.Sequential(nn.ReLU()))
    assert "act" not in [site.name for site in sites(model, 12, all=True)]
    assert inject_crop_vote(model, after="site", input_size=48)(IMAGES).shape == (3, 7)


@pytest.mark.parametrize("arguments", [(None, 24), ("x", 24), (networks.Net(), 24, 10)])
def test_sites_with_invalid_arguments(arguments):
    with pytest.raises(InputTypeError, match=r"CV80[16]"):
        sites(*arguments[:2], **({"views": arguments[2]} if arguments[2:] else {}))


@pytest.mark.parametrize("site", ["input", "0"])
def test_feature_rows_are_not_images(site):
    model = inject_crop_vote(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 7)).eval(), after=site)
    with pytest.raises(SiteError, match=r"CV125|CV106"):
        model(torch.randn(3, 4))


@pytest.mark.parametrize("channels", [1, 2])
def test_images_that_are_not_rgb(channels):
    """The first convolution gives the channels; a grey image's axis of 1 must not look like channels-last."""
    model = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7)).eval()
    assert [(site.name, site.shape) for site in sites(model, 32)] == [("input", (channels, 32, 32)), ("0", (4, 30, 30))]
    images = torch.randn(2, channels, 32, 32)
    expected = (model(images) + model(images.flip(3))) / 2
    inject_crop_vote(model, after="input", views=hflip(), input_size=32)
    assert torch.allclose(model(images), expected, atol=1e-6)


def test_a_tail_without_weights_shows_its_channels_in_its_outputs():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    assert [(site.name, site.layout) for site in sites(model, 24)] == [("input", "NCHW"), ("0", "NCHW")]


class AnyChannels(networks.Net):
    """A front that resizes every image, and a tail that takes any number of channels."""

    def forward(self, x):
        return super().forward(nn.functional.adaptive_avg_pool2d(x, 48))

    def head(self, x):
        return nn.functional.adaptive_avg_pool2d(x.mean(1, keepdim=True), (1, 7)).flatten(1)


def test_ambiguous_axes_must_be_stated():
    model = AnyChannels().eval()
    with pytest.raises(SiteError, match="CV114"):
        inject_crop_vote(model, after="act", views=hflip(), input_size=48)
    with torch.no_grad():
        expected = mirrored(model, "act", IMAGES, 3)
        inject_crop_vote(model, after="act", views=hflip(), layout="NCHW", input_size=48)
        assert torch.allclose(model(IMAGES), expected, atol=1e-6)


class HeldNumbers(networks.Net):
    """Numbers from the images or the full map reach the tail without a tensor."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.pool = kind, nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        n = x.shape[0]
        x = self.front(x)
        h, w = x.shape[2:]
        x = self.site(self.act(x))
        x = x.reshape(n, 8, -1) if self.kind == "batch" else x.reshape(-1, 8, h, w).flatten(2)
        return self.fc(x.mean(2))


@pytest.mark.parametrize("kind", ["batch", "sides"])
def test_numbers_kept_from_before_a_site(kind):
    model = HeldNumbers(kind).eval()
    early = ["front"] if kind == "sides" else []  # before the numbers are read
    assert [site.name for site in sites(model, 48)] == ["input", *early]
    for name in {"front", "act", "site"}.difference(early):
        with pytest.raises(SiteError, match=r"CV12[12]"):
            inject_crop_vote(model, after=name, input_size=48)


class Transposed(networks.Net):
    def forward(self, x):
        return self.head(self.site(self.front(x).transpose(2, 3)))


class Windowed(networks.Net):
    """4-D, but not a map: (N, windows, C, pixels)."""

    def forward(self, x):
        x = self.front(x)
        n, c, h, w = x.shape
        x = x.reshape(n, c, h // 6, 6, w // 6, 6).permute(0, 2, 4, 1, 3, 5).reshape(n, -1, c, 36)
        return self.fc(self.act(x).mean((1, 3)))


@pytest.mark.parametrize(
    ("make", "site"),
    [(Transposed, "site"), (Windowed, "act")],
)
def test_outputs_that_only_look_like_maps(make, site):
    with pytest.raises(SiteError, match="CV115"):
        inject_crop_vote(make().eval(), after=site, views=hflip(), input_size=48)


class SmallGate(networks.Gate):
    """A gate that exists only for small images."""

    def forward(self, x):
        return super().forward(x) if x.shape[-1] < 40 else networks.Net.forward(self, x)


def test_a_path_that_opens_at_another_size_is_refused_for_one_image_too():
    """With one image, a gate broadcasts over the views, so shapes do not show it."""
    model = inject_crop_vote(SmallGate().eval(), after="site", input_size=48)
    assert model(IMAGES[:1]).shape == (1, 7)
    with pytest.raises(SiteError, match=AROUND):
        model(IMAGES[:1, :, :24, :24])


class Emptied(networks.Net):
    """Maps without rows, or no tokens at all."""

    def __init__(self, tokens: bool) -> None:
        super().__init__()
        self.tokens, self.site = tokens, nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.front(x)
        x = x.flatten(2).transpose(1, 2)[:, :0] if self.tokens else x[:, :, :0]
        return self.fc(self.site(x).sum(1 if self.tokens else (2, 3)))


@pytest.mark.parametrize("tokens", [False, True])
def test_an_empty_map_is_not_a_site(tokens):
    with pytest.raises(SiteError, match=r"CV108.*input, front"):
        inject_crop_vote(Emptied(tokens).eval(), after="site", input_size=48)
    assert [site.name for site in sites(Emptied(tokens).eval(), 48)] == ["input", "front"]


class LinearLast(nn.Module):
    """Takes images as (N, H, W, C), without a convolution whose channels would show it."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.fc = nn.Linear(3, 8), nn.Linear(8 * 6, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.front(x)
        return self.fc(nn.functional.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), (2, 3)).flatten(1))


def test_the_channel_axis_is_found_without_a_convolution():
    torch.manual_seed(0)
    model = LinearLast().eval()
    images = torch.randn(2, 24, 30, 3)
    with torch.no_grad():
        wanted = (model(images) + model(images.flip(2))) / 2
        inject_crop_vote(model, after="input", views=hflip())
        assert torch.allclose(model(images), wanted, atol=1e-6)
    assert model._cropvote.layouts == (("NHWC",),)


class LastPermuted(nn.Module):
    """Takes channels-last images, and permutes them after a module."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.conv, self.head = nn.Hardtanh(-3, 3), nn.Conv2d(3, 4, 3, padding=1), nn.Linear(16, 5)

    def forward(self, x):
        x = self.conv(self.act(x).permute(0, 3, 1, 2))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


@pytest.mark.parametrize("size", [None, (32, 32, 3)])
@pytest.mark.parametrize("site", ["input", "act"])
def test_channels_last_before_the_first_permute(site, size):
    torch.manual_seed(0)
    model, images = LastPermuted().eval(), torch.randn(4, 32, 32, 3)
    wanted = (model(images) + model(images.flip(2))) / 2
    voting = inject_crop_vote(model, after=site, views=hflip(), input_size=size)
    assert torch.allclose(voting(images), wanted, atol=1e-6)


class Lines(nn.Module):
    """Converts to grey and takes one width, like text recognition networks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(128, 5)

    def forward(self, x):
        x = self.conv(x.mean(1, keepdim=True)).relu()
        return self.head((x * torch.linspace(0, 1, x.shape[2])[:, None]).mean(2).flatten(1))


def test_a_fixed_width_is_not_taken_for_channels():
    torch.manual_seed(0)
    model, images = Lines().eval(), torch.randn(2, 3, 32, 32)
    wanted = (model(images) + model(images.flip(3))) / 2
    voting = inject_crop_vote(copy.deepcopy(model), after="input", views=hflip(), input_size=(3, 32, 32))
    assert torch.allclose(voting(images), wanted, atol=1e-6)
    with pytest.raises(SiteError, match="CV114"):
        inject_crop_vote(copy.deepcopy(model), after="input", views=hflip())(images)


class ByKeyword(networks.Net):
    def forward(self, x):
        h = self.front(x)
        y = self.site(input=h)
        h.relu_()
        return self.head(y)


class Stashed(nn.Conv2d):
    def forward(self, x):
        self.last = super().forward(x)
        return self.last


class WrittenLater(networks.Net):
    def forward(self, x):
        y = self.site(self.front(x))
        self.site.last.relu_()
        return self.head(y)


@pytest.mark.parametrize("kind", [ByKeyword, WrittenLater])
def test_writes_through_an_alias_are_refused(kind):
    model = kind().eval()
    model.site = nn.Identity() if kind is ByKeyword else Stashed(8, 8, 1)
    with pytest.raises(SiteError, match="CV109"):
        inject_crop_vote(model, after="site", input_size=12)


class Aside(networks.Net):
    """An auxiliary head before the site."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(8, 7)

    def forward(self, x):
        h = self.front(x)
        return {"logits": super().forward(x), "aux_logits": self.aux(h.mean((2, 3)))}


@pytest.mark.parametrize("views", ["centre", [0, 1], None])
def test_a_head_before_the_site_is_unchanged(views):
    model = Aside().eval()
    wanted = model(IMAGES)["aux_logits"]
    voting = inject_crop_vote(model, after="site", vote="probs", eval_views=views, input_size=48)
    assert torch.allclose(voting(IMAGES)["aux_logits"], wanted)


class OwnCause(networks.Net):
    def forward(self, x):
        try:
            return self.missing(x)
        except Exception as error:
            raise error from error


class Wordless(networks.Net):
    def forward(self, x):
        class SilentError(Exception):
            def __str__(self) -> str:
                raise RuntimeError

        raise SilentError


class Forgetful(networks.Net):
    """Its copies lack a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("extra", torch.zeros(1))

    def __deepcopy__(self, memo):
        twin = networks.Net()
        twin.load_state_dict({k: v for k, v in self.state_dict().items() if k != "extra"})
        return twin


@pytest.mark.parametrize("kind", [OwnCause, Wordless])
def test_errors_of_the_model_that_are_hard_to_handle(kind):
    with pytest.raises(PlainModelError, match="CV414"):
        sites(kind().eval(), 12)


def test_a_copy_without_a_buffer_is_still_checked():
    assert "site" in [site.name for site in sites(Forgetful().eval(), 12)]


class Frozen(networks.Net):
    """Its front creates inference tensors."""

    def forward(self, x):
        with torch.inference_mode():
            h = self.front(x)
        return self.head(self.site(h))


class Sparse(networks.Net):
    def forward(self, x):
        return super().forward(x) + torch.sparse.mm(torch.eye(7).to_sparse(), torch.zeros(7, 1)).T


def test_inference_tensors_and_sparse_ones_are_followed():
    assert "site" in [site.name for site in sites(Frozen().eval(), 12)]
    with contextlib.suppress(PlainModelError):  # if fake tensors do not support sparse ones
        assert "site" in [site.name for site in sites(Sparse().eval(), 12)]


def test_images_are_the_first_tensor_with_rows():
    class Scaled(networks.Net):
        def forward(self, scale, x):
            return super().forward(x) * scale

    model, images = Scaled().eval(), torch.randn(2, 3, 24, 24)
    wanted = (model(torch.tensor(2.0), images) + model(torch.tensor(2.0), images.flip(3))) / 2
    voting = inject_crop_vote(model, after="input", views=hflip())
    assert torch.allclose(voting(torch.tensor(2.0), images), wanted, atol=1e-6)
