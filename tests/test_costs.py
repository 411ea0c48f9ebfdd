"""Costs per site, against the paper's Table 2, manual counts, real tensors and PyTorch's memory profiler."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import networks
from cropvote import (
    CropVoteError,
    five_crop,
    hflip,
    inject_crop_vote,
    profile,
    settings,
    sites,
)
from cropvote.errors import InputTypeError, OptionError, SiteError, ViewsError
from model import fer_resnet18

#: (image side, site): GMACs and MB of the forward pass, from Table 2 of the paper.
TABLE_2 = {
    (40, "baseline"): (0.87, 7.00),
    (48, "baseline"): (1.26, 10.08),
    (48, "layer1"): (6.66, 40.34),
    (48, "layer2"): (4.85, 23.34),
    (48, "layer3"): (3.05, 14.84),
}


@pytest.fixture(scope="module")
def paper():
    model = fer_resnet18()
    found = {side: profile(model, (3, side, side), sites=["layer1", "layer2", "layer3"]) for side in (40, 48)}
    return {(side, row.site): row for side, table in found.items() for row in table}


@pytest.mark.parametrize("row", TABLE_2)
def test_the_papers_table_2(paper, row):
    gmacs, megabytes = TABLE_2[row]
    assert paper[row].gmacs == pytest.approx(gmacs, rel=0.01)
    assert paper[row].train_memory_mib == pytest.approx(megabytes, rel=0.005)
    assert paper[row].parameters == 11_172_423


def test_ten_crops_of_the_input_cost_ten_small_images(paper):
    small = paper[40, "baseline"]
    assert paper[48, "input"].gmacs == pytest.approx(10 * small.gmacs, rel=1e-9)
    assert paper[48, "input"].train_memory_mib == pytest.approx(10 * small.train_memory_mib, rel=1e-3)


def test_the_page_has_these_figures(paper):
    page = (Path(__file__).parents[1] / "docs" / "method.md").read_text()
    lines = page[page.rindex("| ten views after | GMACs") :].splitlines()[2:6]
    for line, site in zip(lines, ("baseline", "layer1", "layer2", "layer3"), strict=True):
        row, few = paper[48, site], paper[48, site].gmacs_by_views
        figures = [f"{row.gmacs:.3f}", f"{TABLE_2[48, site][0]:.2f}"]
        figures += [f"{row.train_memory_mib:.2f}", f"{TABLE_2[48, site][1]:.2f}"]
        figures += [f"{few[1]:.3f}", f"{few[2]:.3f}"] if few else ["", ""]
        assert [cell.strip() for cell in line.strip("|").split("|")][1:] == figures


class Counted(nn.Module):
    """Two convolutions whose multiply-adds can be counted manually."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Conv2d(3, 8, 3, padding=1)
        self.tail = nn.Conv2d(8, 16, 3, padding=1, stride=2)
        self.fc = nn.Linear(16, 7)

    def forward(self, x):
        return self.fc(self.tail(self.front(x)).mean((2, 3)))


def test_against_a_manual_count():
    table = profile(Counted(), 24)
    front, tail, fc = 24 * 24 * 8 * 27, 12 * 12 * 16 * 72, 16 * 7
    cut = 10 * 10 * 16 * 72  # the tail on a view of 20 x 20
    assert [row.site for row in table] == ["baseline", "input", "front", "tail"]
    assert table["baseline"].gmacs * 1e9 == front + tail + fc
    assert table["front"].gmacs * 1e9 == front + 10 * (cut + fc)
    assert table["front"].gmacs_by_views == {n: (front + n * (cut + fc)) / 1e9 for n in (1, 2, 5, 10)}
    assert table["front"].tail_share == pytest.approx((tail + fc) / (front + tail + fc))
    assert table["front"].shape == (8, 24, 24)
    # autograd saves, in float32: the images (for front's weight), the views (for tail's), and fc's input
    kept = 4 * (3 * 24 * 24 + 10 * (8 * 20 * 20 + 16))
    assert table["front"].train_memory_mib * 2**20 == kept
    # alive at once: the images, the front's map and the views; then the views and the tail's output
    made = 4 * max(3 * 24 * 24 + 8 * 24 * 24 + 10 * 8 * 20 * 20, 3 * 24 * 24 + 10 * (8 * 20 * 20 + 16 * 10 * 10))
    assert table["front"].inference_peak_mib * 2**20 == made


