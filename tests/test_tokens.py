"""Transformers: views cut from the token grid, against the oracle and plain indexing."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import networks
import oracle
from cropvote import CropVote, CropVoteError, Tokens, five_crop, hflip, inject_crop_vote, sites, split_views, ten_crop
from cropvote.errors import SiteError, SurgeryError
from networks import IMAGES

SMALL = {"img_size": 48, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 7}


def deit() -> nn.Module:
    return timm.models.deit.VisionTransformerDistilled(**SMALL)


def torchvision_vit() -> nn.Module:
    model = torchvision.models.VisionTransformer(48, 8, 3, 3, 24, 48, num_classes=7)
    nn.init.normal_(model.heads.head.weight)  # zero otherwise
    return model


class HuggingFace(nn.Module):
    """A Hugging Face model that returns only its logits."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        import transformers

        config = getattr(transformers, f"{kind}Config")(
            hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=48, image_size=48,
            patch_size=8, num_labels=7,
        )  # fmt: skip
        self.model = getattr(transformers, f"{kind}ForImageClassification")(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


MODELS = {
    "timm, class token and registers": (networks.tokens, "blocks.0", 3),
    "timm, in front of the blocks": (networks.tokens, "pos_drop", 3),
    "timm, distilled": (deit, "blocks.1", 2),
    "timm, no prefix": (lambda: networks.tokens(class_token=False, reg_tokens=0, global_pool="avg"), "blocks.0", 0),
    "torchvision": (torchvision_vit, "encoder.layers.encoder_layer_0", 1),
    "Hugging Face, ViT": (lambda: HuggingFace("ViT"), "model.vit.layers.0", 1),
    "Hugging Face, DeiT": (lambda: HuggingFace("DeiT"), "model.deit.layers.0", 2),
}


def cut(x: Tensor, prefix: int, views=oracle.ten_views) -> list[Tensor]:
    """Return views of a 6 x 6 token grid, by indexing."""
    maps = torch.stack([x[:, prefix + 6 * row : prefix + 6 * row + 6] for row in range(6)], 1).permute(0, 3, 1, 2)
    return [torch.cat([x[:, :prefix], *v.permute(0, 2, 3, 1).unbind(1)], 1) for v in views(maps)]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("views", ["ten", "flip"])
def test_against_the_oracle(kind, views):
    make, site, prefix = MODELS[kind]
    torch.manual_seed(0)
    model = make().eval()
    ours, theirs = {"ten": (ten_crop(), oracle.ten_views), "flip": (hflip(), oracle.flip_views)}[views]
    with torch.no_grad():
        rows = oracle.tail_rows(copy.deepcopy(model), site, IMAGES, lambda x: cut(x, prefix, theirs))
    if views == "ten":
        assert rows.std(1).max() > 1e-4  # the views differ
    else:  # the mirrored full grid does not differ: attention ignores the order of tokens
        assert rows.std(1).max() < 1e-5
    assert {row.name: row.layout for row in sites(model, 48)}[site] == Tokens(6, 6, prefix)
    inject_crop_vote(model, after=site, views=ours, input_size=48)
    assert torch.allclose(model(IMAGES).double(), oracle.vote(rows, "soft"), atol=1e-5)


@pytest.mark.parametrize(
    "where",
    [{"blocks.0": None}, pytest.param({"input": hflip(), "blocks.1": five_crop()}, marks=pytest.mark.slow)],
    ids=["one", "two"],
)
@torch.no_grad()
def test_images_of_another_size_give_another_grid(where):
    """Each size is checked once, and every call uses the grid of its size."""
    torch.manual_seed(0)
    plain = networks.tokens(dynamic_img_size=True).eval()
    after, views = ("blocks.0", ten_crop()) if len(where) == 1 else (where, None)
    model = inject_crop_vote(copy.deepcopy(plain), after=after, views=views, input_size=48)
    sizes = [(48, 48), (64, 80), (48, 48), (80, 48), (64, 80)]
    images = {size: torch.randn(2, 3, *size) for size in sizes}
    for size in sizes:
        once = inject_crop_vote(copy.deepcopy(plain), after=after, views=views, input_size=size)
        assert torch.allclose(model(images[size]), once(images[size]), atol=1e-6)
    compiled = torch.compile(model, backend="eager")
    for size in sizes:
        assert torch.allclose(compiled(images[size]), model(images[size]), atol=1e-6)
    with pytest.raises(SurgeryError, match="CV503"):
        compiled(torch.randn(2, 3, 32, 32))
    tall = torch.randn(2, 3, 80, 64)  # as many tokens as 64 x 80
    once = inject_crop_vote(copy.deepcopy(plain), after=after, views=views, input_size=(80, 64))
    assert torch.allclose(model(tall), once(tall), atol=1e-6)
    torch._dynamo.reset()  # a refused call is not compiled again
    with pytest.raises(Exception, match="CV504"):
        torch.compile(model, backend="eager", fullgraph=True)(tall)


@pytest.mark.parametrize("kind", MODELS)
def test_a_token_is_at_the_position_of_its_patch(kind):
    """The gradient of token (row, column) is largest at the image's patch (row, column)."""
    make, site, prefix = MODELS[kind]
    torch.manual_seed(0)
    model = make().eval()
    caught = []
    model.get_submodule(site).register_forward_hook(lambda module, args, output: caught.append(output))
    images = IMAGES.clone().requires_grad_()
    model(images)
    for row, column in [(0, 0), (0, 5), (2, 4), (5, 1)]:
        (grad,) = torch.autograd.grad(caught[0][:, prefix + 6 * row + column].square().sum(), images, retain_graph=True)
        patches = grad.abs().unflatten(2, (6, 8)).unflatten(4, (6, 8)).sum((0, 1, 3, 5))
        assert divmod(int(patches.argmax()), 6) == (row, column)


class Unstated(nn.Module):
    """Tokens of a grid that the model does not state."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Conv2d(3, 8, 8, 8)
        self.site = nn.Identity()
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.site(self.front(x).flatten(2).transpose(1, 2))
        return self.fc(self.mix(x, x, x)[0].tanh().mean(1))


class Unbuilt(Unstated):
    """Its patch embedding is a property that raises."""

    @property
    def patch_embed(self) -> nn.Module:
        raise RuntimeError("not built")


@pytest.mark.parametrize("library", ["timm.models.own", "own"])
def test_no_property_of_the_model_is_run(library, monkeypatch):
    monkeypatch.setattr(Unbuilt, "__module__", library)
    with pytest.raises(SiteError, match="CV116"):
        inject_crop_vote(Unbuilt().eval(), after="site", input_size=48)


def test_an_unstated_grid_is_asked_for():
    torch.manual_seed(0)
    model = Unstated().eval()
    with pytest.raises(SiteError, match="CV116"):
        inject_crop_vote(model, after="site", input_size=48)
    with pytest.raises(SiteError, match="CV113"):
        inject_crop_vote(model, after="site", layout=Tokens(6, 5), input_size=48)
    with pytest.raises(SiteError, match="CV113"):
        inject_crop_vote(model, after="front", layout=Tokens(6, 6), input_size=48)
    with pytest.raises(SiteError, match="CV113"):
        inject_crop_vote(model, after="site", layout="NHWC", input_size=48)
    with torch.no_grad():
        wanted = oracle.vote(oracle.tail_rows(model, "site", IMAGES, lambda x: cut(x, 0)), "soft")
    inject_crop_vote(model, after="site", layout=Tokens(6, 6))
    assert torch.allclose(model(IMAGES).double(), wanted, atol=1e-5)


FIXED = [
    (
        "beit_base_patch16_224",
        "blocks.0",
        "CV121",
    ),
    ("vit_relpos_small_patch16_224", "blocks.0", "CV121"),
    ("eva02_tiny_patch14_336", "blocks.0", "CV121"),
    ("mixer_s16_224", "blocks.0", "CV116"),
    ("xcit_nano_12_p16_224", "blocks.0", "CV116"),
    ("vit_tiny_patch16_224", "patch_embed", "CV121"),
    ("pit_ti_224", "transformers.0", "CV105"),
]


@pytest.mark.parametrize(("name", "site", "reason"), FIXED, ids=[f"{name}-{site}" for name, site, _ in FIXED])
def test_a_fixed_or_unknown_grid_is_refused(name, site, reason):
    small = {} if name.startswith(("xcit", "mixer", "pit")) else {"embed_dim": 24, "depth": 2, "num_heads": 2}
    model = timm.create_model(name, num_classes=7, **small).eval()
    with pytest.raises(SiteError, match=reason):
        inject_crop_vote(model, after=site)


def test_extra_arguments_keep_their_places():
    """xcit's blocks take (x, height, width), which the split must pass on; tested here with full-size views."""
    torch.manual_seed(0)
    model = timm.create_model("xcit_nano_12_p16_224", num_classes=7, img_size=64).eval()
    images = torch.randn(2, 3, 64, 64)
    grid = Tokens(4, 4)

    def flipped(x: Tensor) -> list[Tensor]:
        return [x, x.unflatten(1, (4, 4)).flip(2).flatten(1, 2)]

    with torch.no_grad():
        wanted = oracle.vote(oracle.tail_rows(model, "blocks.1", images, flipped), "soft")
    inject_crop_vote(model, after="blocks.1", views=hflip(), layout=grid, input_size=64)
    assert torch.allclose(model(images).double(), wanted, atol=1e-5)


@pytest.mark.parametrize("prefix", [0, 2])
def test_split_views_of_tokens(prefix):
    x = torch.randn(2, prefix + 36, 5, dtype=torch.float64, requires_grad=True)
    found = split_views(x, ten_crop(), layout=Tokens(6, 6, prefix))
    wanted = oracle.sample_major(cut(x, prefix))
    assert torch.equal(found, wanted)
    weights = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (found, wanted))
    assert torch.allclose(ours, theirs)


