"""app.py: what the page is made of, and the page itself in a browser."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.data import astronaut, coffee

import app
import predict
from cropvote import per_view
from data.pictures import ReadError
from detecting import Cascade, DetectError
from keeping import load_model
from scripts import refused

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture(scope="module")
def page() -> app.Page:
    model, card = load_model(predict.WEIGHTS)
    return app.Page(model.eval(), card, Cascade())


@pytest.fixture
def portrait(tmp_path: Path) -> Path:
    Image.fromarray(astronaut()).save(tmp_path / "portrait.png")
    return tmp_path / "portrait.png"


def test_it_says_what_the_network_says(page, portrait):
    picture, (box,) = page.find(str(portrait), detect=True)
    face, logits = page.read(picture, box)
    with torch.no_grad():
        x = torch.from_numpy(face.copy()).permute(2, 0, 1)[None] / 127.5 - 1
        assert torch.allclose(per_view(page.model, x)[0], logits, atol=1e-5)
    shares = page.shares(logits)
    assert max(shares, key=shares.get) == "happy"
    assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
    views = page.views(face, logits)
    assert [view.size for view, _ in views] == [(40, 40)] * 10
    best = logits.softmax(1).max(1)
    assert [text for _, text in views] == [
        f"{page.card['outputs'][i]} {p:.0%}" for p, i in zip(best.values, best.indices.tolist(), strict=True)
    ]


def test_fewer_views_and_the_other_vote(page):
    """Nine views are sure of class 0, but for the centre, which is a little surer of class 3."""
    logits = torch.zeros(10, 7)
    logits[:, 0] = 2
    logits[4, 3] = 3
    one, two, ten = page.votes(logits)
    assert one[1].startswith("happy")
    assert one[2] == "happy, 1 of 1"
    assert two[1].startswith("angry")
    assert two[2] in ("angry, 1 of 2", "happy, 1 of 2")
    assert ten[1].startswith("angry")
    assert ten[2] == "angry, 9 of 10"


def test_names_of_classes_are_text():
    shown = app.gallery([(Image.new("RGB", (4, 4)), "<b>happy</b> 9 %")])
    assert "<b>" not in shown
    assert "&lt;b&gt;" in shown


def test_no_face_and_no_picture(page, tmp_path):
    Image.fromarray(np.full((90, 90, 3), 200, np.uint8)).save(tmp_path / "wall.png")
    with pytest.raises(DetectError, match="turn the search off"):
        page.find(str(tmp_path / "wall.png"), detect=True)
    assert page.find(str(tmp_path / "wall.png"), detect=False)[1] == [None]
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(ReadError):
        page.find(str(tmp_path / "text.png"), detect=True)


def test_a_network_that_does_not_vote_is_refused(tmp_path):
    assert "app.py" in refused(app, "--model", tmp_path)


@pytest.fixture
def browser(tmp_path):
    """Chromium without a window, which notes every address that the page asks for."""
    if not (CHROMIUM and DRIVER):
        pytest.skip("chromium and chromedriver are not installed")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
        *("--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"),
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def address() -> Iterator[str]:
    """The page, served by a process of its own."""
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, app.__file__, "--port", str(port)], stdout=subprocess.DEVNULL)
    try:
        for _ in range(120):
            time.sleep(0.5)
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5):
                break
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.slow
def test_the_page_in_a_browser(address, portrait, tmp_path, browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def text() -> str:
        return browser.find_element(By.TAG_NAME, "body").text

    def choose(path: Path) -> None:
        browser.find_element(By.CSS_SELECTOR, "#picture input[type=file]").send_keys(str(path))

    def wait_for(*words: str) -> None:
        WebDriverWait(browser, 60).until(lambda _: all(word in text() for word in words), text())

    browser.set_window_size(1200, 1500)
    browser.get(address)
    WebDriverWait(browser, 60).until(
        lambda _: browser.find_elements(By.CSS_SELECTOR, "#picture input[type=file]"), "no page"
    )
    assert "FER2013" in text()
    choose(portrait)
    wait_for("happy, 10 of 10")
    assert len(browser.find_elements(By.CSS_SELECTOR, "#views img")) == 10
    assert "91%" in browser.find_element(By.ID, "shares").text

    browser.get(address)
    Image.fromarray(coffee()).save(tmp_path / "coffee.png")
    WebDriverWait(browser, 60).until(lambda _: browser.find_elements(By.CSS_SELECTOR, "#picture input[type=file]"))
    choose(tmp_path / "coffee.png")
    wait_for("No face found")

    browser.get(address)
    (tmp_path / "broken.png").write_bytes(portrait.read_bytes()[:2000])
    WebDriverWait(browser, 60).until(lambda _: browser.find_elements(By.CSS_SELECTOR, "#picture input[type=file]"))
    choose(tmp_path / "broken.png")
    wait_for("Error")
    events = [json.loads(row["message"])["message"] for row in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if url.startswith(("http", "ws")) and not url.startswith(address)] == []