class OnceACall(nn.Module):
    """Work independent of the batch size: a table of biases, computed in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Conv2d(3, 8, 3, padding=1)
        self.table = nn.Linear(64, 64)
        self.fc = nn.Linear(8, 7)

    def forward(self, x):
        x = self.front(x).mean((2, 3))
        return self.fc(x + self.table(torch.ones(200, 64)).mean())


@pytest.mark.parametrize(
    ("make", "site"), [(networks.fer, "layer2"), (OnceACall, "front"), (networks.tokens, "blocks.0")]
)
def test_fewer_views_cost_what_the_live_model_does(make, site):
    row = profile(make().eval(), 48, sites=[site])[site]
    for count, gmacs in row.gmacs_by_views.items():
        model = inject_crop_vote(make().eval(), after=site, input_size=48, eval_views=list(range(count)))
        # attention as two matrix products, which every PyTorch version counts
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 3, 48, 48))
        assert gmacs == pytest.approx(counter.get_total_flops() / 2e9, rel=1e-12)


def kept_bytes(model: nn.Module, batch: int) -> int:
    """Return the bytes that autograd saves for real tensors."""
    fixed = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in fixed:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = model(torch.randn(batch, 3, 48, 48))
    assert output.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("site", ["baseline", "input", "layer1", "layer3"])
def test_training_memory_is_that_of_real_tensors(site):
    row = profile(networks.fer(), 48, sites=[site] if site not in ("baseline", "input") else [])[site]
    model = networks.fer()
    if site != "baseline":
        inject_crop_vote(model, after=site, input_size=48)
    model.train()
    assert row.train_memory_mib == pytest.approx((kept_bytes(model, 6) - kept_bytes(model, 2)) / 4 / 2**20, rel=1e-9)


def frozen_front() -> nn.Module:
    model = networks.fer()
    for part in (model.conv1, model.bn1, model.layer1):
        part.requires_grad_(False)
    return model


def test_a_frozen_front_keeps_nothing():
    whole, frozen = (profile(make(), 48, sites=["layer1"])["layer1"] for make in (networks.fer, frozen_front))
    assert frozen.train_memory_mib < whole.train_memory_mib
    model = inject_crop_vote(frozen_front(), after="layer1", input_size=48).train()
    real = (kept_bytes(model, 6) - kept_bytes(model, 2)) / 4 / 2**20
    assert frozen.train_memory_mib == pytest.approx(real, rel=1e-9)


class Pointwise(nn.Module):
    """Linear layers on a map's channels, which need no workspace."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.middle, self.tail = nn.Linear(3, 32), nn.Linear(32, 16), nn.Linear(16, 24)
        self.act, self.fc = nn.GELU(), nn.Linear(24, 7)

    def forward(self, x):
        x = self.act(self.front(x.permute(0, 2, 3, 1)))
        return self.fc(self.tail(self.act(self.middle(x)) + 1).mean((1, 2)))


@pytest.mark.parametrize("site", ["baseline", "front", "middle", "tail"])
def test_the_peak_is_that_of_pytorchs_memory_profiler(site):
    """The profiler sees every allocation and release of a real run."""
    row = profile(Pointwise(), 48, sites=[site] if site != "baseline" else [])[site]
    model = Pointwise().eval()
    if site != "baseline":
        inject_crop_vote(model, after=site, input_size=48, eval_output="views")  # leave out the vote's memory
    images = torch.zeros(1, 3, 48, 48)
    with torch.no_grad():
        model(images)
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            model(images)
    now = peak = 4 * images.numel()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert row.inference_peak_mib * 2**20 == pytest.approx(peak, rel=0.01)


# ---- what it profiles ------------------------------------------------------------------------------------------------


STAGES = {
    "resnet18": ["act1", "maxpool", "layer1", "layer2", "layer3", "layer4"],
    "mobilenetv3_small_050": ["bn1", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "blocks.4", "blocks"],
    "convnext_atto": ["stem", "stages.0", "stages.1", "stages.2", "stages"],
    "vit_tiny_patch16_224": ["pos_drop", "blocks.0", "blocks.1", "norm"],
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "resnet18" else pytest.mark.slow) for name in STAGES]
)
def test_the_stages_are_listed_by_default(name):
    model = timm.create_model(name, **({"depth": 3} if name.startswith("vit") else {})).eval()
    assert [row.site for row in profile(model, views="five") if row.site not in ("baseline", "input")] == STAGES[name]


