"""Load the service of examples/fer48/serve.py, soak it, kill its replica and feed it hostile input: docs/serving.md.

    python benchmarks/load.py rates detected killed hostile soak --minutes 20
    python benchmarks/load.py --page

Every part starts the service on a free port of this machine and stores its figures in benchmarks/results/load.json.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import http.client
import io
import itertools
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from skimage.data import astronaut

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "fer48"
sys.path.insert(0, str(EXAMPLE))

import predict  # noqa: E402
from adapting import read_views  # noqa: E402
from batches import to_input  # noqa: E402
from detecting import Detector, best_detector  # noqa: E402
from keeping import load_model  # noqa: E402
from load_page import page  # noqa: E402
from predict import read_faces, read_rows  # noqa: E402
from timing import commit, machine  # noqa: E402

STORED = ROOT / "benchmarks" / "results" / "load.json"
PAGE = ROOT / "docs" / "serving.md"
CLIENTS = (1, 2, 4, 8, 16, 32)
SERVICES = {"adaptive": (), "always ten views": ("--busy", "100000"), "two replicas": ("--replicas", "2")}
VIEWS = (10, 2)
#: The box of the astronaut's face, NASA's photograph, in the public domain.
FACE = (slice(44, 126), slice(178, 260))


@dataclass
class Server:
    """A running service."""

    port: int
    metrics_port: int
    process: psutil.Process

    def get(self, path: str, port: int | None = None) -> tuple[int, str]:
        """Return the status of a page, 0 without a connection, and its text."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port or self.port, timeout=10)) as connection:
            try:
                connection.request("GET", path)
                answer = connection.getresponse()
                return answer.status, answer.read().decode()
            except (OSError, http.client.HTTPException):
                return 0, ""

    def post(self, body: bytes, kind: str = "image/png", path: str = "/predict") -> tuple[int, dict[str, Any]]:
        """Post a body on a connection of its own; return the status, 0 if the connection broke, and the answer."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)) as connection:
            return post(connection, body, kind, path)

    def actors(self, name: str) -> list[psutil.Process]:
        """Return the processes of Ray Serve's replicas or proxies; their names are cut to 15 characters."""
        found = []
        for process in self.process.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.name().startswith(f"ray::{name}"[:15]):
                    found.append(process)
        return found

    def memory(self) -> dict[str, float]:
        """Return the resident MiB of the replicas and the proxy."""
        kinds = {"replica": "ServeReplica", "proxy": "ProxyActor"}
        return {kind: sum(p.memory_info().rss for p in self.actors(name)) / 2**20 for kind, name in kinds.items()}


def post(
    connection: http.client.HTTPConnection, body: bytes, kind: str, path: str = "/predict"
) -> tuple[int, dict[str, Any]]:
    try:
        connection.request("POST", path, body, {"Content-Type": kind})
        answer = connection.getresponse()
        status, text = answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        connection.close()  # the next request opens it again
        return 0, {}
    try:
        return status, json.loads(text)
    except ValueError:
        return status, {}  # Ray's own errors are plain text


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def served(*options: str) -> Iterator[Server]:
    """Run the service in a process of its own, and end it with everything it started."""
    port, metrics = free_port(), free_port()
    command = [sys.executable, str(EXAMPLE / "serve.py"), "--port", str(port), "--metrics-port", str(metrics)]
    process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL)  # noqa: S603
    server = Server(port, metrics, psutil.Process(process.pid))
    try:
        while server.get("/")[0] != 200:
            if process.poll() is not None:
                raise SystemExit("the service did not start")
            time.sleep(0.2)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def face_png() -> bytes:
    return png(astronaut()[FACE])


class Plain:
    """The same network without a service: the right answers, and the rate of a plain loop."""

    def __init__(self, detector: Detector | None = None) -> None:
        torch.set_num_threads(1)
        self.model, self.card = load_model(predict.WEIGHTS)
        self.detector = detector

    def answer(self, pictures: list[bytes], views: int) -> list[dict[str, Any]]:
        """Decode pictures, find a face in each if there is a detector, and predict them as one batch."""
        faces = [read_faces(io.BytesIO(picture), self.detector, source="")[0].pixels for picture in pictures]
        logits = read_views(self.model, to_input(torch.from_numpy(np.stack(faces))), few=views == 2)
        return read_rows(logits, self.card)

    def rate(self, picture: bytes, views: int, batch: int, seconds: float) -> float:
        """Return the faces per second of a loop."""
        self.answer([picture] * batch, views)
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            self.answer([picture] * batch, views)
            count += batch
        return count / (time.perf_counter() - start)


