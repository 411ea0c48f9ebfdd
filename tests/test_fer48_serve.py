"""serve.py: a real server on a free port of this machine."""

from __future__ import annotations

import csv
import io
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from skimage.data import astronaut

pytest.importorskip("ray", reason='Ray is not installed: pip install "cropvote[serve]"')

import predict
from adapting import Pressure
from load import FACE, Judge, Server, attack, face_png, in_threads, served
from scripts import call

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with served("--busy", "8", "--calm", "2") as server:
        yield server


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(face_png())


def encoded(picture: np.ndarray | Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(file, kind)
    return file.getvalue()


def form(*pictures: bytes) -> tuple[bytes, str]:
    """Return a multipart body of pictures, as ``curl -F`` sends it, and its content type."""
    head = b'--edge\r\nContent-Disposition: form-data; name="pictures"; filename="a.png"\r\n\r\n'
    return b"".join(
        head + picture + b"\r\n" for picture in pictures
    ) + b"--edge--\r\n", "multipart/form-data; boundary=edge"


def said_by_predict(picture: bytes, folder: Path, *options: str) -> dict[str, str]:
    """Return the csv row of predict.py for a picture."""
    (folder / "face").write_bytes(picture)
    call(predict, "--device", "cpu", "--csv", folder / "out.csv", *options, folder / "face")
    with (folder / "out.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    return row


def same(face: dict[str, object], row: dict[str, str]) -> bool:
    """Return whether an answer is a row of predict.py, up to the fourth digit."""
    shares = face["probabilities"]
    assert isinstance(shares, dict)
    assert all(share == pytest.approx(float(row[name]), abs=2e-4) for name, share in shares.items())
    assert face["probability"] == pytest.approx(float(row["probability"]), abs=2e-4)
    return (face["class"], face["agreement"]) == (row["class"], float(row["agreement"]))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_the_answer_is_that_of_predict(server, tmp_path, kind):
    picture = encoded(astronaut()[FACE], kind)
    status, answer = server.post(picture, f"image/{kind.lower()}")
    assert status == 200
    (face,) = answer["faces"]
    assert same(face, said_by_predict(picture, tmp_path))
    assert (face["picture"], face["box"], face["views"], answer["problems"]) == (0, None, 10, [])
    assert answer["model"].startswith("FER2013-")


def test_faces_are_detected_when_asked_for(server, tmp_path):
    picture = encoded(astronaut())
    _, answer = server.post(picture, path="/predict?detect=1")
    row = said_by_predict(picture, tmp_path, "--detect")
    assert same(answer["faces"][0], row)
    assert ",".join(map(str, answer["faces"][0]["box"])) == row["box"]
    status, answer = server.post(encoded(np.full((90, 90, 3), 200, np.uint8)), path="/predict?detect=1")
    assert (status, answer["faces"], answer["problems"]) == (200, [], [{"picture": 0, "problem": "no face found"}])


def test_a_batch_keeps_its_order_and_names_what_cannot_be_read(server, tmp_path):
    rng = np.random.default_rng(0)
    pictures = [encoded(rng.integers(256, size=(48, 48, 3), dtype=np.uint8)) for _ in range(20)]
    pictures[7], pictures[11] = b"not a picture", face_png()
    status, answer = server.post(*form(*pictures))
    assert status == 200
    assert [face["picture"] for face in answer["faces"]] == [i for i in range(20) if i != 7]
    assert [problem["picture"] for problem in answer["problems"]] == [7]
    for face in answer["faces"]:
        assert same(face, said_by_predict(pictures[face["picture"]], tmp_path))
    assert server.post(*form(*pictures * 4))[0] == 400  # more than 64


BAD = {
    "empty": (b"", "image/png", 400),
    "text": (b"hello", "image/png", 400),
    "truncated": (encoded(astronaut(), "JPEG")[:3000], "image/jpeg", 400),
    "100 megapixels": (encoded(Image.new("L", (10_000, 10_000))), "image/png", 400),
    "a bomb": (encoded(Image.new("1", (30_000, 30_000))), "image/png", 400),
    "too large a body": (bytes(17 * 2**20), "image/png", 413),
    "web page": (face_png(), "text/html", 415),
    "JSON": (b"{}", "application/json", 415),
    "form without a boundary": (face_png(), "multipart/form-data", 400),
    "empty form": (b"--edge--\r\n", "multipart/form-data; boundary=edge", 400),
    "field of text": (form(b"")[0].replace(b'; filename="a.png"', b""), form()[1], 400),
    "no picture in the form": (*form(b"a", b"b"), 400),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_sentence(server, judge, name):
    body, kind, expected = BAD[name]
    before, start = server.memory()["replica"], time.perf_counter()
    status, answer = server.post(body, kind)
    assert (status, list(answer)) == (expected, ["error"])
    assert answer["error"].endswith(".")
    assert "\n" not in answer["error"]
    assert "object at" not in answer["error"]
    assert time.perf_counter() - start < 5
    assert server.memory()["replica"] < before + 60  # nothing was decoded
    assert judge.right(server.post(face_png())[1])


def test_a_body_without_a_length_is_cut_off(server):
    """Chunks without end: the answer, or the end of the connection, comes after a little more than the limit."""
    import http.client

    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(2000):
            sent += 1
            yield bytes(2**16)

    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        connection.request("POST", "/predict", chunks(), {"Content-Type": "image/png"}, encode_chunked=True)
        assert connection.getresponse().status == 413
    except (ConnectionError, BrokenPipeError):
        pass  # it stopped to listen
    finally:
        connection.close()
    assert server.memory()["replica"] < 1500


def test_other_paths_and_methods(server):
    assert server.post(face_png(), path="/elsewhere")[0] == 404
    assert server.post(face_png(), path="/predict?detect=yes")[0] == 400
    assert server.get("/predict")[0] == 405
    status, text = server.get("/")
    assert status == 200
    assert '"outputs":["angry"' in text
    assert server.get("/-/healthz") == (200, "success")


def test_hostile_input_gets_answers_and_changes_none(server, judge):
    found = attack(server, judge, count=240, seed=1)
    assert found["bad"] == []
    assert found["known"] == {"right": 12}
    assert {"200", "400", "415"} == set(found["statuses"])


def test_fewer_views_vote_under_load_and_all_of_them_afterwards(server, judge):
    views: Counter[int] = Counter()
    wrong = []

    def client(_: int) -> None:
        for _ in range(6):
            status, answer = server.post(face_png())
            if status != 200 or not judge.right(answer):
                wrong.append((status, answer))
            else:
                views[answer["faces"][0]["views"]] += 1

    in_threads(16, client)
    assert wrong == []
    assert views[2] > 20
    assert set(views) <= {2, 10}
    assert server.post(face_png())[1]["faces"][0]["views"] == 10
    server.post(*form(*[face_png()] * 10))
    assert all(face["views"] == 10 for face in server.post(*form(*[face_png()] * 10))[1]["faces"])  # one request


def test_metrics_and_ports_are_for_this_machine(server):
    deadline = time.time() + 30
    while "cropvote_faces" not in (text := server.get("/metrics", server.metrics_port)[1]) and time.time() < deadline:
        time.sleep(1)
    assert 'views="10"' in text
    assert "cropvote_waiting" in text
    for process in [server.process, *server.process.children(recursive=True)]:
        for connection in process.net_connections("inet"):
            outside = connection.laddr.ip.removeprefix("::ffff:") != "127.0.0.1"
            if outside and process in server.actors("ServeReplica"):
                outside = (
                    connection.status != psutil.CONN_LISTEN
                )  # Ray's port between deployments, which asks for a token
            assert not outside, (process.name(), connection)


def test_a_killed_replica_is_replaced(server, judge):
    """Requests fail, or wait for the new replica; none gets a wrong answer, and all are right on retry."""
    (old,) = server.actors("ServeReplica")
    answered, killed = threading.Semaphore(0), threading.Event()
    failed, wrong = [], []

    def kill() -> None:
        for _ in range(8):  # two answers a client, so that all four are asking
            assert answered.acquire(timeout=60)
        os.kill(old.pid, signal.SIGKILL)
        killed.set()

    def client(_: int) -> None:
        right_since = 0
        deadline = time.time() + 120
        while right_since < 4:
            since = killed.is_set()
            status, answer = server.post(face_png())
            if status == 200:
                wrong.extend([] if judge.right(answer) else [answer])
                right_since += since
                answered.release()
            else:
                failed.append(status)
                time.sleep(0.1)
            assert time.time() < deadline, (right_since, failed)

    killer = threading.Thread(target=kill)
    killer.start()
    in_threads(4, client)
    killer.join()
    assert wrong == []
    assert all(status == 0 or status >= 500 for status in failed)
    (new,) = server.actors("ServeReplica")
    assert new.pid != old.pid


def test_a_full_queue_answers_503_and_nothing_is_left_running(judge):
    statuses: Counter[int] = Counter()
    with served("--ongoing", "1", "--queue", "2") as server:

        def client(_: int) -> None:
            for _ in range(5):
                status, answer = server.post(face_png())
                statuses[status] += 1
                assert status != 200 or judge.right(answer)

        in_threads(12, client)
        assert set(statuses) == {200, 503}
        assert judge.right(server.post(face_png())[1])
        started = [server.process, *server.process.children(recursive=True)]
    assert psutil.wait_procs(started, timeout=10)[1] == []


def test_the_pressure_has_two_thresholds():
    pressure = Pressure(high=8, low=2)
    assert [pressure.update(n) for n in (1, 7, 8, 5, 3, 2, 7, 9)] == [
        False,
        False,
        True,
        True,
        True,
        False,
        False,
        True,
    ]
    with pytest.raises(ValueError, match="low < high"):
        Pressure(high=2, low=2)