def test_aligned_views_cost_what_they_cost_in_a_model():
    model = networks.fer()
    table = profile(model, 40, sites=["layer2", {"input": hflip(), "layer2": five_crop()}], views="five", align=True)
    stride = settings(inject_crop_vote(networks.fer(), "layer2", views="five", input_size=40, align=True)).views.stride
    by_hand = profile(model, 40, sites=["layer2"], views=five_crop().aligned(stride))
    assert stride == 4
    assert table["input"].ratio < profile(model, 40, sites=["layer2"], views="five")["input"].ratio  # aligned, too
    assert table["layer2"] == by_hand["layer2"] != profile(model, 40, sites=["layer2"], views="five")["layer2"]
    assert "five aligned to 4" in table.rows[-1].site
    assert "5 views aligned to the stride behind each site, per image" in str(table)
    assert table.to_dict()["align"]
    with pytest.raises(ViewsError, match="CV214"):
        profile(networks.fer(), 8, sites=["layer1"], align=True)


def test_sites_where_views_change_little_are_named():
    notes = str(profile(networks.fer(), 48, sites=["layer1", "layer4"]))
    assert "Less than 1 % of the work is behind layer4: views change little there" in notes
    assert "on the small map of layer4" in notes


def test_every_valid_site_has_a_row_and_the_model_is_unchanged():
    model = networks.fer()
    before = networks.snapshot(model)
    table = profile(model, 48, every_site=True)
    assert [row.site for row in table] == ["baseline", *[site.name for site in sites(model, 48)]]
    assert [row.distinct for row in table][1:] == [site.distinct for site in sites(model, 48)]
    assert networks.same(networks.snapshot(model), before)


@pytest.mark.slow
def test_without_weights_and_with_the_models_own_size():
    try:
        with torch.device("meta"):
            empty = timm.create_model("vit_tiny_patch16_224", num_classes=7)
    except RuntimeError as error:
        pytest.skip(f"timm {timm.__version__} computes numbers while it builds a model: {error}")
    full = timm.create_model("vit_tiny_patch16_224", num_classes=7)
    names = ["patch_embed", "blocks.0", "blocks.11"]
    rows = [profile(model, sites=names[1:]) for model in (empty, full)]
    for a, b in zip(*rows, strict=True):
        assert a.gmacs == pytest.approx(b.gmacs, rel=1e-9)
    assert rows[1].input_size == (3, 224, 224)
    assert rows[1]["baseline"].gmacs == pytest.approx(1.2537, rel=1e-3)  # timm's own figure is 1.3


def test_an_injected_model_is_profiled_as_the_plain_one():
    model = inject_crop_vote(networks.fer(), after="layer1", input_size=48)
    assert profile(model, 48, sites=["layer2"]).to_dict() == profile(networks.fer(), 48, sites=["layer2"]).to_dict()
    assert model(torch.zeros(1, 3, 48, 48)).shape == (1, 7)


def test_other_views():
    table = profile(networks.fer(), 48, sites=["layer1"], views=hflip())
    assert sorted(table["layer1"].gmacs_by_views) == [1, 2]
    assert table["layer1"].ratio < 2
    assert profile(networks.fer(), 48, sites=["layer1"], views=five_crop())["layer1"].distinct == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_size": 48, "sites": ["layer9"]}, "CV153"),
        ({"input_size": 48, "sites": ["layer1.0.conv1"]}, "CV101.*input"),
        ({}, "CV802"),
        ({"input_size": -1}, "CV804"),
        ({"input_size": 48, "views": 10}, "CV806"),
        ({"input_size": 48, "sites": [], "measure": True, "rounds": 0}, "CV824"),
    ],
)
def test_invalid_profile_arguments(arguments, message):
    with pytest.raises(CropVoteError, match=message):
        profile(networks.fer(), **arguments)
    with pytest.raises(InputTypeError, match="CV801"):
        profile("resnet18", 48)


@pytest.mark.slow
def test_milliseconds():
    model = networks.fer()
    before = networks.snapshot(model)
    table = profile(model, 48, sites=["layer1", "layer3"], measure=True, batch=2, rounds=2)
    assert all(row.milliseconds > 0 for row in table)
    assert networks.same(networks.snapshot(model), before)
    assert str(table).splitlines()[2].endswith("ms")
    with torch.device("meta"):
        empty = fer_resnet18(width=8)
    with pytest.raises(OptionError, match="CV826"):
        profile(empty, 48, sites=[], measure=True)


# ---- output formats --------------------------------------------------------------------------------------------------


