"""Which sites are accepted, and the reasons for refusing unusual models."""

from __future__ import annotations

import random
import threading
import time

import pytest
import timm
import torch
import torchvision
from torch import nn

import networks
from cropvote import CropVoteError, hflip, inject_crop_vote, remove_crop_vote, sites, ten_crop
from cropvote.errors import OptionError, PlainModelError, SiteError
from networks import IMAGES

AROUND = "CV101"
REFUSED = [
    (networks.fer, "layer1.0.conv1", AROUND),
    (networks.fer, "layer2.0.downsample", AROUND),
    (networks.fer, "layer1.0.relu", "CV103"),
    (networks.fer, "fc", "CV106"),
    (networks.fer, "avgpool", "CV206"),
    (networks.Gate, "site", AROUND),
    (networks.LogitSkip, "site", AROUND),
    (networks.Inplace, "act", AROUND),
    (networks.Alias, "site", AROUND),
    (networks.Buffered, "site", AROUND),
    (networks.LateAlias, "site", AROUND),
    (networks.Foreach, "site", AROUND),
    (networks.Branches, "site", AROUND),
    (networks.Branches, "other", AROUND),
    (networks.Twice, "site", "CV103"),
    (networks.Unused, "site", "CV104"),
    (networks.TupleSite, "site", "CV105"),
    (networks.Dense, "front", "CV124"),
    (networks.Squeezed, "front", "CV124"),
    (networks.Features, "front", "CV312"),
    (
        networks.OwnLoss,
        "front",
        "CV123",
    ),
    (
        networks.FixedTail,
        "site",
        "CV121",
    ),
]


@pytest.mark.parametrize("known", [True, False], ids=["input size known", "at the first call"])
@pytest.mark.parametrize(("make", "site", "reason"), REFUSED, ids=[f"{m.__name__}-{s}" for m, s, _ in REFUSED])
def test_refused(make, site, reason, known):
    """With a known size, the injection raises and changes nothing; otherwise every call raises."""
    model, images = make().eval(), IMAGES[:1, :, :12, :12]  # a batch of one hides a broadcast
    before = networks.snapshot(model)
    if known:
        with pytest.raises(CropVoteError, match=reason) as caught:
            inject_crop_vote(model, after=site, input_size=12)
    else:
        inject_crop_vote(model, after=site)
        for _ in range(2):
            with pytest.raises(CropVoteError, match=reason) as caught:
                model(images)
        remove_crop_vote(model)
    assert networks.same(networks.snapshot(model), before)
    message = str(caught.value)
    assert f"after={site!r}" in message
    if "the whole side" not in message and "the model returns" not in message:
        assert "alid sites: " in message or "No site of this" in message


def test_a_site_that_is_never_called_is_refused_if_v_divides_n():
    """Ten rows of ten images could be taken for the ten views of one."""
    model = inject_crop_vote(networks.Unused().eval(), after="site")
    with pytest.raises(SiteError, match="CV104"):
        model(torch.randn(10, 3, 12, 12))


def test_the_reason_names_valid_sites():
    with pytest.raises(SiteError, match=r"CV101.* input, conv1, bn1, relu, layer1\.0, layer1, layer2, layer3, "):
        inject_crop_vote(networks.fer(), after="layer1.0.conv1", input_size=24)


SLOW = [pytest.param(make, marks=pytest.mark.slow) for make in (networks.resnet, networks.fer)]


@pytest.mark.parametrize("make", [networks.timm_resnet, networks.plain, networks.Net, *SLOW])
def test_every_listed_site_is_a_cut_point(make):
    """With the site's output replaced by noise, the model's output does not depend on its input."""
    model = make().eval()
    found = [site for site in sites(model, 48) if site.name != "input"]
    assert found
    for site in found:
        noise = torch.randn(3, *site.shape)
        hook = model.get_submodule(site.name).register_forward_hook(lambda module, args, output, n=noise: n.clone())
        assert torch.equal(model(IMAGES), model(2 * IMAGES + 1)), site
        hook.remove()
        assert inject_crop_vote(model, after=site.name, input_size=48)(IMAGES).shape == (3, 7)
        remove_crop_vote(model)


