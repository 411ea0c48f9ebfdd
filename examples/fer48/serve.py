"""Serve a finished network over HTTP with Ray Serve: each face's class, its probability, and how many views agree.

    pip install "cropvote[serve]"
    python examples/fer48/serve.py
    curl -H "Content-Type: image/jpeg" --data-binary @face.jpg http://127.0.0.1:8000/predict
    curl -H "Content-Type: image/jpeg" --data-binary @photo.jpg "http://127.0.0.1:8000/predict?detect=1"
    curl -F pictures=@one.jpg -F pictures=@two.jpg http://127.0.0.1:8000/predict

Each picture should be a cropped face; ?detect=1 finds the faces first. While many faces wait, two views vote instead of
ten, and the answer says so; when the queue is full, the answer is 503. The service listens on this machine only unless
--host says otherwise; it has no password and no encryption, which are a reverse proxy's task.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # as important as what else runs here; Ray's default is 15
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # Ray's own ports on 127.0.0.1, on any system

try:
    import ray
    from ray import serve
    from ray.serve.metrics import Counter, Gauge, Histogram
except ImportError:
    sys.exit('serve.py: the service needs Ray: pip install "cropvote[serve]".')
from starlette.requests import Request
from starlette.responses import JSONResponse

import cropvote
import predict
from adapting import Pressure, read_views
from batches import to_input
from detecting import DetectError, Detector, best_detector
from keeping import WEIGHTS, KeptError, load_model
from predict import Face
from receiving import Limits, RefusedError, receive_pictures

#: Seconds after which a request is given up.
TIMEOUT = 60
#: Bytes of Ray's shared memory; requests and answers are small.
STORE = 100 * 2**20


class Service:
    """A replica: the network, a thread that runs it, and one that decodes and detects in the meantime."""

    def __init__(self, run: str, limits: Limits, pressure: Pressure, batch: int, wait: float) -> None:
        torch.set_num_threads(1)
        self.model, self.card = load_voting_model(run)
        self.version = version(self.card)
        self.limits, self.pressure, self.detector = limits, pressure, make_detector()
        self.reader, self.runner = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self.waiting = 0  # requests
        self.idle = asyncio.Event()
        self.idle.set()
        self.classify.set_max_batch_size(batch)  # type: ignore[attr-defined]
        self.classify.set_batch_wait_timeout_s(wait)  # type: ignore[attr-defined]
        self.faces = Counter("cropvote_faces", "Faces predicted.", ("views",))
        self.refused = Counter("cropvote_refused", "Requests refused as bad input.", ("status",))
        self.queue = Gauge("cropvote_waiting", "Requests that wait or are being answered.")
        self.sizes = Histogram("cropvote_batch_size", "Faces per batch.", [1, 2, 4, 8, 16, 32, 64, 128])
        self.seconds = Histogram("cropvote_batch_seconds", "Seconds per batch.", [0.01, 0.03, 0.1, 0.3, 1, 3, 10])

    async def __call__(self, request: Request) -> JSONResponse:
        """Answer a request: GET / describes the service, POST /predict predicts."""
        try:
            if (request.method, request.url.path) == ("GET", "/"):
                return JSONResponse(self.describe())
            if request.url.path != "/predict":
                raise RefusedError(404, "POST a picture to /predict; GET / describes the service.")
            if request.method != "POST":
                raise RefusedError(405, "POST a picture to /predict.")
            detect = request.query_params.get("detect", "0")
            if detect not in ("0", "1"):
                raise RefusedError(400, "detect is 0 or 1.")
            pictures = await receive_pictures(request, self.limits)
            with self.counted():
                return JSONResponse(await self.answer(pictures, detect == "1"))
        except RefusedError as error:
            self.refused.inc(tags={"status": str(error.status)})
            return JSONResponse({"error": str(error)}, error.status)

    def describe(self) -> dict[str, Any]:
        """Return what a client wants to know of the network and the limits."""
        known = {key: self.card.get(key) for key in ("data", "summary", "outputs")}
        return {"model": self.version, **known, "limits": vars(self.limits), "detect": self.detector is not None}

    async def answer(self, pictures: list[bytes], detect: bool) -> dict[str, Any]:
        """Return a row for each face, and the problem of each picture without one.

        Raises:
            RefusedError: If no picture can be read, or faces are to be detected and OpenCV is not installed.
        """
        if detect and self.detector is None:
            raise RefusedError(400, "This service doesn't detect faces, as OpenCV is not installed.")
        loop, found = asyncio.get_running_loop(), []
        for number, picture in enumerate(pictures):
            found += await loop.run_in_executor(self.reader, self.read, picture, number, detect)
        problems = [face for face in found if face.problem]
        faces = [(face, face.pixels) for face in found if face.pixels is not None]
        if not faces and all(face.problem != predict.NO_FACE for face in problems):
            raise RefusedError(400, f"The picture cannot be read: {problems[0].problem.rstrip('.')}.")
        rows = await asyncio.gather(*(self.join(pixels) for _, pixels in faces))
        return {
            "model": self.version,
            "faces": [
                {"picture": int(face.source), "box": face.box, **row}
                for (face, _), row in zip(faces, rows, strict=True)
            ],
            "problems": [{"picture": int(face.source), "problem": face.problem} for face in problems],
        }

    def read(self, picture: bytes, number: int, detect: bool) -> list[Face]:
        """Return the faces of a picture, the largest ones if there are more than allowed."""
        detector = self.detector if detect else None
        file, most = io.BytesIO(picture), self.limits.pixels
        return predict.read_faces(file, detector, source=str(number), max_pixels=most)[: self.limits.faces]

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count a request as waiting until it is answered or its client gives up."""
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    async def join(self, face: np.ndarray) -> dict[str, Any]:
        """Return a face's prediction, by the next batch.

        Ray forms batches while another one runs, and they would hold a face or two; what waits here goes in together.
        """
        await self.idle.wait()
        return await self.classify(face)

    @serve.batch
    async def classify(self, faces: list[np.ndarray]) -> list[dict[str, Any]]:
        """Return each face's prediction; Ray Serve calls it with the faces of several requests."""
        self.idle.clear()
        few, start = self.pressure.update(self.waiting), time.perf_counter()
        try:
            rows = await asyncio.get_running_loop().run_in_executor(self.runner, self.vote, faces, few)
        finally:
            self.idle.set()
        self.faces.inc(len(rows), {"views": str(rows[0]["views"])})
        self.queue.set(self.waiting)
        self.sizes.observe(len(rows))
        self.seconds.observe(time.perf_counter() - start)
        return rows

    def vote(self, faces: list[np.ndarray], few: bool) -> list[dict[str, Any]]:
        """Return the vote of few views or all over each face, uint8 (3, 48, 48)."""
        x = to_input(torch.from_numpy(np.stack(faces)))
        logits = read_views(self.model, x, few)
        names = self.card["outputs"]
        return [
            {
                **{key: row[key] for key in ("class", "probability", "agreement")},
                "views": logits.shape[1],
                "probabilities": {name: row[name] for name in names},
            }
            for row in predict.read_rows(logits, self.card)
        ]


