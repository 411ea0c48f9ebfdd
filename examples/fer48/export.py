"""Export a finished network with its vote to ONNX, for any batch size, and check the file against PyTorch.

    python examples/fer48/export.py
    python examples/fer48/export.py --model runs/FER2013-layer1-0

Without --model, it exports the shipped network. Classes, preprocessing, sites, views and vote are stored in the file's
metadata as JSON; predict_onnx.py predicts from the file, without PyTorch or cropvote.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import cropvote
from batches import to_input
from data.toy import toy_faces
from keeping import KeptError, load_model
from predict import WEIGHTS

#: Batch sizes to check, and the largest allowed difference from PyTorch, relative to the largest output.
BATCHES, TOLERANCE = (1, 2, 19), 1e-3
#: What of the model's card goes into the file's metadata; predict_onnx.py reads it.
TOLD = ("target", "outputs", "preprocessing", "after", "vote", "temperature", "data", "summary")


class ExportError(Exception):
    """The file was not written, or its outputs differ from the network's."""


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    try:
        model, card = load_model(options.model)
        folder = Path() if options.model == str(WEIGHTS) else Path(card["folder"])
        out = Path(options.out or folder / "model.onnx")
        worst = export(model, card, out)
    except (KeptError, ExportError, cropvote.CropVoteError, OSError) as error:
        sys.exit(f"export.py: {error}")
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, any batch; largest difference to PyTorch {worst:.1e}, relative")


def export(model: nn.Module, card: dict[str, Any], out: Path) -> float:
    """Write the file, and return its largest relative difference to PyTorch on toy faces."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  # torch.onnx.export needs it, but its error is less clear
    except ImportError as error:
        raise ExportError(f"{error.name} is not installed: pip install cropvote[onnx].") from error
    example = torch.zeros(2, 3, 48, 48)
    batch = {0: torch.export.Dim("batch", min=1, max=4096)}
    torch.onnx.export(
        model, (example,), str(out), dynamo=True, dynamic_shapes=(batch,), input_names=["faces"],
        output_names=["vote"], external_data=False, verbose=False,
    )  # fmt: skip
    written = onnx.load(str(out))
    told = {key: card[key] for key in TOLD if key in card}
    if card["after"] != "none":
        told["injection"] = cropvote.to_config(model)  # the sites and views, as inject_crop_vote takes them
    for key, value in told.items():
        written.metadata_props.add(key=key, value=json.dumps(value, ensure_ascii=False))
    onnx.checker.check_model(written)
    onnx.save(written, str(out))
    return check(model, onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"]))


def check(model: nn.Module, session: Any) -> float:
    """Return the largest difference between file and network over several batches, relative to the largest output.

    Raises:
        ExportError: If it is more than TOLERANCE.
    """
    worst = 0.0
    for size in BATCHES:
        x = to_input(torch.from_numpy(toy_faces(size, seed=size)[0]).unsqueeze(1)).contiguous()
        with torch.no_grad():
            expected = model(x)
        found = torch.from_numpy(session.run(None, {"faces": x.numpy()})[0])
        if found.shape != expected.shape:
            raise ExportError(f"{size} faces: the file gives {tuple(found.shape)}, PyTorch {tuple(expected.shape)}.")
        worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
    if not worst <= TOLERANCE:
        raise ExportError(f"the file's outputs differ from PyTorch's by {worst:.1e} of the largest.")
    return worst


def parse(argv: list[str] | None) -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(WEIGHTS), metavar="RUN", help="a finished run; default: the shipped one")
    parser.add_argument("--out", metavar="FILE", help="default: model.onnx in that folder")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