def test_a_layer_on_tokens():
    tail = nn.Sequential(nn.Linear(5, 7), nn.AdaptiveAvgPool2d((1, None)), nn.Flatten())
    layer = CropVote(tail, layout=Tokens(6, 6, prefix=1)).eval()
    x = torch.randn(2, 37, 5)
    assert torch.allclose(layer(x), torch.stack([tail(view) for view in cut(x, 1)]).mean(0), atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "layout", "message"),
    [
        ((2, 36, 5), Tokens(6, 6, 1), "CV211"),
        ((2, 5, 6, 6), Tokens(6, 6), "CV211"),
        ((2, 36, 5), Tokens(0, 6), "CV805"),
        ((2, 36, 5), Tokens(6.0, 6), "CV805"),
        ((2, 36, 5), (6, 6, 0), "CV805"),
        ((2, 9, 5), Tokens(3, 3), "CV206"),
    ],
)
def test_layouts_that_do_not_fit(shape, layout, message):
    with pytest.raises(CropVoteError, match=message):
        split_views(torch.zeros(shape), ten_crop(), layout=layout)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch.jit.trace itself
def test_tracing_would_freeze_the_grid():
    model = inject_crop_vote(networks.tokens(), after="blocks.0", input_size=48)
    with pytest.raises(SurgeryError, match="CV505"):
        torch.jit.trace(model, IMAGES)
