"""The command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from cropvote import doctor, profile, sites, suggest_site
from cropvote._torch import unavailable
from cropvote.cli import main


def test_the_command_lists_sites(capsys):
    assert main(["sites", "timm:resnet18"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["site", "shape", "layout", "distinct"]
    listed = sites(timm.create_model("resnet18").eval())
    assert [line.split()[0] for line in lines[1:]] == [site.name for site in listed]
    assert main(["sites", "torchvision:resnet18", "--size", "64", "--all", "--markdown"]) == 0
    assert "| layer1.0.conv1 |" in capsys.readouterr().out
    assert main(["sites", "timm:vit_tiny_patch16_224", "--json"]) == 0
    assert {row["layout"] for row in json.loads(capsys.readouterr().out)} == {"tokens 14×14, 1 in front"}


def test_the_command_suggests(capsys):
    asked = ["suggest", "timm:resnet10t", "--size", "64", "--max-macs-ratio"]
    model = timm.create_model("resnet10t").eval()
    assert main([*asked, "4", "--max-memory-mib", "3"]) == 0
    found = suggest_site(model, 64, max_macs_ratio=4, max_memory_mib=3.0)
    assert capsys.readouterr().out == f"{found.cost.site}\n\n{found.reason}\n"
    assert main([*asked, "3", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["ratio"] <= 3
    assert row["site"] in row["reason"] or "earliest" in row["reason"]


def test_the_command_profiles(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mynet.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 7))\n"
    )
    asked = ["profile", "mynet:build", "--size", "24x32", "--views", "five"]
    assert main([*asked, "--json", "--plot", "cost.png"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["site"] for row in rows] == ["baseline", "input", "0"]
    assert Path("cost.png").stat().st_size > 3000
    assert main([*asked, "--markdown", "--sites", "0"]) == 0
    assert capsys.readouterr().out.startswith("Sequential, images 3×24×32, 5 views, per image.\n\n| site |")
    assert main([*asked, "--measure"]) == 0
    assert capsys.readouterr().out.splitlines()[2].endswith("ms")
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sites timm:resnt18", "timm has no model 'resnt18'; nearest: resnet18"),
        ("sites torchvision:resnet", "torchvision has no model 'resnet'; nearest: resnet"),
        ("sites torchvision:resnet18", "does not say its input size: add --size"),
        ("sites resnet18", r"must be timm:NAME, torchvision:NAME or package\.module:function"),
        ("sites nothing.here:build --size 48", "the module 'nothing.here' cannot be imported: ModuleNotFoundError"),
        ("sites math:sqroot --size 48", "math has no 'sqroot'; nearest: sqrt"),
        ("sites math:sqrt --size 48", "math:sqrt failed: TypeError"),
        ("sites math:pi --size 48", "math:pi is a float, not a function"),
        ("sites builtins:dict --size 48", "gives a dict, not an nn.Module"),
        ("suggest timm:resnet18", "needs a budget: --max-macs-ratio, --max-memory-mib, or both"),
        ("suggest timm:resnet18 --max-macs-ratio 0.5", "costs at most 0.5 times"),
        ("suggest timm:resnet18 --max-memory-mib -1", "max_memory_mib must be a number above 0"),
        ("profile timm:resnet18 --size 48x", "--size must be like 48, 48x64 or 3x48x48"),
        ("profile timm:resnet18 --size 4x48x48", "failed on an input of shape"),
        ("profile timm:resnet18 --size 0", "--size must be like"),
        ("profile timm:resnet18 --sites layer9", "no module named 'layer9'"),
        ("profile timm:resnet18 --plot nowhere/cost.png", "the folder of 'nowhere/cost.png' does not exist"),
        ("profile timm:resnet18 --plot cost.gif", "ends in .png, .svg, .pdf"),
        ("profile timm:resnet18 --measure --device tpu9", "is not a PyTorch device"),
    ],
)
def test_a_wrong_command_gets_one_line(line, message, capsys):
    assert main(line.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert re.search(message, printed.err), printed.err


def test_help_fits_a_screen(capsys):
    for line in (["--help"], ["sites", "--help"]):
        with pytest.raises(SystemExit) as caught:
            main(line)
        assert caught.value.code == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) <= 24
        assert max(map(len, lines)) <= 100


@pytest.mark.parametrize(
    ("missing", "line", "message"),
    [
        ("timm", "sites timm:resnet18", 'timm:resnet18 needs timm: pip install "cropvote[timm]"'),
        ("torchvision", "sites torchvision:resnet18 --size 48", "needs torchvision: pip install"),
        (
            "matplotlib",
            "profile torchvision:squeezenet1_1 --size 48 --sites features.3 --plot cost.png",
            'pip install "cropvote[plots]"',
        ),
    ],
)
def test_a_missing_extra_is_named(missing, line, message, tmp_path):
    """Run in a process that cannot import it; everything else works without it."""
    blocked = (
        f"import sys; sys.modules[{missing!r}] = None; from cropvote.cli import main; sys.exit(main({line.split()!r}))"
    )
    found = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert found.returncode == 2, found.stderr
    assert message in found.stderr
    assert found.stderr.count("\n") == 1


@pytest.mark.slow
def test_memory_is_that_of_python(capsys):
    """The command line builds models without weights, yet the memory (also of CPU attention) is that of Python."""
    main(["profile", "timm:vit_tiny_patch16_224", "--sites", "blocks.9", "--json"])
    said = json.loads(capsys.readouterr().out)
    model = timm.create_model("vit_tiny_patch16_224")
    assert said == json.loads(json.dumps(profile(model, sites=["blocks.9"]).to_dict()))


def test_the_doctor_tells_versions_and_whether_checks_work(capsys, monkeypatch):
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("cropvote ")
    assert f"torch {torch.__version__}" in told
    assert f"timm {timm.__version__}" in told
    assert told.endswith("checks: this PyTorch is followed\n")
    monkeypatch.setattr(doctor, "check_taint_is_followed", unavailable_check)
    main(["doctor"])
    assert "checks: [CV490]" in capsys.readouterr().out


def unavailable_check():
    raise unavailable("a test")
