"""What the commands of the command line do, once their arguments are parsed."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .costs.meters import image_size
from .costs.suggesting import suggest_site
from .costs.tables import Profile, profile, row_of
from .cuts import NAMES, After
from .errors import CropVoteError, MissingExtraError, OptionError, SiteError
from .folders import check_outputs, count_classes, load_checkpoint, read_folder
from .images import example_of
from .layouts import Tokens
from .plots import check_path
from .probe.sites import sites
from .probe.verdicts import Site
from .ranking import rank_sites

__all__: list[str] = []


def run(arguments: argparse.Namespace) -> int:
    """Run a parsed command. Returns the exit status: 0, or 2 after a one-line error."""
    try:
        size = _size(arguments.size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the models' own code
            real = getattr(arguments, "measure", False) or arguments.command == "rank"
            classes = count_classes(arguments.data) if arguments.command == "rank" else None
            model = build(arguments.model, real=real, classes=classes)
            if size is None and example_of(model, None) is None:
                raise OptionError(
                    "CV802", f"{arguments.model} does not say its input size: add --size, such as --size 224."
                )
            text = RUN[arguments.command](model, size, arguments)
    except CropVoteError as error:
        print(f"cropvote: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"cropvote: {error}", file=sys.stderr)
        return 2
    with contextlib.suppress(BrokenPipeError):
        print(text)
    return 0


def _sites(model: nn.Module, size: tuple[int, ...] | int | None, arguments: argparse.Namespace) -> str:
    found = sites(model, size, views=NAMES[arguments.views](), all=arguments.all)
    if arguments.json:
        return json.dumps([{**site._asdict(), "layout": _layout(site)} for site in found], indent=1)
    if not found:
        raise SiteError("CV150", f"no site of this {type(model).__name__} is valid: --all says why, of each module.")
    head = ["site", "shape", "layout", "distinct", *["why not"] * arguments.all]
    cells = [head]
    for site in found:
        shape = "×".join(map(str, site.shape))
        cells.append([site.name, shape, _layout(site), str(site.distinct), *[site.reason] * arguments.all])
    if arguments.markdown:
        lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in cells]
        return "\n".join([lines[0], f"|{' --- |' * len(head)}", *lines[1:]])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def _layout(site: Site) -> str:
    if isinstance(site.layout, Tokens):
        height, width, prefix = site.layout
        return f"tokens {height}×{width}" + (f", {prefix} in front" if prefix else "")
    return site.layout


def _profile(model: nn.Module, size: tuple[int, ...] | int | None, arguments: argparse.Namespace) -> str:
    if arguments.plot:
        check_path(arguments.plot)
    table: Profile = profile(
        model,
        size,
        _asked(arguments),
        NAMES[arguments.views](),
        every_site=arguments.every_site,
        align=arguments.align,
        measure=arguments.measure,
        device=_device(arguments.device),
        progress=not arguments.json,
    )
    if arguments.plot:
        table.plot(arguments.plot)
    if arguments.json:
        return json.dumps(table.to_dict(), indent=1)
    return table.to_markdown() if arguments.markdown else str(table)


def _suggest(model: nn.Module, size: tuple[int, ...] | int | None, arguments: argparse.Namespace) -> str:
    if arguments.max_macs_ratio is arguments.max_memory_mib is None:
        raise OptionError("CV820", "suggest needs a budget: --max-macs-ratio, --max-memory-mib, or both.")
    views = NAMES[arguments.views]()
    found = suggest_site(
        model,
        size,
        max_macs_ratio=arguments.max_macs_ratio,
        max_memory_mib=arguments.max_memory_mib,
        views=views,
        every_site=arguments.every_site,
        align=arguments.align,
        progress=not arguments.json,
    )
    if arguments.json:
        return json.dumps({"reason": found.reason, **row_of(found.cost)}, indent=1)
    return f"{found.cost.site}\n\n{found.reason}"


def _rank(model: nn.Module, size: tuple[int, ...] | int | None, arguments: argparse.Namespace) -> str:
    if arguments.plot:
        check_path(arguments.plot)
    if arguments.checkpoint is not None:
        load_checkpoint(model, arguments.checkpoint)
    candidates = [_candidate(text) for text in arguments.tried] if arguments.tried else None
    example = example_of(model, size)
    shape = image_size(example)  # type: ignore[arg-type]  # run has asked for it
    data, words = read_folder(
        model, arguments.data, shape, arguments.batch, arguments.limit, arguments.mean, arguments.std
    )
    check_outputs(model, torch.zeros(1, *shape), count_classes(arguments.data))
    ranking = rank_sites(model, data, candidates, device=_device(arguments.device), progress=not arguments.json)
    if arguments.plot:
        ranking.plot(arguments.plot)
    if arguments.json:
        return json.dumps({"data": words, **ranking.to_dict()}, indent=1)
    return f"{words}\n\n{ranking.to_markdown() if arguments.markdown else ranking}"


def _candidate(text: str) -> After:
    """Return the sites of one candidate, such as ``input=hflip,layer2=five``."""
    parts = [part.rpartition("=") for part in text.split(",")]
    if any(not equals or not site or views not in NAMES for site, equals, views in parts):
        raise OptionError(
            "CV901", f"--try must be like input=hflip,layer2=five, with views of {', '.join(NAMES)}, got {text!r}."
        )
    return {site: NAMES[views]() for site, _, views in parts}


def _asked(arguments: argparse.Namespace) -> list[After] | None:
    """Return the sites of --sites, and the sites of --after as one more."""
    if not arguments.after:
        return arguments.sites
    plan = {}
    for text in arguments.after:
        site, equals, views = text.rpartition("=")
        if not equals or not site or views not in NAMES:
            raise OptionError(
                "CV901", f"--after must be like layer1=hflip, with views of {', '.join(NAMES)}, got {text!r}."
            )
        if site in plan:
            raise OptionError("CV901", f"--after names the site {site!r} twice.")
        plan[site] = NAMES[views]()
    return [*(arguments.sites or []), plan]


def _size(text: str | None) -> int | tuple[int, ...] | None:
    if text is None:
        return None
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) > 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise OptionError("CV902", f"--size must be like 48, 48x64 or 3x48x48, got {text!r}.")
    return int(parts[0]) if len(parts) == 1 else tuple(map(int, parts))


def _device(name: str | None) -> torch.device | None:
    try:
        return None if name is None else torch.device(name)
    except RuntimeError as error:
        raise OptionError("CV903", f"--device {name!r} is not a PyTorch device such as cpu or cuda.") from error


def build(name: str, real: bool = False, classes: int | None = None) -> nn.Module:
    """Return the model of a name on the command line in eval mode, with random weights or, if not ``real``, none.

    A model of a library gets an output for each of the ``classes``.

    Raises:
        OptionError: a malformed name, one that is not there, or a function that makes no model.
        MissingExtraError: timm or torchvision is asked for and not installed.
    """
    kind, colon, rest = name.partition(":")
    if not colon or not kind or not rest:
        raise OptionError(
            "CV904", f"MODEL must be timm:NAME, torchvision:NAME or package.module:function, got {name!r}."
        )
    model = _from_library(kind, rest, real, classes) if kind in ("timm", "torchvision") else _own(kind, rest)()
    if not isinstance(model, nn.Module):
        raise OptionError("CV904", f"{name} gives a {type(model).__name__}, not an nn.Module.")
    return model.eval()


def _from_library(library: str, name: str, real: bool, classes: int | None) -> Any:
    try:
        package = importlib.import_module("timm" if library == "timm" else "torchvision.models")
    except ImportError as error:
        raise MissingExtraError("CV701", f'{library}:{name} needs {library}: pip install "cropvote[timm]".') from error
    known = package.list_models(package) if library == "torchvision" else package.list_models()
    if name.partition(".")[0] not in known:
        near = difflib.get_close_matches(name, known, n=4)
        raise OptionError("CV905", f"{library} has no model {name!r}{'; nearest: ' + ', '.join(near) if near else ''}.")

    def make() -> Any:
        outputs = {} if classes is None else {"num_classes": classes}
        if library == "timm":
            return package.create_model(name, pretrained=False, **outputs)
        options = {"init_weights": False, **outputs} if name in ("googlenet", "inception_v3") else outputs
        return package.get_model(name, weights=None, **options)

    if not real:  # no memory for weights that nobody looks at, where the constructor computes no numbers
        with contextlib.suppress(Exception), torch.device("meta"):
            model = make()
            held = [value for module in model.modules() for value in vars(module).values()]
            if not any(isinstance(value, torch.Tensor) for value in held):
                return model.to_empty(device="cpu")  # where attention is PyTorch's for the CPU; no page is ever touched
    return _guarded(f"{library}:{name}", make)()


def _own(module: str, attribute: str) -> Callable[[], Any]:
    with _current_folder():
        try:
            found: Any = importlib.import_module(module)
        except Exception as error:
            raise OptionError(
                "CV906", f"the module {module!r} cannot be imported: {type(error).__name__}: {error}."
            ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [name for name in dir(found) if not name.startswith("_")]
            near = difflib.get_close_matches(part, names, n=3, cutoff=0.4)
            raise OptionError(
                "CV905", f"{module} has no {attribute!r}{'; nearest: ' + ', '.join(near) if near else ''}."
            )
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        return lambda: found
    if not callable(found):
        raise OptionError(
            "CV904", f"{module}:{attribute} is a {type(found).__name__}, not a function that makes a model."
        )
    return _guarded(f"{module}:{attribute}", found)


def _guarded(name: str, make: Callable[[], Any]) -> Callable[[], Any]:
    def made() -> Any:
        try:
            return make()
        except Exception as error:
            raise OptionError("CV907", f"{name} failed: {type(error).__name__}: {error}.") from error

    return made


@contextlib.contextmanager
def _current_folder() -> Iterator[None]:
    """Let modules be imported from where the command was typed, as ``python -m`` does."""
    sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.path.remove(str(Path.cwd()))


#: The commands by name.
RUN = {"sites": _sites, "profile": _profile, "suggest": _suggest, "rank": _rank}
