"""Check the documentation against the code and the stored figures."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import skimage
import torch
from torch.utils.flop_counter import FlopCounterMode

import at_test_time
import cropvote
import deploy
import detectors
import faces
import fer2013_page
import fer2013_scores
import load_page
import peers
import rejecting
import until_sure
import worth_page
from cropvote import errors, profile
from model import fer_resnet18

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
EXAMPLES = ("timm_in_ten_lines.py", "own_network.py", "choose_site.py")


def test_the_api_page_has_every_public_name_once():
    named = re.findall(r"^::: cropvote\.(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert sorted(set(named) - {"errors"}) == cropvote.__all__
    assert len(named) == len(set(named))
    listed = re.search(r"members: \[(.*)\]", (DOCS / "api.md").read_text())
    assert listed
    assert sorted({*listed[1].split(", "), "CropVoteError"}) == sorted(errors.__all__)


def test_the_method_cards_table_matches_the_library():
    text, table = (DOCS / "method.md").read_text(), profile(fer_resnet18(), 48, sites=["layer1", "layer2", "layer3"])
    for row in table:
        name = "– (plain)" if row.site == "baseline" else f"`{row.site}`"
        distinct = "" if row.site == "baseline" else f"{row.distinct} "
        line = f"| {name} | {row.gmacs:.3f} | {row.ratio:.2f} | {row.train_memory_mib:.2f} | {distinct}|"
        assert line in text


def test_the_comparisons_figures_match_the_speed_page():
    """Compare with the first table of docs/speed.md (float32, eager)."""
    speed = {row[0]: row[2::2] for row in _rows((DOCS / "speed.md").read_text().partition("### Training step")[0])}
    found = _rows((DOCS / "comparison.md").read_text().partition("## Measured")[2].partition("## Packages")[0])
    assert len(found) == 8
    for name, *figures in found:
        assert figures == speed[name]


def _rows(text: str) -> list[list[str]]:
    """Return the cells of the table rows that end in a number."""
    rows = [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    return [row for row in rows if re.fullmatch(r"[\d.]+", row[-1])]


@pytest.mark.parametrize("name", ["until_sure.json", "until_sure_fer2013.json"])
def test_the_tables_of_stopping_votes_match_the_stored_figures(name):
    runs = json.loads((ROOT / "benchmarks" / "results" / name).read_text())["runs"]
    assert until_sure.table(runs) in (DOCS / "beyond.md").read_text()
    assert not any(str(value).startswith("/") for run in runs for value in run["config"].values())


@pytest.mark.parametrize(("first", "rule"), [((4, 9), {}), (until_sure.SIX, {"how": "hard", "confidence": None})])
def test_the_work_of_votes_until_sure_is_counted(first, rule):
    """The formulas of until_sure.py and fer2013_scores.py, beside PyTorch's counter; half of the faces stop."""
    network = fer_resnet18(num_classes=7, width=8)
    row = list(profile(network, 48, sites=["layer1"]))[-1]
    model = cropvote.inject_crop_vote(network, after="layer1", input_size=48).eval()
    x = torch.randn(8, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        early = cropvote.per_view(model, x)[:, list(first)].mean(1).softmax(1).max(1).values
        rule = rule or {"confidence": float(early.sort().values[3])}
        with FlopCounterMode(display=False) as counter:
            stopped = float((cropvote.vote_until_sure(model, x, first=first, **rule).used < 10).double().mean())
    assert stopped == 0.5 or rule["confidence"] is None
    expected = counter.get_total_flops() / 2 / len(x) / 1e9
    assert until_sure.work(row, stopped, len(first)) == pytest.approx(expected)
    if len(first) == 2:
        two, ten = row.gmacs_by_views[2], row.gmacs
        assert fer2013_scores.work_until_sure(stopped, two, ten) == pytest.approx(expected)


def test_the_table_of_views_at_test_time_matches_the_stored_figures():
    assert at_test_time.table() in (DOCS / "guides" / "test-time-only.md").read_text()
    assert at_test_time.deeper() in (DOCS / "guides" / "test-time-only.md").read_text()
    assert peers.table(json.loads(peers.STORED.read_text())) in (DOCS / "comparison.md").read_text()
    stored = json.loads(rejecting.STORED.read_text())
    assert rejecting.table(stored) in (DOCS / "guides" / "reading-the-votes.md").read_text()
    assert deploy.table(json.loads(deploy.STORED.read_text())) in (DOCS / "guides" / "export.md").read_text()
    assert detectors.table(json.loads(detectors.STORED.read_text())) in (DOCS / "comparison.md").read_text()
    assert worth_page.tuned(worth_page.DEEPER) in (DOCS / "guides" / "fine-tuning.md").read_text()
    assert worth_page.tuned() in (DOCS / "guides" / "fine-tuning.md").read_text()


def test_the_page_on_serving_matches_the_stored_figures():
    stored = json.loads((ROOT / "benchmarks" / "results" / "load.json").read_text())
    assert load_page.page(stored) == (DOCS / "serving.md").read_text()
    assert {"killed", "rates"} <= set(stored)


def test_readmes_table_matches_the_stored_figures():
    stored = json.loads(fer2013_page.STORED.read_text())
    assert fer2013_page.short_table(stored["full"]) in (DOCS / "method.md").read_text()
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    assert worth_page.short_table() in text
    assert worth_page.facts() in text


def test_the_home_page_is_readme_and_its_links_lead_somewhere():
    sys.path.insert(0, str(DOCS))
    try:
        import hooks
    finally:
        sys.path.remove(str(DOCS))
    text = hooks.home_page()
    assert text.startswith("# cropvote")
    assert "](guides/fine-tuning.md" in text
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("https://") or (DOCS / target).exists(), target


def raised() -> Iterator[tuple[str, ast.expr]]:
    """Yield where the library creates an error or a reason, and its code."""
    kinds = {"Reason", *errors.__all__} - {"CropVoteError"}
    for path in sorted((ROOT / "cropvote").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds:
                yield f"{path.name}:{node.lineno}", node.args[0]


def test_every_code_is_explained():
    """The library and the page have the same codes, none missing and none extra."""
    text = (DOCS / "troubleshooting.md").read_text()
    entries = re.findall(r'^\| <a id="(CV\d{3})"></a>\1 \|', text, re.MULTILINE)
    assert len(entries) == len(set(entries))
    codes = {where: node.value for where, node in raised() if isinstance(node, ast.Constant)}
    assert set(codes.values()) == set(entries)
    handed_on = [ast.unparse(node) for _, node in raised() if not isinstance(node, ast.Constant)]
    assert set(handed_on) == {"error.code", "reason.code", "*injection.site_error"}
    for name in errors.__all__:
        assert f"`{name}`" in text


@pytest.mark.parametrize("script", EXAMPLES)
@pytest.mark.slow
def test_the_short_examples_run(script):
    path = ROOT / "examples" / script
    assert len(path.read_text().splitlines()) < 40
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=True, cwd=path.parent)
    assert done.stdout


@pytest.mark.slow
def test_the_faces_guide_runs(tmp_path):
    """Run all its commands in order, in an empty folder next to the examples, with small imitations of the real sets.

    Training is shortened, and --fast and cameras are left out.
    """
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    faces.fer2013_csv(tmp_path / "fer2013.csv", rows=42)
    faces.affectnet(tmp_path / "AffectNet")
    faces.rafdb(tmp_path / "RAF-DB")
    skimage.io.imsave(tmp_path / "photo.jpg", skimage.data.astronaut())
    text = (DOCS / "guides" / "fer48.md").read_text().replace("\\\n", "")
    (code,) = re.findall(r"from the logits.*?```py\n(.*?)```", text, re.DOTALL | re.IGNORECASE)
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    lines = [shlex.split(line, comments=True) for line in blocks.splitlines() if line]
    assert len(lines) > 20
    for program, script, *options in [*lines, ["python", "-c", code]]:
        if program == "pip" or "--webcam" in options:
            continue
        assert program == "python"
        command = [script, *(option for option in options if option != "--fast")]
        if script.endswith(("train.py", "compare.py")):
            command += ["--width", "4", "--limit", "64", "--epochs", "1", "--batch", "8", "--device", "cpu"]
            command += ["--validation", "1"] if {"affectnet", "rafdb"} & {*options} else []
        environment = {**os.environ, "MPLBACKEND": "agg"}
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, check=False)
        not_as_published = script.endswith("check_data.py") and "toy" not in options
        assert done.returncode == not_as_published, command
    assert len(list((tmp_path / "pictures").iterdir())) >= len(list((tmp_path / "faces").iterdir())) == 14
    assert (tmp_path / "runs" / "first" / "model.onnx").stat().st_size > 1000


@pytest.mark.slow
def test_the_site_builds_strictly_and_loads_nothing_external(tmp_path):
    """No page loads a style, script, font or picture from another site."""
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    subprocess.run(build, cwd=ROOT, check=True)
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        for tag in re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", page.read_text()):
            if 'rel="canonical"' not in tag:
                assert not re.search(r'(?:src|href)="?(?:https?:)?//', tag), (page.name, tag)
