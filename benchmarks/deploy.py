"""Measure exported networks: milliseconds an image in the usual engines, on one thread of a CPU.

    python benchmarks/deploy.py [--rounds 15]      measure; needs pip install "cropvote[tools,timm]" and a C++ compiler
    python benchmarks/deploy.py --table            print the tables of docs/guides/export.md

Two networks, plain and with one, two and ten of the ten views: the face network of examples/fer48/weights at 48x48, and
timm's mobilenetv3_small_100 at 224x224 with random weights. Every engine's output is compared with PyTorch's, except
int8. All networks and engines take turns. The figures are medians, stored in benchmarks/results/deploy.json.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from cropvote import inject_crop_vote, settings

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples" / "fer48"))

from keeping import load_model  # noqa: E402
from pages import line  # noqa: E402
from timing import commit, machine  # noqa: E402

STORED = ROOT / "benchmarks" / "results" / "deploy.json"
BATCHES = (1, 16)
#: What is computed in eval mode, by its name in the tables.
WAYS = {"plain": None, "centre": "centre", "centre + mirror": "centre+mirror", "ten views": None}
Run = Callable[[Tensor], Tensor]


def faces() -> tuple[nn.Module, int]:
    return load_model(ROOT / "examples" / "fer48" / "weights")[0], 48


def mobilenet() -> tuple[nn.Module, int]:
    torch.manual_seed(0)
    model = timm.create_model("mobilenetv3_small_100", num_classes=7).eval()
    return inject_crop_vote(model, after="blocks.0", input_size=224), 224


NETWORKS = {"fer_resnet18, width 32, 48×48": faces, "mobilenetv3_small_100, 224×224": mobilenet}


def choose(model: nn.Module, way: str) -> None:
    settings(model).enabled = way != "plain"
    settings(model).eval_views = WAYS[way]


# --- engines: each returns a function of a batch of images -----------------------------------------------------------


def eager(model: nn.Module, size: int, folder: Path) -> Run:
    program = torch.export.export(model, (torch.zeros(2, 3, size, size),), dynamic_shapes=(batch(),))
    return program.module()  # the settings as they are now


def compiled(model: nn.Module, size: int, folder: Path) -> Run:
    program = torch.export.export(model, (torch.zeros(2, 3, size, size),), dynamic_shapes=(batch(),))
    return torch.compile(program.module(), dynamic=False)


def onnx_runtime(model: nn.Module, size: int, folder: Path) -> Run:
    return session(write_onnx(model, size, folder / "model.onnx"))


def int8(model: nn.Module, size: int, folder: Path) -> Run:
    from onnxruntime import quantization

    class Calibration(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(torch.randn(32, 3, size, size, generator=torch.Generator().manual_seed(1)).split(8))

        def get_next(self) -> dict[str, np.ndarray] | None:
            images = next(self.batches, None)
            return None if images is None else {"images": images.numpy()}

    path, prepared, out = (folder / f"{name}.onnx" for name in ("model", "prepared", "int8"))
    quantization.quant_pre_process(str(write_onnx(model, size, path)), str(prepared))
    quantization.quantize_static(
        str(prepared), str(out), Calibration(), per_channel=True, quant_format=quantization.QuantFormat.QDQ
    )
    return session(out)


def openvino(model: nn.Module, size: int, folder: Path) -> Run:
    import openvino

    program = torch.export.export(model, (torch.zeros(2, 3, size, size),), dynamic_shapes=(batch(),))
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    network = openvino.compile_model(openvino.convert_model(program), "CPU", config)
    return lambda images: torch.from_numpy(network(images.numpy())[0])


def executorch(model: nn.Module, size: int, folder: Path) -> Run:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.runtime import Runtime

    _unsafe_reset_threadpool(1)
    methods = {}
    for count in BATCHES:  # a file for each: ExecuTorch 1.5 takes at most 15 images where the batch is dynamic
        program = torch.export.export(model, (torch.zeros(count, 3, size, size),))
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
        path = folder / f"{count}.pte"
        path.write_bytes(lowered.buffer)
        methods[count] = Runtime.get().load_program(path).load_method("forward")
    return lambda images: methods[len(images)].execute([images])[0]


ENGINES = {
    "PyTorch": eager, "PyTorch, compiled": compiled, "ONNX Runtime": onnx_runtime, "ONNX Runtime, int8": int8,
    "OpenVINO": openvino, "ExecuTorch, XNNPACK": executorch,
}  # fmt: skip


def batch() -> dict[int, Any]:
    return {0: torch.export.Dim("batch", min=1, max=max(BATCHES))}


def write_onnx(model: nn.Module, size: int, path: Path) -> Path:
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(
            model, (torch.zeros(2, 3, size, size),), path, dynamo=True, dynamic_shapes=(batch(),),
            input_names=["images"], external_data=False, verbose=False,
        )  # fmt: skip
    return path


def session(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    network = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(network.run(None, {"images": images.numpy()})[0])


# --- all -------------------------------------------------------------------------------------------------------------


def runs(model: nn.Module, size: int, folder: Path) -> Iterator[tuple[str, str, Run]]:
    """Yield every engine with every way to predict, once its output is PyTorch's."""
    images = torch.randn(max(BATCHES), 3, size, size, generator=torch.Generator().manual_seed(2))
    for way in WAYS:
        choose(model, way)
        with torch.no_grad():
            expected = model(images)
        for engine, export in ENGINES.items():
            place = folder / f"{engine} {way}"
            place.mkdir()
            run = export(model, size, place)
            found = run(images)
            error = float((found - expected).norm() / expected.norm())
            if not error < (0.5 if engine.endswith("int8") else 1e-3):
                raise SystemExit(f"{engine}, {way}: the output differs from PyTorch's by {error:.2g}")
            print(f"{engine}, {way}: differs by {error:.1e}", flush=True)
            yield engine, way, run