@pytest.mark.parametrize(
    "make", [networks.fer, networks.plain, networks.Gate, networks.Branches, networks.Alias, networks.Inplace]
)
def test_no_cut_point_is_missed_and_none_invented(make):
    """The noise test agrees with the probe for every module that is called once and returns a map."""
    model = make().eval()
    rows = {site.name: site for site in sites(model, 48, views=hflip(), all=True)}
    assert set(rows) == {"input", *(name for name, _ in model.named_modules() if name)}
    for name, module in model.named_modules():
        if not name or not rows[name].shape or "called" in rows[name].reason or "(N, L, C)" in rows[name].reason:
            continue
        noise = torch.randn(3, *rows[name].shape)
        hook = module.register_forward_hook(lambda module, args, output, n=noise: n.clone())
        independent = torch.equal(model(IMAGES), model(2 * IMAGES + 1))
        hook.remove()
        if make in (networks.Alias, networks.Inplace) and rows[name].reason:
            continue  # noise in new memory cannot show an alias of the site's memory; refusing is right
        assert independent == (not rows[name].reason), rows[name]


def test_sites_are_listed_in_forward_order_once_per_tensor():
    rows = sites(networks.fer(), 48)
    names = [row.name for row in rows]
    assert names[:6] == ["input", "conv1", "bn1", "relu", "layer1.0", "layer1"]
    assert names[6:] == ["layer2.0", "layer2", "layer3.0", "layer3", "layer4.0", "layer4"]
    shapes = {row.name: row.shape for row in rows}
    assert shapes["layer1"] == (8, 48, 48)
    assert shapes["layer3"] == (32, 12, 12)
    assert {row.distinct for row in rows[:-2]} == {10}
    assert rows[-1].distinct == ten_crop().distinct(6, 6) == 8


@pytest.mark.parametrize("make", [networks.Noisy, networks.Seeding])
def test_sites_leaves_the_model_alone(make):
    torch.manual_seed(0)
    random.seed(0)
    model = make().train()
    before, python = networks.snapshot(model), random.getstate()
    sites(model, 24)
    inject_crop_vote(model, after="site", input_size=24)
    remove_crop_vote(model)
    assert networks.same(networks.snapshot(model), before)
    assert random.getstate() == python