def load_voting_model(run: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Return a finished network that votes over classes, and its card.

    Raises:
        KeptError: If the network does not vote, gives no classes, or has no centre view.
    """
    model, card = load_model(run)
    if card["after"] == "none" or card["target"] != "expression":
        raise KeptError(f"{card['folder']}: the service gives votes over expressions, and this network gives none.")
    read_views(model, torch.zeros(1, 3, 48, 48), few=True)
    return model, card


def version(card: dict[str, Any]) -> str:
    """Return a name that changes with the weights: the data's name and the start of the file's SHA-256."""
    return f"{card['data']}-{hashlib.sha256((Path(card['folder']) / WEIGHTS).read_bytes()).hexdigest()[:12]}"


def make_detector() -> Detector | None:
    """Return a detector that takes one core, or None if OpenCV is not installed."""
    try:
        detector = best_detector()
    except DetectError:
        return None
    import cv2

    cv2.setNumThreads(1)
    return detector


def application(options: argparse.Namespace) -> serve.Application:
    """Return the service as Ray Serve runs it: replicas of one core each, and a limit on what waits for them."""
    deployment = serve.deployment(
        name="faces", num_replicas=options.replicas, ray_actor_options={"num_cpus": 1}, health_check_period_s=2,
        max_ongoing_requests=options.ongoing, max_queued_requests=options.queue,
        logging_config={"enable_access_log": False},
    )(Service)  # fmt: skip
    pressure = Pressure(high=options.busy, low=options.calm)
    return deployment.bind(options.model, Limits(), pressure, options.batch, options.wait)


def start(options: argparse.Namespace) -> None:
    """Start Ray, unless ``--address`` names a cluster, and the service on it."""
    if options.address:
        ray.init(address=options.address, log_to_driver=False)
    else:
        ray.init(
            address="local", num_cpus=options.replicas, include_dashboard=False, object_store_memory=STORE,
            log_to_driver=False, _metrics_export_port=options.metrics_port,
        )  # fmt: skip
    serve.start(http_options={"host": options.host, "port": options.port, "request_timeout_s": TIMEOUT})
    serve.run(application(options), name="faces", route_prefix="/")


def stop() -> None:
    """Stop the service, and Ray with all its processes if it was started here."""
    serve.shutdown()
    ray.shutdown()


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    stopped = threading.Event()
    try:
        load_voting_model(options.model)  # its errors are clearer here than from a replica
        start(options)
        signal.signal(signal.SIGTERM, lambda *_: stopped.set())
        signal.signal(signal.SIGINT, lambda *_: stopped.set())
        print(f"http://{options.host}:{options.port}/predict is ready", flush=True)
        stopped.wait()
    except (KeptError, cropvote.CropVoteError, ValueError, OSError) as error:
        sys.exit(f"serve.py: {error}")
    finally:
        if ray.is_initialized():
            stop()


def parse(argv: list[str] | None) -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=str(predict.WEIGHTS), metavar="RUN", help="a finished run's folder")
    add("--host", default="127.0.0.1", help="the address to listen on; default: this machine only")
    add("--port", type=int, default=8000)
    add("--replicas", type=int, default=1, help="copies of the network, a core each")
    add("--batch", type=int, default=16, help="faces per batch at most")
    add("--wait", type=float, default=0.005, metavar="SECONDS", help="how long a batch waits for more faces")
    add("--ongoing", type=int, default=32, help="requests that a replica has accepted at most")
    add("--queue", type=int, default=64, help="requests that wait for a replica at most; more get 503")
    add("--busy", type=int, default=12, help="two views vote while a replica has at least this many requests,")
    add("--calm", type=int, default=4, help="ten again when it has this many or fewer")
    add("--address", help="of a running Ray cluster; default: start Ray here")
    add("--metrics-port", type=int, default=8090, help="where Prometheus finds Ray's metrics, on this machine only")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
