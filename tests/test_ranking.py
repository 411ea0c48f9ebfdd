"""rank_sites: candidates on validation data, against manual injections and SciPy's binomial test."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

import networks
from cropvote import Views, five_crop, hflip, inject_crop_vote, profile
from cropvote.cli import main
from cropvote.errors import InputTypeError, OptionError, SiteError
from cropvote.folders import read_folder
from cropvote.ranking import RankedSites, Ranking, mcnemar, rank_sites

DATA = [(torch.randn(n, 3, 48, 48, generator=torch.Generator().manual_seed(n)), torch.arange(n) % 7) for n in (9, 7, 4)]
PLAN = {"input": hflip(), "layer2": five_crop()}


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (5, 5), (9, 1), (1, 9), (40, 60), (900, 1000), (0, 30), (200, 0)])
def test_the_test_is_mcnemars(won, lost):
    wanted = scipy.stats.binomtest(won, won + lost).pvalue if won + lost else 1.0
    assert mcnemar(won, lost) == pytest.approx(wanted, rel=1e-9)


def test_scores_match_manual_injections():
    model = networks.fer()
    before = networks.snapshot(model)
    five = {"layer2": five_crop()}  # the first half of PLAN's views
    seen: list[torch.Tensor] = []
    outputs = rank_sites(model, DATA, ["layer3", PLAN, five], metric=lambda y, _: seen.append(y) or 0.0, progress=False)
    for rows, name in zip(seen[1:], ("layer3", PLAN, five), strict=True):
        voting = inject_crop_vote(networks.fer(), after=name, input_size=48)
        assert torch.allclose(rows, torch.cat([voting(images) for images, _ in DATA]), atol=1e-5)
    assert [row.score for row in outputs.rows] == [0.0] * 4
    ranking = rank_sites(model, DATA, ["layer3", PLAN, five], progress=False)
    assert networks.same(networks.snapshot(model), before)
    truth = torch.cat([targets for _, targets in DATA])
    plain = torch.cat([networks.fer()(images).argmax(1) for images, _ in DATA]) == truth
    names = {"layer3=ten": "layer3", "input=hflip,layer2=five": PLAN, "layer2=five": five}
    assert ranking.samples == 20
    assert ranking.rows[0] == RankedSites("plain", {}, plain.double().mean().item(), 0, 0, 1.0, 1.0)
    assert {row.name for row in ranking.rows[1:]} == set(names)
    for name, after in names.items():
        voting = inject_crop_vote(networks.fer(), after=after, input_size=48)
        hits = torch.cat([voting(images).argmax(1) for images, _ in DATA]) == truth
        row = ranking[name]
        assert row.score == hits.double().mean().item()
        assert (row.won, row.lost) == (int((hits & ~plain).sum()), int((plain & ~hits).sum()))
        assert ranking.compare(name, "plain") == (row.won, row.lost, row.p)
        assert row.work == pytest.approx(list(profile(networks.fer(), 48, sites=[after]))[-1].ratio)
    scores = [row.score for row in ranking.rows[1:]]
    assert scores == sorted(scores, reverse=True)


def test_the_default_candidates_are_aligned_and_tried_with_the_mirrored_input():
    ranking = rank_sites(networks.fer(), DATA, progress=False)
    names = {row.name for row in ranking.rows}
    assert {"plain", "input=hflip", "layer2=five aligned to 4", "input=hflip,layer2=five aligned to 4"} <= names
    assert all(row.name.startswith(("input=hflip", "plain")) or "input" not in row.name for row in ranking.rows)


def test_a_custom_metric():
    def least_loss(outputs: torch.Tensor, targets: torch.Tensor) -> float:
        assert outputs.shape == targets.shape == (20, 7)
        return -torch.nn.functional.binary_cross_entropy_with_logits(outputs, targets).item()

    labels = [(images, torch.nn.functional.one_hot(targets, 7).float()) for images, targets in DATA]
    ranking = rank_sites(networks.fer(), labels, [{"input": hflip()}], metric=least_loss, progress=False)
    assert ranking.metric == "least_loss"
    assert ranking.best is None
    with torch.no_grad():
        outputs = torch.cat([networks.fer()(images) for images, _ in DATA])
    assert ranking.rows[0].score == pytest.approx(least_loss(outputs, torch.cat([y for _, y in labels])), rel=1e-5)


def made(right: dict[str, int], work: dict[str, float]) -> Ranking:
    """Return a ranking on 100 samples; each row gets its first ``right`` samples right."""
    hits = {name: torch.arange(100) < count for name, count in right.items()}
    base = hits["plain"]
    rows = []
    for name, own in hits.items():
        won, lost = int((own & ~base).sum()), int((base & ~own).sum())
        chosen = {} if name == "plain" else {name: hflip()}
        rows.append(RankedSites(name, chosen, right[name] / 100, won, lost, mcnemar(won, lost), work[name]))
    return Ranking(rows, hits, 100, "accuracy")


def test_the_best_beats_everything_cheaper():
    work = {"plain": 1.0, "input": 2.0, "layer1": 5.0}
    assert made({"plain": 50, "input": 52, "layer1": 53}, work).best is None
    assert made({"plain": 50, "input": 60, "layer1": 63}, work).best == {"after": {"input": hflip()}}
    assert made({"plain": 50, "input": 60, "layer1": 70}, work).best == {"after": {"layer1": hflip()}}
    assert made({"plain": 50, "input": 40, "layer1": 30}, work).best is None
    lucky = {"plain": 50, "input": 57, **{f"layer{i}": 50 for i in range(4)}}  # p 0.016, the best of five
    assert made(lucky, dict.fromkeys(lucky, 1.0)).best is None
    assert made({"plain": 50, "input": 57}, work).best == {"after": {"input": hflip()}}
    assert "inject_crop_vote(model, after={'input': hflip()})" in made({"plain": 50, "input": 60}, work).advice()
    assert "leave it as it is" in made({"plain": 50, "input": 40, "layer1": 30}, work).advice()
    assert "Use input=" in str(made({"plain": 50, "input": 60, "layer1": 63}, work)) or "Use input" in str(
        made({"plain": 50, "input": 60, "layer1": 63}, work)
    )


@pytest.mark.parametrize(
    ("data", "options", "kind", "code"),
    [
        ([], {}, OptionError, "CV860"),
        ([(torch.randn(2, 3, 48, 48), torch.rand(2, 7))], {}, OptionError, "CV861"),
        ([torch.randn(2, 3, 48, 48)], {}, InputTypeError, "CV862"),
        ([(torch.randn(2, 3, 48, 48), torch.arange(3))], {}, InputTypeError, "CV862"),
        (DATA, {"candidates": ["layer1.0.conv1"]}, SiteError, "CV101"),
    ],
)
def test_misuse(data, options, kind, code):
    with pytest.raises(kind, match=code):
        rank_sites(networks.fer(), data, progress=False, **options)


@pytest.fixture
def folder(tmp_path):
    """Write two classes of six pictures, and the weights of a network for two classes."""
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(6):
            picture = generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(picture).save(tmp_path / "data" / name / f"{i}.png")
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=2)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "model.pt")
    return tmp_path


def test_the_command(folder, capsys, monkeypatch):
    asked = ["rank", "torchvision:resnet18", "--size", "32", "--data", str(folder / "data"), "--batch", "5"]
    tables = []
    for file in ("model.safetensors", "model.pt"):
        more = ["--checkpoint", str(folder / file), "--try", "input=hflip", "--try", "layer1=five", "--json"]
        assert main([*asked, *more, "--plot", str(folder / "ranking.png")]) == 0
        tables.append(json.loads(capsys.readouterr().out))
    assert tables[0] == tables[1]
    assert tables[0]["samples"] == 12
    assert {row["name"] for row in tables[0]["rows"]} == {"plain", "input=hflip", "layer1=five"}
    assert (folder / "ranking.png").stat().st_size > 3000
    assert tables[0]["data"].startswith(f"12 pictures of {folder / 'data'}, 32×32, less mean 0.485, 0.456, 0.406, over")
    own = [*asked, "--checkpoint", str(folder / "model.pt"), "--try", "input=hflip", "--mean", "0.5", "0.4", "0.3"]
    assert main([*own, "--std", "0.2", "0.2", "0.2"]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("less mean 0.5, 0.4, 0.3, over std 0.2, 0.2, 0.2")
    for wrong in (["0.2"], ["0.2", "0.2", "0"], ["0.2", "0.2", "nan"]):
        assert main([*own, "--std", *wrong]) == 2
        assert "CV911" in capsys.readouterr().err
    assert main([*asked, "--try", "layer1=seven"]) == 2
    assert "CV901" in capsys.readouterr().err
    assert main([*asked, "--checkpoint", str(folder / "data" / "cat" / "0.png")]) == 2
    assert "CV908" in capsys.readouterr().err
    (folder / "empty").mkdir()
    assert main([*asked[:4], "--data", str(folder / "empty")]) == 2
    assert "CV909" in capsys.readouterr().err
    (folder / "ownnet.py").write_text("import torchvision\n\ndef build():\n    return torchvision.models.resnet18()\n")
    monkeypatch.chdir(folder)
    assert main(["rank", "ownnet:build", *asked[2:], "--limit", "3"]) == 2
    assert "CV910" in capsys.readouterr().err


def test_a_checkpoint_runs_no_code(folder, capsys):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch pwned",)

    torch.save({"state_dict": Evil()}, folder / "evil.pt")
    asked = ["rank", "torchvision:resnet18", "--size", "32", "--data", str(folder / "data")]
    done = subprocess.run(
        [sys.executable, "-m", "cropvote.cli", *asked, "--checkpoint", "evil.pt"], cwd=folder, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "CV908" in done.stderr
    assert not (folder / "pwned").exists()


def test_candidates_that_read_the_same_are_kept_apart():
    """Both have four views of the same size, at different positions."""
    one, two = Views([(0, 0), (0, 1), (1, 0), (1, 1)]), Views([(0.5, 0), (0.5, 1), (0, 0.5), (1, 0.5)])
    ranking = rank_sites(networks.fer(), DATA, [{"layer2": one}, {"layer2": two}], progress=False)
    assert len({row.name for row in ranking.rows}) == 3
    for row in ranking.rows[1:]:
        alone = rank_sites(networks.fer(), DATA, [row.sites], progress=False).rows[1]
        assert (row.score, row.won, row.lost) == (alone.score, alone.won, alone.lost)
        assert ranking.compare(row.name, "plain") == (row.won, row.lost, row.p)


@pytest.mark.parametrize("size", [(3, 32, 64), (1, 40, 40)])
def test_pictures_have_the_size_given_for_the_model(folder, size):
    timm_model = timm.create_model("resnet10t", in_chans=size[0], num_classes=2)
    for model in ([timm_model] if size[0] == 3 else []) + [torchvision.models.resnet18(num_classes=2)]:
        data, words = read_folder(model, folder / "data", size, 4, None)
        images, _ = next(iter(data))
        assert images.shape == (4, *size)
        assert f"{size[1]}×{size[2]}, less mean" in words


def test_the_best_ones_arguments_are_a_candidate_and_a_metric_is_a_function():
    """``Ranking.best`` holds {"after": ...}, as inject_crop_vote takes it."""
    one, same = rank_sites(networks.fer(), DATA[:1], [{"after": PLAN}, PLAN], progress=False).rows[1:]
    assert one.sites == same.sites
    with pytest.raises(InputTypeError, match="CV863"):
        rank_sites(networks.fer(), DATA[:1], [PLAN], metric="f1", progress=False)


def test_one_number_is_no_class():
    class OneNumber(networks.Net):
        def forward(self, x):
            return super().forward(x)[:, :1]

    with pytest.raises(OptionError, match="CV861"):
        rank_sites(OneNumber().eval(), DATA, ["site"], progress=False)
    squared = rank_sites(
        OneNumber().eval(), DATA, ["site"], metric=lambda outputs, y: -(outputs[:, 0] - y).square().mean().item(),
        progress=False,
    )  # fmt: skip
    assert [(row.won, row.lost, row.p) for row in squared.rows] == [(0, 0, 1.0)] * 2


def test_a_vote_that_is_not_a_number_is_wrong():
    class Overflowing(networks.Net):
        def forward(self, x):
            return super().forward(x) * float("nan")

    data = [(images, torch.zeros_like(targets)) for images, targets in DATA]
    ranking = rank_sites(Overflowing().eval(), data, ["site"], progress=False)
    assert [row.score for row in ranking.rows] == [0.0, 0.0]
    undefined = rank_sites(Overflowing().eval(), data, ["site"], metric=lambda *_: float("nan"), progress=False)
    assert json.loads(json.dumps(undefined.to_dict(), allow_nan=False))["rows"][0]["score"] is None


def test_candidates_share_no_buffers():
    class Counting(networks.Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return super().forward(x) + self.calls * torch.arange(7)

    model = Counting().eval()
    ranking = rank_sites(model, DATA, ["site", "front"], metric=lambda y, _: y[0, 6].item(), progress=False)
    assert ranking.rows[0].score == pytest.approx(model(DATA[0][0])[0, 6].item(), rel=1e-5)


def test_outputs_in_a_dict():
    class Labelled(networks.Net):
        def forward(self, x):
            return {"features": self.front(x), "logits": super().forward(x)}

    named, bare = Labelled().eval(), networks.Net().eval()
    bare.load_state_dict(named.state_dict())
    scores = [[row.score for row in rank_sites(model, DATA, ["site"], progress=False).rows] for model in (named, bare)]
    assert scores[0] == scores[1]
