"""Every family of timm and torchvision (and some of transformers): which sites work, and is every verdict right?

    python benchmarks/zoo.py                       all families, an hour or so on two cores
    python benchmarks/zoo.py timm/resnet timm/dla  some of them again, the others' results kept
    python benchmarks/zoo.py --table               docs/compatibility.md again, from the stored results

For each family, every entry of ``feature_info`` of two models is tried on fake tensors. The smaller model is also
injected and run: each accepted site against the oracle of the tests (hooks and slices), and every module
against two tests that share no code with the library: is it a cut point (with noise in place of its output, the model's
output must not depend on the image), and does the network behind it take a smaller map of noise?
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

from cropvote import CropVoteError, Site, Tokens, inject_crop_vote, remove_crop_vote, sites

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples" / "fer48")]

import oracle  # noqa: E402
from zoo import randomise_norms  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "zoo.json"
PAGE = ROOT / "docs" / "compatibility.md"
SIDE = 128
ORACLE_SITES = 4
BIGGEST = 50_000_000  # parameters
BUDGET = 10  # seconds for a model's modules against noise, and for its sites against the oracle
SMALL = {"embed_dim": 96, "depth": 4, "num_heads": 3}

# ---- which models ----------------------------------------------------------------------------------------------------


def families() -> list[str]:
    """All families: "timm/<module>", "torchvision/<module>", "transformers/<class>"."""
    names = [f"timm/{module}" for module in timm.list_modules()]
    torchvision_modules = {builder(name).__module__ for name in torchvision.models.list_models(torchvision.models)}
    names += sorted(f"torchvision/{module.rpartition('.')[2]}" for module in torchvision_modules)
    return names + [f"transformers/{name}" for name in TRANSFORMERS]


def builder(name: str) -> Callable[..., nn.Module]:
    return torchvision.models.get_model_builder(name)


def make(family: str, name: str, small: bool = False) -> nn.Module:
    """One model with seven classes and random weights."""
    library, _, module = family.partition("/")
    if library == "transformers":
        return transformer(name)
    if library == "torchvision":
        options = {"init_weights": False} if module in ("googlenet", "inception") else {}
        return builder(name)(weights=None, num_classes=7, **options)
    return timm.create_model(name, num_classes=7, **(SMALL if small else {}))


def models(family: str) -> list[tuple[str, bool]]:
    """The family's models that are tried, the smallest first: two of timm's, all of the others; and if cut down."""
    library, _, module = family.partition("/")
    if library == "transformers":
        return [(module, False)]
    if library == "torchvision":
        names = torchvision.models.list_models(torchvision.models)
        chosen = [name for name in names if builder(name).__module__ == f"torchvision.models.{module}"]
        return [(name, False) for name in sorted(chosen, key=lambda name: size_of(family, name))]
    sized = sorted((size_of(family, name), name) for name in timm.list_models(module=module))
    able = [(name, False) for size, name in sized if size < BIGGEST]
    if not able:  # a transformer with fewer and smaller blocks is of the same kind
        name = sized[0][1]
        able = [(name, size_of(family, name, small=True) < BIGGEST)]
    return able[:1] + able[len(able) // 2 : len(able) // 2 + 1] * (len(able) > 1)


def size_of(family: str, name: str, small: bool = False) -> int:
    try:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in make(family, name, small).parameters())
    except Exception:  # some constructors compute with numbers that the meta device does not have
        return BIGGEST


TRANSFORMERS = {
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 2, 1], "layer_type": "basic"},
    "ConvNext": {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 2, 1]},
    "RegNet": {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 2, 1], "groups_width": 8},
    "MobileNetV2": {"depth_multiplier": 0.35},
    "ViT": {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 128, "patch_size": 16},
    "DeiT": {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 128, "patch_size": 16},
}


def transformer(name: str) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{name}Config")(num_labels=7, **TRANSFORMERS[name])
    return getattr(transformers, f"{name}ForImageClassification")(config)


def randomise(model: nn.Module) -> nn.Module:
    """Give every constant parameter values that matter: a layer scale of 1e-5 or a zero head would hide any error."""
    with torch.no_grad():
        for parameter in randomise_norms(model).parameters():
            if parameter.numel() > 1 and parameter.is_floating_point() and parameter.max() == parameter.min():
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def calibrate(model: nn.Module, size: tuple[int, ...]) -> None:
    """Let every BatchNorm see what it gets, or the images would hardly matter behind many of them."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    with torch.no_grad():
        model(torch.randn(4, *size))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def image_of(model: nn.Module) -> tuple[int, int, int]:
    """The image's (C, H, W): a small one where the model takes it, else its own."""
    config = getattr(model, "pretrained_cfg", None) or {}
    channels, *own = config.get("input_size", (3, 224, 224))
    if config.get("fixed_input_size"):
        return (channels, *own)
    for tried in (SIDE, own[0], 299):
        try:
            with torch.no_grad():
                model(torch.zeros(2, channels, tried, tried))
        except Exception:  # noqa: S112
            continue
        return (channels, tried, tried)
    return (channels, *own)