@torch.no_grad()
def measure(make: Callable[[], tuple[nn.Module, int]], rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Return milliseconds per image by engine, batch size and way."""
    model, size = make()
    with tempfile.TemporaryDirectory() as folder:
        calls = list(runs(model, size, Path(folder)))
        times: dict[str, dict[str, dict[str, float]]] = {}
        for count in BATCHES:
            images = torch.randn(count, 3, size, size)
            taken: dict[tuple[str, str], list[float]] = {(engine, way): [] for engine, way, _ in calls}
            for i in range(rounds + 2):
                for engine, way, run in calls:
                    start = time.perf_counter()
                    run(images)
                    if i > 1:
                        taken[engine, way].append(1e3 * (time.perf_counter() - start) / count)
            for (engine, way), values in taken.items():
                times.setdefault(engine, {}).setdefault(str(count), {})[way] = statistics.median(values)
    return times


def table(stored: dict[str, Any]) -> str:
    """Return the tables of docs/guides/export.md."""
    lines: list[str] = []
    for name, times in stored["networks"].items():
        lines += [f"**{name}**", "", line("engine", "batch", *WAYS), "|---|---:" + len(WAYS) * "|---:" + "|"]
        for engine, by_batch in times.items():
            lines += [line(engine, count, *(f"{ms[way]:.2f}" for way in WAYS)) for count, ms in by_batch.items()]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    summary, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--table", action="store_true", help="only print the tables of the stored figures")
    options = parser.parse_args()
    if not options.table:
        warnings.simplefilter("ignore")  # the exporters' own deprecations
        torch.set_num_threads(1)
        networks = {name: measure(make, options.rounds) for name, make in NETWORKS.items()}
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        for engine in ("onnxruntime", "openvino", "executorch"):
            versions[engine] = version(engine)
        here = {"machine": machine(torch.device("cpu")), "versions": versions, "commit": commit()}
        STORED.write_text(json.dumps({"networks": networks, "rounds": options.rounds, **here}, indent=1) + "\n")
    print(table(json.loads(STORED.read_text())))


if __name__ == "__main__":
    main()
