"""Engines that run exported networks without PyTorch."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

import networks
import oracle
from toolchain.table import Split, agree, expected, images, tool, voting


def write_onnx(path: Path, split: Split, make: Callable[[], nn.Module] = networks.fer) -> Path:
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.onnx.export(
            voting(split, make), (images(2),), path, dynamo=True, dynamic_shapes=(batch,), input_names=["images"]
        )
    return path


@tool("ONNX", "`torch.onnx.export(dynamo=True)`, dynamic batch, run in ONNX Runtime with 1, 2 and 7 images")
def _(path: Path, split: Split) -> None:
    import onnxruntime

    first = Split("a Sequential's first module", "0", (("0", oracle.ten_views),))
    for make, where in ((networks.fer, split), (networks.plain, first)):
        file = write_onnx(path / "model.onnx", where, make)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        for count in (1, 2, 7):
            found = session.run(None, {"images": images(count).numpy()})[0]
            agree(torch.from_numpy(found), expected(where, count, make), 1e-4)


@tool(
    "ONNX Runtime, int8",
    "static quantisation, calibrated, one scale per channel; logits within 5 % of their spread",
    slow=True,
)
def _(path: Path, split: Split) -> None:
    import onnxruntime
    from onnxruntime import quantization

    class Calibration(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(images(32).split(8))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch.numpy()}

    quantization.quant_pre_process(str(write_onnx(path / "model.onnx", split)), str(path / "prepared.onnx"))
    quantization.quantize_static(
        str(path / "prepared.onnx"), str(path / "int8.onnx"), Calibration(), per_channel=True,
        quant_format=quantization.QuantFormat.QDQ,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(path / "int8.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 2, 7):
        found = torch.from_numpy(session.run(None, {"images": images(count).numpy()})[0])
        wanted = expected(split, count)
        agree(found, wanted, 0.05 * float(wanted.std()))


@tool("OpenVINO", "from a `torch.export` program, dynamic batch, float32, with 1, 2 and 7 images", slow=True)
def _(_path: Path, split: Split) -> None:
    import openvino

    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(voting(split), (images(2),), dynamic_shapes=(batch,))
    compiled = openvino.compile_model(openvino.convert_model(program), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for count in (1, 2, 7):
        agree(torch.from_numpy(compiled(images(count).numpy())[0]), expected(split, count), 1e-4)


@tool(
    "ExecuTorch",
    "with XNNPACK, in its own runtime, with 1, 2 and 7 images; a dynamic batch has at most 15 images",
    slow=True,
)
def _(path: Path, split: Split) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(voting(split), (images(2),), dynamic_shapes=(batch,))
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    (path / "model.pte").write_bytes(lowered.buffer)
    method = Runtime.get().load_program(path / "model.pte").load_method("forward")
    for count in (1, 2, 7):
        agree(method.execute([images(count)])[0], expected(split, count), 1e-4)
