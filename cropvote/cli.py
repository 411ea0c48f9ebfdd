"""The command line: ``cropvote sites MODEL``, ``profile``, ``suggest``, ``rank``, and ``cropvote doctor``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

__all__: list[str] = []

#: The names of :data:`cropvote.cuts.NAMES`; that module, and PyTorch, are loaded once a command runs.
VIEWS = ("ten", "five", "hflip", "d4")
EXAMPLES = """MODEL is timm:NAME, torchvision:NAME, or package.module:function, which is called without arguments.
Nothing is downloaded: the weights are random, or those of --checkpoint.

  cropvote sites timm:resnet18
  cropvote profile torchvision:resnet50 --size 224
  cropvote profile mynet:build --size 3x48x48 --views five --plot cost.png
  cropvote profile timm:resnet18 --after layer1=hflip --after layer3=five
  cropvote suggest timm:resnet18 --max-macs-ratio 4
  cropvote rank timm:resnet18 --data photos/val --checkpoint model.safetensors
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0, or 2 after a one-line error."""
    arguments = _parser().parse_args(argv)
    if arguments.command == "doctor":
        from .doctor import report

        print(report())
        return 0
    from .commands import run  # which loads PyTorch: not needed for --help

    return run(arguments)


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="cropvote", description="Where to split a network, and what it costs.", epilog=EXAMPLES,
        formatter_class=formatter,
    )  # fmt: skip
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    doctor = "versions and devices, for a bug report"
    commands.add_parser("doctor", help=doctor, description=doctor).set_defaults(command="doctor")
    for name, summary, description in (
        ("sites", "the places where a split is sound", "List the places where a split is sound."),
        ("profile", "work and memory of a split after each stage", "Count what a split costs after each stage."),
        ("suggest", "the earliest stage within a budget", "Name the earliest stage whose cost is within a budget."),
        ("rank", "which views pay on your own pictures", "Try views on a trained network and pictures of yours."),
    ):
        command = commands.add_parser(
            name,
            help=summary,
            description=description,
            epilog=EXAMPLES.partition("\n\n")[0],
            formatter_class=formatter,
        )
        command.set_defaults(command=name)
        add = command.add_argument
        add("model", metavar="MODEL", help="timm:NAME, torchvision:NAME or package.module:function")
        add("--size", help="the image: 48, 48x64 or 3x48x48; needless for timm models")
        if name != "rank":
            add("--views", choices=VIEWS, default="ten", help="ten (default), five, hflip or d4")
        form = command.add_mutually_exclusive_group()
        form.add_argument("--json", action="store_true", help="print JSON")
        if name != "suggest":
            form.add_argument("--markdown", action="store_true", help="print a Markdown table")
        if name in ("profile", "suggest"):
            add("--every-site", action="store_true", help="every valid site, not only the stages")
            add("--align", action="store_true", help="align the views to the strides behind each site")
        if name == "sites":
            add("--all", action="store_true", help="also the modules that are not valid sites, and why")
        elif name == "rank":
            add("--data", type=Path, required=True, metavar="FOLDER", help="pictures, in a folder for each class")
            add("--checkpoint", type=Path, metavar="FILE", help="the weights: .safetensors, or of torch.save")
            add("--try", dest="tried", action="append", metavar="SITE=VIEWS,...", help="a candidate; once for each")
            add("--mean", type=float, nargs="+", metavar="X", help="of each channel; the model's own, or ImageNet's")
            add("--std", type=float, nargs="+", metavar="X", help="of each channel; the model's own, or ImageNet's")
            add("--limit", type=int, metavar="N", help="at most N pictures, drawn once")
            add("--batch", type=int, default=64, metavar="N", help="pictures at a time (64)")
            add("--device", help="where to run: cpu, cuda ...")
            add("--plot", metavar="FILE", type=Path, help="also draw accuracy over work (.png, .svg, .pdf)")
        elif name == "suggest":
            add("--max-macs-ratio", type=float, metavar="X", help="at most X times the plain network's multiply-adds")
            add("--max-memory-mib", type=float, metavar="X", help="at most X MiB per image in training")
        else:
            add("--sites", nargs="+", metavar="SITE", help="only these")
            add("--after", action="append", metavar="SITE=VIEWS", help="a plan over several sites; once for each site")
            add("--measure", action="store_true", help="also milliseconds per image")
            add("--device", help="where to measure: cpu, cuda ...")
            add("--plot", metavar="FILE", type=Path, help="also draw cost against memory (.png, .svg, .pdf)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