def test_text_markdown_and_json_say_the_same(tmp_path):
    table = profile(networks.fer(), 48, sites=["layer1", "layer2"])
    text, markdown, data = str(table).splitlines(), table.to_markdown().splitlines(), table.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert [row["site"] for row in data["rows"]] == ["baseline", "input", "layer1", "layer2"]
    assert {"gmacs", "train_memory_mib", "inference_peak_mib", "parameters", "tail_share"} <= set(data["rows"][0])
    for line, row in zip(text[3:7], table, strict=True):
        assert line.split()[0] == row.site
        assert f"{row.gmacs:.3f}" in line.split()
    assert len({line.rindex("176,207") for line in text[3:7]}) == 1  # in columns
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown[2:8]]
    assert len({len(line) for line in cells}) == 1
    assert cells[0][0] == "site"
    for name in ("cost.png", "cost.svg"):
        table.plot(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 3000
    with pytest.raises(OptionError, match="CV842"):
        table.plot(tmp_path / "cost.xyz")
    with pytest.raises(OptionError, match="CV822"):
        table["layer9"]


def test_a_network_without_multiply_adds_has_no_ratio():
    table = profile(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), 48)
    assert table["input"].ratio != table["input"].ratio
    assert json.loads(json.dumps(table.to_dict(), allow_nan=False))["rows"][1]["ratio"] is None


def test_no_site_at_all_says_why():
    with pytest.raises(SiteError, match="CV150"):
        profile(timm.create_model("resnet10t", features_only=True), 64)


def test_a_plan_costs_the_sum_of_its_parts():
    """In the paper's network, the front runs once, the middle twice, the tail ten times on 5/6 of the side."""
    two = {"layer1": hflip(), "layer3": five_crop()}
    table = profile(networks.fer(), 48, sites=["layer1", two])
    row = table["layer1=hflip,layer3=five"]

    def macs(part: nn.Module, x: torch.Tensor) -> tuple[float, torch.Tensor]:
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter, torch.no_grad():
            out = part(x)
        return counter.get_total_flops() / 2e9, out

    model = networks.fer()
    front, x = macs(nn.Sequential(model.conv1, model.bn1, model.relu, model.layer1), torch.zeros(1, 3, 48, 48))
    middle, x = macs(nn.Sequential(model.layer2, model.layer3), x)
    tail, _ = macs(nn.Sequential(model.layer4, model.avgpool, nn.Flatten(), model.fc), x[:, :, :10, :10])
    assert row.gmacs == pytest.approx(front + 2 * middle + 10 * tail)
    assert row.gmacs_by_views == pytest.approx(
        {1: front + middle + tail, 2: front + 2 * (middle + tail), 10: row.gmacs}
    )
    assert row.distinct == 10
    assert row.ratio == pytest.approx(row.gmacs / table["baseline"].gmacs)
    live = inject_crop_vote(networks.fer(), after=two, input_size=48).eval()
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter, torch.no_grad():
        live(torch.randn(1, 3, 48, 48))
    assert row.gmacs == pytest.approx(counter.get_total_flops() / 2e9)
    assert table["baseline"].train_memory_mib < row.train_memory_mib < table["layer1"].train_memory_mib
    timed = profile(networks.fer(), 48, sites=[two], measure=True, batch=1, rounds=1)
    assert timed["layer1=hflip,layer3=five"].milliseconds > 0


def test_the_docs_table_is_that_of_the_profile():
    """Compare docs/beyond.md with profile(fer_resnet18(), 48), figure by figure."""
    text = (Path(__file__).parents[1] / "docs" / "beyond.md").read_text()
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith(("| `", "| – (plain)"))
    ]
    known = {"hflip": hflip, "five": five_crop}
    plans = {row[0].strip("`"): None for row in rows[1:]}
    for name in plans:
        parts = [part.split("=") for part in name.split(",")]
        plans[name] = {site: known[views[0]]() for site, *views in parts} if "=" in name else name
    table = profile(fer_resnet18(), 48, sites=list(plans.values()))
    assert len(rows) == 5
    for name, row in zip(["baseline", *plans], rows, strict=True):
        cost = table[name]
        few = f"{cost.gmacs_by_views[2]:.3f}" if name != "baseline" else ""
        found = (f"{cost.gmacs:.3f}", f"{cost.ratio:.2f}", few, f"{cost.train_memory_mib:.2f}")
        assert found == tuple(row[1:])
