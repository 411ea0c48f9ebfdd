"""Every family of timm and torchvision, some of transformers: the verdicts of benchmarks/zoo.py, and its two checks.

The stored results say which sites work; the sweep compared each with an oracle and with noise.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import timm
import torch
from torch import nn

import zoo_models
import zoo_page
from cropvote import inject_crop_vote, sites, ten_crop
from cropvote.errors import SiteError
from cropvote.images import example_of
from cropvote.probe.fakes import on_fake_copy
from cropvote.probe.trace import record_trace
from cropvote.probe.verdicts import Site, judge_site
from zoo_witnesses import against_noise, against_oracle

pytestmark = pytest.mark.filterwarnings("ignore")  # from the models' own code


STORED = json.loads(zoo_page.RESULTS.read_text())
FAMILIES = {result["family"]: result["models"][0] for result in STORED["families"]}
DOZEN = [
    "timm/convnext", "timm/dla", "timm/efficientnet", "timm/ghostnet", "timm/metaformer", "timm/mobilenetv3",
    "timm/regnet", "timm/resnetv2", "timm/swin_transformer", "timm/vision_transformer", "timm/vovnet",
    "torchvision/googlenet", "torchvision/squeezenet", "transformers/ConvNext", "transformers/ViT",
]  # fmt: skip


#: Entries of feature_info that are not sites: (model, module, reason).
REFUSED = [
    ("coat_tiny", "serial_blocks1", "CV104"),
    ("coat_tiny", "parallel_blocks", "CV104"),
    ("hrnet_w18_small", "stage2", "CV105"),
    ("selecsls42", "features.1", "CV105"),
    ("dla34", "level2", "CV121"),
    ("xception65", "blocks.1.stack.act3", "CV101"),
    ("nasnetalarge", "reduction_cell_0.conv_1x1.act", "CV101"),
    ("gcvit_xxtiny", "stages.1", "CV121"),
    ("visformer_tiny", "stage1", "CV121"),
    ("coatnet_nano_rw_224", "stages.1", "CV121"),
    ("maxvit_rmlp_pico_rw_256", "stages.1", "CV121"),
    ("efficientformer_l1", "stages.1", "CV121"),
]


LARGE = ("coatnet", "efficientformer", "gcvit", "maxvit", "nasnet", "visformer")
CASES = [pytest.param(*case, marks=[pytest.mark.slow] * case[0].startswith(LARGE)) for case in REFUSED]


@pytest.mark.parametrize(("name", "site", "reason"), CASES, ids=[f"{name}-{site}" for name, site, _ in REFUSED])
def test_invalid_sites_are_refused_with_the_reason_and_the_valid_ones(name, site, reason):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=7).eval()
    with pytest.raises(SiteError, match=reason) as caught:
        inject_crop_vote(model, after=site)
    assert "Valid sites: " in str(caught.value) or "No site of this" in str(caught.value)


def build(family: str, fake: bool) -> nn.Module:
    known = FAMILIES[family]
    torch.manual_seed(0)
    if fake:
        try:
            with torch.device("meta"):
                return zoo_models.make(family, known["model"], known["small"]).eval()
        except Exception:  # some constructors need values, which meta tensors do not have
            torch.manual_seed(0)
    return zoo_models.make(family, known["model"], known["small"]).eval()


def look(model: nn.Module, family: str) -> dict[str, Site]:
    """Return only the sites of feature_info, because sites(all=True) would take too long."""
    known = FAMILIES[family]

    def judge(fake: nn.Module) -> dict[str, Site]:
        trace = record_trace(fake, example_of(model, tuple(known["size"])))
        return {name: judge_site(trace, name, ten_crop()) for name in tried(family) if name in trace.modules}

    return on_fake_copy(model, judge)


def tried(family: str, most: int = 16) -> list[str]:
    """Return all entries of feature_info, or else an even sample of the modules that the sweep tried."""
    names = list(FAMILIES[family]["tried"])
    return names if family.startswith("timm/") else names[:: -(-len(names) // most)]


def works(known: dict[str, Any]) -> set[str]:
    return {site for site, verdict in known["tried"].items() if verdict["verdict"] == "works"}


#: Every eighth family is tested here (but for maxvit, which is large), the others in the slow tests.
VERDICTS = [
    pytest.param(f, marks=[pytest.mark.slow] * bool(i % 8 or f.endswith("maxvit"))) for i, f in enumerate(FAMILIES)
]


@pytest.mark.parametrize("family", VERDICTS)
def test_verdicts_on_fake_tensors(family):
    """At every entry of feature_info, the verdict equals the stored one, and every refusal has a reason."""
    known = FAMILIES[family]
    rows = look(build(family, fake=True), family)
    assert {name for name, site in rows.items() if not site.reason} == works(known).intersection(tried(family))
    assert set(tried(family)).difference(rows) == {n for n, v in known["tried"].items() if "no module" in v["reason"]}


def assert_judged_right(family: str, whole: bool) -> None:
    """Compare votes with the oracle in float64, and verdicts (of all modules, or of the feature sites) with noise."""
    known, size = FAMILIES[family], tuple(FAMILIES[family]["size"])
    model = zoo_models.randomise(build(family, fake=False)).eval()
    zoo_models.calibrate(model, size)
    rows = {site.name: site for site in sites(model, size, all=True)} if whole else look(model, family)
    listed = [name for name in known["listed"] if name in rows]
    assert not any(rows[name].reason for name in listed)
    first = [name for name in listed if name in works(known)][:1]
    with torch.no_grad():
        errors, alike = against_oracle(model.double(), size, rows, listed, first, 2 if whole else 1)
        noise = against_noise(model, size, rows, 5 if whole else 2)
    assert max(errors.values(), default=0) < 1e-5, errors
    assert len(alike) < len(errors) or not errors  # otherwise the oracle would prove nothing
    assert not noise["invented"]


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[pytest.mark.slow] * bool(i % 4)) for i, f in enumerate(DOZEN)]
)
def test_a_dozen_against_the_oracle_and_noise(family):
    assert_judged_right(family, whole=False)


@pytest.mark.zoo
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in DOZEN])
def test_all_others_against_the_oracle_and_noise(family):
    assert_judged_right(family, whole=True)


TOKENS = [f for f, known in FAMILIES.items() if any(v.get("layout") == "tokens" for v in known["tried"].values())]


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[pytest.mark.slow] * bool(i % 4)) for i, f in enumerate(TOKENS)]
)
def test_tokens_are_at_the_positions_of_their_patches(family):
    """The gradient of token (row, column) of the stated grid is largest at that image patch."""
    known, model = FAMILIES[family], build(family, fake=False)
    site = next(site for site, verdict in known["tried"].items() if verdict.get("layout") == "tokens")
    layout = look(model, family)[site].layout
    caught = []
    model.get_submodule(site).register_forward_hook(lambda module, args, output: caught.append(output))
    images = torch.randn(1, *known["size"], requires_grad=True)
    model(images)
    height, width = layout.height, layout.width
    for row, column in [(0, 0), (0, width - 1), (height // 2, 1), (height - 1, width // 3)]:
        token = caught[0][:, layout.prefix + width * row + column]
        (grad,) = torch.autograd.grad(token.square().sum(), images, retain_graph=True)
        patches = torch.nn.functional.adaptive_avg_pool2d(grad.abs().sum(1), (height, width))
        found = divmod(int(patches.argmax()), width)
        assert max(abs(found[0] - row), abs(found[1] - column)) <= 1  # after convolutions, a neighbour's may be larger


def test_no_result_is_a_crash_or_wrong():
    """Check the stored results, the page, and that no family of the swept versions is missing."""
    page = zoo_page.PAGE.read_text()
    for row in (
        "| crashed | 0 |",
        "| wrong | 0 |",
        "| accepted, but not valid sites according to the noise tests | 0 |",
    ):
        assert row in page
    assert page == zoo_page.page(STORED, zoo_page.tools()), "run: python benchmarks/zoo.py --table"
    if STORED["versions"] == zoo_page.versions():
        assert zoo_models.families() == list(FAMILIES)
