"""The package as users get it: names, errors, the wheel, the structure of the code."""

from __future__ import annotations

import ast
import importlib
import itertools
import os
import pkgutil
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import cropvote
import networks
from cropvote import errors

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    module.name.removeprefix("cropvote.")
    for module in pkgutil.walk_packages(cropvote.__path__, "cropvote.")
    if not module.ispkg
)
#: Imports run one way: a module imports only from those before it.
ORDER = [
    "errors",
    "_torch",
    "progress",
    "views",
    "layouts",
    "images",
    "outputs",
    "cuts",
    "splitting",
    "tracking",
    "voting",
    "uncertainty",
    "options",
    "call",
    "layer",
    "swapping",
    "probe.memo",
    "probe.copying",
    "probe.mode",
    "probe.taint",
    "probe.fakes",
    "probe.trace",
    "probe.reasons",
    "probe.subclasses",
    "probe.trial",
    "probe.layout",
    "probe.strides",
    "probe.verdicts",
    "probe.sites",
    "surgery.checking",
    "surgery.injection",
    "surgery.arguments",
    "surgery.config",
    "surgery.inject",
    "surgery",
    "reading",
    "stopping",
    "costs.meters",
    "costs.stages",
    "costs.timing",
    "plots",
    "costs.tables",
    "costs.suggesting",
    "costs",
    "ranking",
    "folders",
    "commands",
    "doctor",
    "cli",
]


def file_of(module: str) -> Path:
    return ROOT / "cropvote" / f"{module.replace('.', '/')}.py"


def absolute(module: str, node: ast.ImportFrom) -> str:
    """Return the name below ``cropvote`` of a relative import."""
    folder = f"cropvote.{module}".split(".")[: -node.level]
    return ".".join([*folder, node.module] if node.module else folder[1:]).removeprefix("cropvote.")


def test_public_names_are_sorted_documented_and_there():
    """Few names are at the top; all of them, and each module's public names, are in docs/api.md."""
    assert cropvote.__all__ == sorted(cropvote.__all__)
    assert len(cropvote.__all__) <= 20
    page = (ROOT / "docs" / "api.md").read_text()
    listed = set(re.findall(r"^::: cropvote\.(?:[a-z_]+\.)*(\w+)$", page, re.MULTILINE)) - {"errors"}
    public = {name for module in MODULES for name in importlib.import_module(f"cropvote.{module}").__all__}
    assert listed == public - set(errors.__all__) | {"CropVoteError"}
    assert set(cropvote.__all__) <= public
    homes = {name: module for module in MODULES for name in importlib.import_module(f"cropvote.{module}").__all__}
    for name in listed:
        documentation = getattr(importlib.import_module(f"cropvote.{homes[name]}"), name).__doc__
        assert documentation, name
        if name not in ("RankedSites", "Site", "SiteCost", "Suggestion", "SureVotes"):
            assert "Example:" in documentation, name


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_is_a_cropvote_error_and_a_builtin(name):
    error = getattr(errors, name)
    assert issubclass(error, cropvote.CropVoteError)
    assert name == "CropVoteError" or issubclass(error, (ValueError, TypeError, LookupError, ImportError))
    assert name in errors.__doc__


#: What else may be raised: AttributeError in a module's ``__getattr__``, and errors made by functions.
MADE = {"AttributeError", "refusal", "unavailable"}


def test_the_library_raises_nothing_else():
    """Every raise in the package uses the library's errors, or re-raises."""
    own = set(errors.__all__)
    for module in MODULES:
        tree = ast.parse(file_of(module).read_text())
        handlers = [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)]
        kept = [node for handler in handlers for node in handler.body if isinstance(node, ast.Assign)]
        caught = {node.targets[0].id for node in kept if isinstance(node.targets[0], ast.Name)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Name):
                assert node.exc.id in caught, (module, node.lineno)
            elif isinstance(node, ast.Raise) and node.exc is not None:
                assert isinstance(node.exc, ast.Call), (module, node.lineno)
                assert node.exc.func.id in own or node.exc.func.id in MADE, (module, node.lineno)


#: Optional packages, by the only module that may import them, inside a function.
EXTRAS = {"plots": ["matplotlib"], "progress": ["tqdm"], "folders": ["safetensors", "timm", "torchvision"]}


def test_imports_run_one_way():
    assert sorted({*ORDER} - {"surgery", "costs"}) == MODULES
    for module in MODULES:
        known = {*sys.stdlib_module_names, "torch", *EXTRAS.get(module, ())}
        tree = ast.parse(file_of(module).read_text())
        tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node))]
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                used = absolute(module, node)
                assert ORDER.index(used or module) <= ORDER.index(module), (module, used)
            elif isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] in known, (module, node.module)
            elif isinstance(node, ast.Import):
                roots = {name.name.split(".")[0] for name in node.names}
                assert roots <= known, (module, roots)