class Judge:
    """Tells right answers to a known face from wrong ones."""

    def __init__(self, picture: bytes, detector: Detector | None = None) -> None:
        plain = Plain(detector)
        self.expected = {views: plain.answer([picture], views)[0] for views in VIEWS}

    def right(self, answer: dict[str, Any]) -> bool:
        """Return whether an answer is the plain loop's; the fourth digit may differ with the batch."""
        faces = answer.get("faces", ())
        if len(faces) != 1:
            return False
        expected, row = self.expected[faces[0]["views"]], faces[0]
        close = abs(row["probability"] - expected["probability"]) < 1e-3
        return bool(close and (row["class"], row["agreement"]) == (expected["class"], expected["agreement"]))


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run ``work(number)`` in threads, wait for all, and raise what one of them raised."""
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, range(count)))


def load(
    server: Server, clients: int, seconds: float, picture: bytes, judge: Judge, path: str = "/predict"
) -> dict[str, Any]:
    """Return the rate, latencies, views and statuses while each client sends one picture after another."""
    taken: list[float] = []
    statuses: Counter[int] = Counter()
    views: Counter[int] = Counter()
    wrong = [0] * clients
    stop = time.perf_counter() + seconds

    def client(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        while time.perf_counter() < stop:
            start = time.perf_counter()
            status, answer = post(connection, picture, "image/png", path)
            statuses[status] += 1
            if status == 200:
                taken.append(time.perf_counter() - start)
                views[answer["faces"][0]["views"]] += 1
                wrong[number] += not judge.right(answer)
        connection.close()

    start = time.perf_counter()
    in_threads(clients, client)
    cuts = statistics.quantiles(taken, n=100)
    return {
        "faces_per_second": len(taken) / (time.perf_counter() - start),
        "p50_ms": 1e3 * cuts[49],
        "p99_ms": 1e3 * cuts[98],
        "two_views_share": views[2] / len(taken),
        "statuses": dict(statuses),
        "wrong": sum(wrong),
    }


def rates(seconds: float, rounds: int) -> dict[str, Any]:
    """Measure every service and number of clients, and the plain loop before each, ``rounds`` times in turn."""
    picture, plain = face_png(), Plain()
    judge = Judge(picture)
    found: dict[str, Any] = {"seconds": seconds, "rounds": rounds, "loop": {}, "services": {}, **busy()}
    for name, options in SERVICES.items():
        with served(*options) as server:
            load(server, 1, 2, picture, judge)
            for _ in range(rounds):
                for views, batch in ((10, 1), (10, 16), (2, 1), (2, 16)):
                    rate = plain.rate(picture, views, batch, seconds / 2)
                    found["loop"].setdefault(f"{views} views, batch {batch}", []).append(rate)
                for clients in CLIENTS:
                    row = load(server, clients, seconds, picture, judge)
                    found["services"].setdefault(name, {}).setdefault(str(clients), []).append(row)
                    print(name, clients, row, flush=True)
    return found


def busy() -> dict[str, float]:
    """Return how many processes wanted to run in the last minute."""
    return {"load_before": os.getloadavg()[0]}


def detected(seconds: float, rounds: int) -> dict[str, Any]:
    """Measure a photograph with one face, found by the service, beside the face alone; ten views."""
    detector = best_detector()
    photograph, face = png(astronaut()), face_png()
    kinds = {
        "photograph": (photograph, Judge(photograph, detector), "/predict?detect=1"),
        "face": (face, Judge(face), "/predict"),
    }
    found: dict[str, Any] = {"seconds": seconds, "rounds": rounds, "detector": type(detector).__name__, **busy()}
    with served(*SERVICES["always ten views"]) as server:
        for picture, judge, path in kinds.values():
            load(server, 1, 2, picture, judge, path)
        for _ in range(rounds):
            for clients in (1, 8):
                for name, (picture, judge, path) in kinds.items():
                    row = load(server, clients, seconds, picture, judge, path)
                    found.setdefault(name, {}).setdefault(str(clients), []).append(row)
                    print(name, clients, row, flush=True)
    return found


def killed() -> dict[str, Any]:
    """Kill the only replica under load; every failed request is sent again until it is answered."""
    picture = face_png()
    judge = Judge(picture)
    events: list[tuple[float, int, bool]] = []
    with served() as server:
        (old,) = server.actors("ServeReplica")
        stop = threading.Event()

        def client(_: int) -> None:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
            while not stop.is_set():
                status, answer = post(connection, picture, "image/png")
                events.append((time.perf_counter(), status, status == 200 and judge.right(answer)))
                if status != 200:
                    time.sleep(0.1)

        def kill() -> float:
            time.sleep(5)
            os.kill(old.pid, signal.SIGKILL)
            moment = time.perf_counter()
            time.sleep(40)
            stop.set()
            return moment

        moments: list[float] = []
        killer = threading.Thread(target=lambda: moments.append(kill()))
        killer.start()
        in_threads(4, client)
        killer.join()
        again = server.actors("ServeReplica")
    right = sorted(moment for moment, _, good in events if good)
    gap, end = max((b - a, b) for a, b in itertools.pairwise(right))
    failed = [moment - moments[0] for moment, status, _ in events if status != 200]
    return {
        "clients": 4,
        "requests": len(events),
        "right": len(right),
        "wrong": sum(status == 200 and not good for _, status, good in events),
        "failed": {str(k): v for k, v in Counter(status for _, status, _ in events if status != 200).items()},
        "first_right_answer_after_s": end - moments[0],
        "last_failure_after_s": max(failed, default=0.0),
        "gap_s": gap,
        "replicas_after": len(again),
    }


def damaged(rng: random.Random, bases: list[bytes]) -> tuple[bytes, str]:
    """Return a hostile body and its content type."""
    kinds = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/x", "application/octet-stream"]
    odd = ["text/html", "application/json", "multipart/form-data", "multipart/form-data; boundary=x", "\xff", ";", ""]
    body = bytearray(rng.choice(bases))
    how = rng.choice(["random", "cut", "flip", "header", "joined", "size", "form", "empty"])
    if how == "random":
        body = bytearray(rng.randbytes(rng.choice([1, 10, 1000, 100_000])))
    elif how == "cut":
        del body[rng.randrange(len(body)) :]
    elif how == "flip":
        for _ in range(rng.choice([1, 3, 30])):
            body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
    elif how == "header":
        for _ in range(4):
            body[rng.randrange(min(64, len(body)))] = rng.randrange(256)
    elif how == "joined":
        body = body[: len(body) // 2] + rng.choice(bases)
    elif how == "size" and body[:4] == b"\x89PNG":
        body[16:24] = rng.choice([b"\0" * 8, b"\x7f\xff\xff\xff" * 2, b"\0\0\x27\x10" * 2, b"\0\0\0\1\x7f\xff\xff\xff"])
    elif how == "form":
        head = rng.choice(
            [b'form-data; name="a"; filename="b"', b"form-data", b"", b'form-data; name="a"', rng.randbytes(9)]
        )
        part = b"--x\r\nContent-Disposition: " + head + b"\r\n\r\n" + bytes(body) + b"\r\n--x"
        return part + rng.choice([b"--\r\n", b"", b"\r\n"]), "multipart/form-data; boundary=x"
    elif how == "empty":
        body = bytearray()
    return bytes(body), rng.choice(odd if rng.random() < 0.15 else kinds)


def pictures() -> list[bytes]:
    """Return a face in the formats that the service reads."""
    face, files = Image.fromarray(astronaut()[FACE]), []
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        file = io.BytesIO()
        face.save(file, kind)
        files.append(file.getvalue())
    return files


def attack(server: Server, judge: Judge, count: int, clients: int = 4, seed: int = 0) -> dict[str, Any]:
    """Send hostile bodies, every 25th with ?detect=1, and after each 20 of them the known face."""
    picture, bases = face_png(), pictures()
    statuses: Counter[int] = Counter()
    known: Counter[str] = Counter()
    bad: list[str] = []

    def client(number: int) -> None:
        rng = random.Random(f"{seed} {number}")  # noqa: S311
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        for turn in range(count // clients):
            body, kind = damaged(rng, bases)
            status, answer = post(connection, body, kind, "/predict?detect=1" if turn % 25 == 0 else "/predict")
            statuses[status] += 1
            sentence = answer.get("error", "")
            refused = 400 <= status < 500 and sentence and "\n" not in sentence
            if not (refused or (status == 200 and "faces" in answer)):
                bad.append(f"{status} {kind} {body[:20].hex()} {answer}")
            if turn % 20 == 19:
                status, answer = post(connection, picture, "image/png")
                known["right" if status == 200 and judge.right(answer) else f"wrong, {status}"] += 1
        connection.close()

    in_threads(clients, client)
    counts = {str(status): count for status, count in sorted(statuses.items())}
    return {"statuses": counts, "known": dict(known), "failed": len(bad), "bad": bad[:20]}


def hostile(count: int) -> dict[str, Any]:
    """Attack a service, and say whether its replica is still the same process."""
    judge = Judge(face_png())
    with served() as server:
        before, (old,) = server.memory(), server.actors("ServeReplica")
        start = time.perf_counter()
        found = attack(server, judge, count)
        same = [process.pid for process in server.actors("ServeReplica")] == [old.pid]
        return {"inputs": count, "seconds": time.perf_counter() - start, **found, "same_replica": same,
                "memory_before": before, "memory_after": server.memory()}  # fmt: skip


def soak(minutes: float) -> dict[str, Any]:
    """Keep the service busy with faces, and a hostile body after every tenth, and record its memory."""
    picture, bases = face_png(), pictures()
    judge = Judge(picture)
    counts: Counter[str] = Counter()
    with served() as server:
        stop, start = time.perf_counter() + 60 * minutes, time.perf_counter()

        def client(number: int) -> None:
            rng = random.Random(number)  # noqa: S311
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
            while time.perf_counter() < stop:
                for _ in range(10):
                    status, answer = post(connection, picture, "image/png")
                    counts["right" if status == 200 and judge.right(answer) else f"wrong or failed, {status}"] += 1
                status, _ = post(connection, *damaged(rng, bases))
                counts["hostile, answered" if 200 <= status < 500 else f"hostile, {status}"] += 1

        memory: list[dict[str, float]] = []

        def watch() -> None:
            while time.perf_counter() < stop:
                memory.append({"s": time.perf_counter() - start, **server.memory()})
                time.sleep(10)

        watcher = threading.Thread(target=watch)
        watcher.start()
        in_threads(4, client)
        watcher.join()
    return {"minutes": minutes, "clients": 4, "counts": dict(counts), "memory": memory}


def save(name: str, figures: dict[str, Any]) -> None:
    """Store a part's figures, with what they were measured on and when."""
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    stored[name] = {
        "machine": machine(torch.device("cpu")),
        "versions": {"python": sys.version.split()[0], **{n: version(n) for n in ("torch", "ray", "pillow")}},
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        **figures,
    }
    STORED.write_text(json.dumps(stored, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help="rates, detected, killed, hostile, soak")
    parser.add_argument("--seconds", type=float, default=6, help="of each number of clients")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--inputs", type=int, default=10_000, help="hostile ones")
    parser.add_argument("--minutes", type=float, default=20, help="of the soak")
    parser.add_argument("--page", action="store_true", help="rewrite docs/serving.md without measuring")
    options = parser.parse_args()
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "rates": lambda: rates(options.seconds, options.rounds),
        "detected": lambda: detected(options.seconds, options.rounds),
        "killed": killed,
        "hostile": lambda: hostile(options.inputs),
        "soak": lambda: soak(options.minutes),
    }
    unknown = set(options.parts) - parts.keys()
    if unknown or not (options.parts or options.page):
        parser.error(f"name parts of {', '.join(parts)}, or --page")
    for part in options.parts:
        save(part, parts[part]())
    PAGE.write_text(page(json.loads(STORED.read_text())))


if __name__ == "__main__":
    main()