def feature_sites(model: nn.Module, listed: list[str], most: int = 1000) -> list[str]:
    """The names in timm's ``feature_info``; of other libraries' models, what is listed and some outer modules."""
    info = getattr(model, "feature_info", None)
    if info is None:
        outer = [name for name, _ in model.named_modules() if name and name.count(".") < 2]
        some = outer[:: -(-len(outer) // most)]
        return list(dict.fromkeys([*(site for site in listed if site != "input"), *some]))
    entries = info if isinstance(info, list) else info.info
    return [entry["module"] for entry in entries if entry.get("module")]


# ---- the sweep -------------------------------------------------------------------------------------------------------


def sweep(family: str) -> dict[str, Any]:
    """All that is found out about one family."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    start, found = time.time(), {"family": family, "models": []}
    try:
        for i, (name, small) in enumerate(models(family)):
            model = look_at(make(family, name, small), real=i == 0)
            found["models"].append({"model": name, "small": small, **model})
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {str(error)[:300]}"
    return {**found, "seconds": round(time.time() - start)}


def look_at(model: nn.Module, real: bool) -> dict[str, Any]:
    model = randomise(model).eval()
    size = image_of(model)
    if not real:
        return {"size": size, "tried": {site: attempt(model, site, size) for site in feature_sites(model, [], most=4)}}
    calibrate(model, size)
    rows = {site.name: site for site in sites(model, size, all=True)}
    listed = [site.name for site in sites(model, size)]
    tried = {site: attempt(model, site, size) for site in feature_sites(model, listed)}
    for site, verdict in tried.items():
        if site in rows and (verdict["verdict"] == "works") != (not rows[site].reason):
            verdict.update(verdict="wrong", reason=f"sites() says {rows[site].reason or 'valid'}: {verdict['reason']}")
    found: dict[str, Any] = {"size": size, "listed": listed, "tried": tried}
    with torch.no_grad():
        found["oracle"], found["alike"] = against_oracle(model.double(), size, rows, listed, list(tried))
        found["cut points"] = against_noise(model, size, rows)
    return found


def kind_of(layout: object) -> str:
    return "tokens" if isinstance(layout, Tokens) else str(layout)


def attempt(model: nn.Module, site: str, size: tuple[int, ...]) -> dict[str, str]:
    try:
        inject_crop_vote(model, after=site, input_size=size)
    except CropVoteError as error:
        return {"verdict": "refused", "reason": str(error)}
    except Exception as error:
        return {"verdict": "crashed", "reason": f"{type(error).__name__}: {str(error)[:300]}"}
    layout = kind_of(model._cropvote.layout)
    remove_crop_vote(model)
    return {"verdict": "works", "reason": "", "layout": layout}


class Logits(nn.Module):
    """The model's predictions alone, whatever it returns beside them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        output = self.model(x)
        return output if isinstance(output, Tensor) else output.logits


def cutter(layout: object) -> Callable[[Tensor], list[Tensor]]:
    """The oracle's ten views, for other layouts than its own."""
    if layout == "NHWC":
        return lambda x: [view.permute(0, 2, 3, 1) for view in oracle.ten_views(x.permute(0, 3, 1, 2))]
    if isinstance(layout, Tokens):
        height, width, prefix = layout

        def cut(x: Tensor) -> list[Tensor]:
            maps = x[:, prefix:].transpose(1, 2).reshape(len(x), -1, height, width)
            return [torch.cat([x[:, :prefix], v.flatten(2).transpose(1, 2)], 1) for v in oracle.ten_views(maps)]

        return cut
    return oracle.ten_views


def against_oracle(
    model: nn.Module,
    size: tuple[int, ...],
    rows: dict[str, Site],
    listed: list[str],
    first: list[str],
    most: int = ORACLE_SITES,
) -> tuple[dict[str, float], list[str]]:
    """The vote's largest error, relative to the largest output, per site; and the sites whose views say the same."""
    valid = [site for site in listed if site != "input"]
    some = valid[:: max(1, len(valid) // most)]
    images = torch.randn(2, *size, dtype=next(model.parameters()).dtype)
    found: dict[str, float] = {}
    alike, start = [], time.time()
    for site in dict.fromkeys([site for site in first if site in rows and not rows[site].reason] + some):
        if time.time() - start > BUDGET and found:
            break
        by_view = oracle.tail_rows(Logits(model), f"model.{site}", images, cutter(rows[site].layout))
        wanted = oracle.vote(by_view, "soft")
        inject_crop_vote(model, after=site, input_size=size)
        vote = Logits(model)(images)
        remove_crop_vote(model)
        found[site] = float((vote - wanted).abs().max() / wanted.abs().max())
        if by_view.std(1).max() < ALIKE * wanted.abs().max():
            alike.append(site)
    return found, alike


def against_noise(
    model: nn.Module, size: tuple[int, ...], rows: dict[str, Site], budget: float = BUDGET
) -> dict[str, Any]:
    """Every module that is called once and returns a map or tokens, judged by noise and by the library."""
    network = Logits(model.double())  # in which the least dependence shows
    images, start = torch.randn(2, *size, dtype=torch.float64), time.time()
    outputs: dict[str, list[Any]] = {}
    modules = [(name, module) for name, module in model.named_modules() if name]
    hooks = [m.register_forward_hook(lambda m, a, out, n=n: outputs.setdefault(n, []).append(out)) for n, m in modules]
    plain = network(images)
    difference = (plain[0] - plain[1]).abs().max()
    if difference < 1e-7 * plain.abs().max():
        raise RuntimeError("the output hardly depends on the images, so that noise would prove nothing")
    for hook in hooks:
        hook.remove()
    counts: Counter[str] = Counter()
    missed, invented = [], []
    random.Random(0).shuffle(modules)  # noqa: S311  # so that those within the budget are a fair sample
    for name, module in modules:
        called = outputs.get(name, [])
        if name not in rows or len(called) != 1 or not isinstance(called[0], Tensor) or called[0].dim() not in (3, 4):
            continue
        x = called[0]
        if x.shape[0] != 2:
            continue
        if time.time() - start > budget:
            break
        y = replaced(network, module, torch.randn_like(x[:1]).expand_as(x), images)
        is_cut = bool((y[0] - y[1]).abs().max() <= LEFT * difference)
        takes = is_cut and any(takes_smaller(network, module, views, images) for views in smaller(model, x))
        counts["modules"] += 1
        counts["cut points"] += is_cut
        counts["true sites"] += takes
        valid = not rows[name].reason
        counts["valid"] += valid
        if valid and not takes:
            invented.append(name)
        if takes and not valid:
            missed.append(f"{name}: {rows[name].reason[:160]}")
    return {**counts, "missed": missed, "invented": invented}


def replaced(network: nn.Module, module: nn.Module, output: Tensor, images: Tensor) -> Tensor:
    hook = module.register_forward_hook(lambda m, args, out: output.clone())
    try:
        return network(images)
    finally:
        hook.remove()


def smaller(model: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Ten views of noise per image, of the size that the views of such a map have, for each layout it may have."""

    def side(n: int) -> int:
        return (5 * n + 3) // 6

    if x.dim() == 3:
        grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
        most = getattr(model, "num_prefix_tokens", 0)
        if hasattr(getattr(model, "config", None), "patch_size"):  # transformers
            grid, most = [model.config.image_size // model.config.patch_size] * 2, 2
        if grid and 0 <= x.shape[1] - grid[0] * grid[1] <= most:
            length = x.shape[1] - grid[0] * grid[1] + side(grid[0]) * side(grid[1])
            yield x.new_empty(20, length, x.shape[2]).normal_()
        return
    for first in (2, 1):
        shape = list(x.shape)
        shape[first], shape[first + 1] = side(shape[first]), side(shape[first + 1])
        if shape[first] < x.shape[first] and shape[first + 1] < x.shape[first + 1]:
            yield x.new_empty(20, *shape[1:]).normal_()


def takes_smaller(network: nn.Module, module: nn.Module, views: Tensor, images: Tensor) -> bool:
    try:
        return replaced(network, module, views, images).shape == (20, 7)
    except Exception:
        return False


# ---- the page --------------------------------------------------------------------------------------------------------

KINDS = {
    r"depends on the images by a path around": "inside a branch",
    r"is called \d+ times": "called more than once",
    r"is never called": "never called",
    r"returns (tuple|list|dict|\w+); a site": "returns no single tensor",
    r"does not say of which grid": "tokens without a stated grid",
    r"cannot take the views": "the network behind it cannot take a map of the views' size",
    r"a site returns a map|one map per sample": "no map",
    r"no module named": "no module of that name",
    r"the whole side|leaves nothing": "map too small",
    r"so which of them are height and width": "layout unclear",
}


def kind(reason: str) -> str:
    return next((name for pattern, name in KINDS.items() if re.search(pattern, reason)), reason[:80])


def page(stored: dict[str, Any], toolchain: str) -> str:
    """docs/compatibility.md."""
    seen = ", ".join(f"{library} {version}" for library, version in stored["versions"].items())
    results = stored["families"]
    return "\n".join(
        [*HEADER, f"Versions: {seen}.", "", *summary(results), "", *table(results), "", *TOOLS_HEADER, toolchain, ""]
    )


HEADER = [
    "# Compatibility",
    "",
    "Made by `python benchmarks/zoo.py`. `inject_crop_vote` was tried at every entry of `feature_info` of one or two",
    "models of every timm module, and at modules of the torchvision and transformers classifiers listed below,",
    "with ten views and random weights. A site that does not work is refused with an error that says why and names the",
    "valid ones. A family's first model was also run on images: its votes were compared with the tests' oracle, and a",
    "random sample of its modules was judged by noise (in place of a module's output, does it hide the image? do views",
    "of noise pass?), neither of which shares code with the library.",
    "",
]
TOOLS_HEADER = [
    "## PyTorch's tools",
    "",
    "Made from the table in `tests/toolchain.py`; each row is a test that compares with an independent oracle.",
    "",
]


def summary(results: list[dict[str, Any]]) -> list[str]:
    looked = [model for result in results for model in result["models"]]
    verdicts = Counter(v["verdict"] for model in looked for v in model["tried"].values())
    alike = sum(len(model.get("alike", [])) for model in looked)
    errors = [error for model in looked for error in model.get("oracle", {}).values()]
    points: Counter[str] = Counter()
    for model in looked:
        points.update({k: v for k, v in model.get("cut points", {}).items() if isinstance(v, int)})
    missed = sum(len(model.get("cut points", {}).get("missed", [])) for model in looked)
    invented = sum(len(model.get("cut points", {}).get("invented", [])) for model in looked)
    wrong = verdicts["wrong"] + sum(error > TOLERANCE for error in errors)
    return [
        "| counted | number |",
        "|---|---|",
        f"| families | {len(results)} |",
        f"| models | {len(looked)} |",
        f"| sites tried | {sum(verdicts.values())} |",
        f"| working | {verdicts['works']} |",
        f"| refused, with the reason | {verdicts['refused']} |",
        f"| crashed | {verdicts['crashed'] + sum('error' in result for result in results)} |",
        f"| wrong | {wrong} |",
        f"| votes compared with the oracle on real images | {len(errors)} |",
        f"| largest relative error among them | {max(errors, default=0):.0e} |",
        f"| sites among them behind which all views say the same (the last attention of a class token) | {alike} |",
        f"| modules judged by noise as well | {points['modules']} |",
        f"| true sites among them, by noise | {points['true sites']} |",
        f"| of these, accepted | {points['true sites'] - missed} ({rate(points['true sites'], missed)}) |",
        f"| accepted, but no true site by noise | {invented} |",
    ]


def rate(total: int, missed: int) -> str:
    return f"{100 * (total - missed) / max(total, 1):.2f} %"


TOLERANCE = 1e-4
ALIKE = 1e-6
LEFT = 1e-6  # of the difference that two images make


def table(results: list[dict[str, Any]]) -> list[str]:
    lines = ["| family | model | sites that work | layout | why the others do not |", "|---|---|---|---|---|"]
    for result in results:
        for model in result["models"]:
            tried = model["tried"]
            works = [site for site, verdict in tried.items() if verdict["verdict"] == "works"]
            why: dict[str, list[str]] = {}
            for site, verdict in tried.items():
                if verdict["verdict"] != "works":
                    why.setdefault(kind(verdict["reason"]), []).append(site)
            others = "; ".join(f"{reason}: {names(sites)}" for reason, sites in why.items())
            if not works and "listed" in model:
                others += f" (valid: {names(model['listed']) or 'none'})"
            layouts = ", ".join(sorted({v["layout"] for v in tried.values() if v["verdict"] == "works"}))
            lines.append(f"| {result['family']} | {model['model']} | {names(works)} | {layouts} | {others} |")
    return lines


def names(sites: list[str], most: int = 6) -> str:
    """Site names, many of them in short."""
    some = sites if len(sites) <= most else [*sites[:3], f"… ({len(sites)})", sites[-1]]
    return ", ".join(name if name.startswith("…") else f"`{name}`" for name in some)


def tools() -> str:
    from toolchain import LIMITS, RAISES, TOOLS

    lines = ["| tool | verdict | note |", "|---|---|---|"]
    for tool in TOOLS:
        verdict = "raises" if tool.name in RAISES else "does not work yet" if tool.name in LIMITS else "works"
        lines.append(f"| {tool.name} | {verdict} | {LIMITS.get(tool.name) or tool.note} |")
    return "\n".join(lines)


def versions() -> dict[str, str]:
    import transformers

    return {m.__name__: m.__version__ for m in (torch, torchvision, timm, transformers)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="such as timm/resnet; all where none is given")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="write the page again, without a sweep")
    arguments = parser.parse_args()
    results = {}
    if arguments.table or arguments.families:
        results = {result["family"]: result for result in json.loads(RESULTS.read_text())["families"]}
    if not arguments.table:
        chosen = arguments.families or families()
        with ProcessPoolExecutor(arguments.jobs, max_tasks_per_child=1) as pool:
            for i, future in enumerate(as_completed([pool.submit(sweep, family) for family in chosen]), 1):
                result = future.result()
                results[result["family"]] = result
                print(f"[{i}/{len(chosen)}]", short(result), flush=True)
                ordered = [results[family] for family in families() if family in results]
                RESULTS.write_text(json.dumps({"versions": versions(), "families": ordered}, indent=1) + "\n")
    PAGE.write_text(page(json.loads(RESULTS.read_text()), tools()))


def short(result: dict[str, Any]) -> str:
    """One line on the terminal."""
    parts = [f"{result['family']:36} {result['seconds']:4} s"]
    for model in result["models"]:
        counts = Counter(verdict["verdict"] for verdict in model["tried"].values())
        parts.append(f"{model['model']} {dict(counts)} listed {len(model.get('listed', []))}")
        if "oracle" in model:
            points = model["cut points"]
            parts.append(f"error {max(model['oracle'].values(), default=0):.0e}, noise {points}")
        parts += [
            f"{s} {v['verdict'].upper()}: {v['reason']}" for s, v in model["tried"].items() if v["verdict"] in BAD
        ]
    return "; ".join([*parts, result.get("error", "")])


BAD = ("wrong", "crashed")

if __name__ == "__main__":
    main()