def journey(run) -> list[tuple[str, str]]:
    """Return, for each call inside the package, its file and its nearest caller's file in the package."""
    root, calls = str(ROOT / "cropvote") + os.sep, []

    def inside(frame):
        while frame is not None and not frame.f_code.co_filename.startswith(root):
            frame = frame.f_back
        return frame.f_code.co_filename.removeprefix(root) if frame is not None else ""

    def note(frame, event, arg):
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(root) and not frame.f_code.co_name.startswith("<"):
            calls.append((name.removeprefix(root), inside(frame.f_back)))

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls


def test_a_call_runs_through_few_files():
    """``model(x)`` runs through at most eight files, with at most 16 changes of file."""
    model = cropvote.inject_crop_vote(networks.fer(), after="layer1", input_size=48)
    images = torch.zeros(2, 3, 48, 48)
    with torch.no_grad():
        model(images)
        files = [file for file, _ in journey(lambda: model(images))]
    assert len(set(files)) <= 8
    assert sum(one != other for one, other in itertools.pairwise(files)) <= 16


def test_an_injection_enters_the_probe_once():
    model = networks.fer()
    calls = journey(lambda: cropvote.inject_crop_vote(model, after="layer1", input_size=48))
    probe = "probe" + os.sep
    assert sum(file.startswith(probe) and not caller.startswith(probe) for file, caller in calls
               if caller.startswith("surgery")) == 1  # fmt: skip


def test_the_package_and_its_help_load_no_pytorch():
    code = "import sys, cropvote, cropvote.cli\ntry:\n cropvote.cli.main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    from cropvote.cli import VIEWS
    from cropvote.cuts import NAMES

    assert tuple(NAMES) == VIEWS


def test_the_version_is_written_once():
    assert cropvote.__version__ in (ROOT / "CHANGELOG.md").read_text()
    assert "version =" not in (ROOT / "pyproject.toml").read_text().split("[tool")[0].replace("dynamic", "")


@pytest.mark.slow
def test_a_wheel_holds_the_package_alone_and_imports_without_the_extras(tmp_path):
    """Only torch and its requirements can be imported; README's links lead somewhere on a package index."""
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        description = archive.read(f"cropvote-{cropvote.__version__}.dist-info/METADATA").decode().partition("\n\n")[2]
        archive.extractall(tmp_path / "wheel")
    assert {name.split("/")[0] for name in names} == {"cropvote", f"cropvote-{cropvote.__version__}.dist-info"}
    assert "cropvote/py.typed" in names
    assert description.startswith("# cropvote")
    assert all(target.startswith("https://") for target in re.findall(r"\]\(([^)]*)", description))
    bare = tmp_path / "bare"
    bare.mkdir()
    for distribution in required("torch"):
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] != ".."}:
            if not (bare / top).exists():
                (bare / top).symlink_to(distribution.locate_file(top))
    code = (
        "import importlib.util, cropvote, torch\n"
        "from torch import nn\n"
        "assert not any(map(importlib.util.find_spec, ['numpy', 'timm', 'torchvision', 'matplotlib', 'pytest']))\n"
        "net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
        "cropvote.inject_crop_vote(net, after='0', input_size=24)\n"
        "print(cropvote.__file__, tuple(net.eval()(torch.zeros(2, 3, 24, 24)).shape))\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'wheel'}{os.pathsep}{bare}"}
    run = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert run.returncode == 0, run.stderr
    assert str(tmp_path / "wheel") in run.stdout
    assert "(2, 4)" in run.stdout


def optional(requirement: Requirement, names: tuple[str, ...]) -> bool:
    """Return whether only an extra or another platform requires it; extras of CUDA packages belong to torch."""
    extras = ["", "all"] if requirement.name.startswith(("nvidia", "cuda")) else [""]
    return bool(requirement.marker) and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras)


def required(*names: str) -> list[metadata.Distribution]:
    """Return the installed distributions with these names, and all their requirements here."""
    found: dict[str, metadata.Distribution] = {}
    waiting = [Requirement(name) for name in names]
    while waiting:
        requirement = waiting.pop()
        if requirement.name in found or optional(requirement, names):
            continue
        try:
            found[requirement.name] = metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError:
            continue
        waiting += [Requirement(text) for text in found[requirement.name].requires or ()]
    return list(found.values())