@pytest.mark.parametrize("check", ["inject", "sites", "first call", "a new size, one image"])
def test_a_check_seeds_no_device(monkeypatch, check):
    """Otherwise every device's random numbers would come from one seed, whatever the user set."""
    model = networks.fer().train()
    images = torch.zeros(2, 3, 48, 48)
    if check == "a new size, one image":
        inject_crop_vote(model.eval(), after="layer1", input_size=24)
        images = images[:1]
    elif check == "first call":
        inject_crop_vote(model, after="layer1")
    torch.manual_seed(1234)
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    monkeypatch.setattr(torch.xpu, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    if check == "inject":
        inject_crop_vote(model, after="layer1", input_size=48)
    elif check == "sites":
        sites(model, 48)
    else:
        model(images)
    assert seeded == []
    assert torch.initial_seed() == 1234
    assert torch.equal(torch.get_rng_state(), before)


def test_numbers_drawn_by_other_threads_during_a_check_come_once():
    """A check that restored the state would give other threads the same numbers again."""
    drawn, done = [], threading.Event()

    def draw():
        while not done.is_set():
            drawn.append(float(torch.rand(())))
            time.sleep(0.001)

    thread = threading.Thread(target=draw)
    thread.start()
    inject_crop_vote(networks.fer(), after="layer1", input_size=48)
    done.set()
    thread.join()
    assert len(drawn) > 5
    assert len(set(drawn)) > len(drawn) - 2  # float32 numbers rarely meet by chance


def test_the_first_call_leaves_no_trace_of_its_check():
    """RNG, buffers and attributes after a checked first call equal those of a model checked before."""
    torch.manual_seed(0)
    early, late = (inject_crop_vote(networks.Noisy().eval(), after="site", input_size=size) for size in (48, None))
    late.load_state_dict(early.state_dict())
    torch.manual_seed(1)
    expected = early(IMAGES)
    torch.manual_seed(1)
    assert torch.equal(late(IMAGES), expected)
    assert late.calls == early.calls == 1
    assert late.last_shape == early.last_shape


def test_sites_without_a_size():
    with pytest.raises(OptionError, match="CV802"):
        sites(networks.fer())
    assert sites(timm.create_model("resnet18"))


def test_a_channels_last_map_is_recognised():
    """Mirroring its last axis would mirror the channels, and nothing would fail."""
    model = networks.ChannelsLast().eval()
    expected = model.fc(torch.stack([x.mean((1, 2)) for x in whole_and_mirrored(model)]).mean(0))
    assert {site.name: site.layout for site in sites(model, 12)} == {"input": "NCHW", "front": "NCHW", "site": "NHWC"}
    for size, layout in ((12, None), (12, "NHWC"), (None, None)):
        inject_crop_vote(model, after="site", views=hflip(), layout=layout, input_size=size)
        assert torch.allclose(model(IMAGES), expected, atol=1e-6)
        remove_crop_vote(model)
    with pytest.raises(SiteError, match="CV113"):
        inject_crop_vote(model, after="site", views=hflip(), layout="NCHW", input_size=12)


def whole_and_mirrored(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    map_ = model.site(model.front(IMAGES).permute(0, 2, 3, 1))
    return map_, map_.flip(2)


@pytest.mark.parametrize("make", [networks.FixedTail, networks.FixedBothEnds])
def test_a_fixed_tail_takes_whole_views_once_the_layout_is_known(make):
    """The front shows the layout, or it must be stated."""
    model = make().eval()
    images = torch.randn(2, 3, 12, 12)
    if make is networks.FixedBothEnds:
        with pytest.raises(SiteError, match="CV114"):
            inject_crop_vote(model, after="site", views=hflip(), input_size=12)
        inject_crop_vote(model, after="site", views=hflip(), layout="NCHW", input_size=12)
    else:
        inject_crop_vote(model, after="site", views=hflip(), input_size=12)
    found = model(images)
    remove_crop_vote(model)
    x = model.site(model.front(images))
    expected = (model.head(model.act(x)) + model.head(model.act(x.flip(3)))) / 2
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_path_that_opens_in_training_only_is_refused_there():
    model = inject_crop_vote(networks.LateGate().eval(), after="site", input_size=48)
    assert model(IMAGES).shape == (3, 7)
    for _ in range(2):
        with pytest.raises(SiteError, match=AROUND):
            model.train()(IMAGES[:1])
    with pytest.raises(SiteError, match=AROUND):
        inject_crop_vote(networks.LateGate().train(), after="site", input_size=48)


def test_an_inception_branch_is_refused_and_the_block_is_not():
    model = torchvision.models.googlenet(num_classes=7, init_weights=False).eval()
    with pytest.raises(SiteError, match=AROUND):
        inject_crop_vote(model, after="inception3a.branch1", input_size=96)
    inject_crop_vote(model, after="inception3a", input_size=96)


@pytest.mark.parametrize("run", ["compile", "export", "trace", "vmap", "fx"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch.jit.trace itself
def test_an_unchecked_model_refuses_to_be_traced(run):
    model = inject_crop_vote(networks.plain(), after="2")
    calls = {
        "compile": lambda: torch.compile(model, backend="eager", fullgraph=True)(IMAGES),
        "export": lambda: torch.export.export(model, (IMAGES,)),
        "trace": lambda: torch.jit.trace(model, (IMAGES,)),
        "vmap": lambda: torch.func.vmap(model)(IMAGES[None]),
        "fx": lambda: torch.fx.symbolic_trace(model),
    }
    # Where TorchDynamo traces, it wraps the error: compile always, export up to torch 2.6 or so.
    wrapped = torch._dynamo.exc.Unsupported
    refusal = {"compile": wrapped, "export": (wrapped, CropVoteError)}.get(run, CropVoteError)
    with pytest.raises(refusal, match=r"CV503|CV506"):
        calls[run]()
    assert model(IMAGES).shape == (3, 7)  # after one eager call, the rest works
    if run == "export" and torch.__version__ < "2.7":  # its strict export runs torch.nn's children by name
        with pytest.raises(wrapped, match="CV302"):
            calls[run]()
    elif run not in ("fx", "trace"):
        calls[run]()


def test_a_first_call_with_a_wrong_image_does_not_spoil_the_model():
    model = inject_crop_vote(networks.fer(), after="layer1")
    with pytest.raises(PlainModelError, match="CV414"):
        model(IMAGES[:, :1])
    assert model(IMAGES).shape == (3, 7)


def test_a_model_that_cannot_be_copied_says_so():
    class Locked(networks.Net):
        def __deepcopy__(self, memo):
            raise TypeError("no copies")

    with pytest.raises(PlainModelError, match="CV413"):
        inject_crop_vote(Locked(), after="site", input_size=12)


def test_a_child_used_twice_does_not_carry_the_split():
    """If a ReLU is in two Sequentials, the split goes to the Sequential, not to the ReLU."""
    relu = nn.ReLU()
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3), relu), nn.Sequential(nn.Conv2d(8, 8, 3), relu), nn.AdaptiveAvgPool2d(1)
    )
    model.extend([nn.Flatten(), nn.Linear(8, 7)])
    assert inject_crop_vote(model.eval(), after="0", input_size=24)(torch.randn(2, 3, 24, 24)).shape == (2, 7)
