"""A page to try the network on a picture or the webcam: the class, the ten views and what each says, and the votes.

    pip install "cropvote[app]"
    python examples/fer48/app.py
    python examples/fer48/app.py --model runs/RAF-DB-layer1-0 --port 7861

The page is served on this machine only. Pictures stay on it: nothing is uploaded, counted or fetched from elsewhere.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import os
import sys
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import predict
from batches import to_input
from cropvote import settings, split_views, vote
from cropvote.cuts import parts_of
from data.pictures import ReadError, read_picture, shrink
from detecting import DetectError, Detector, best_detector
from keeping import KeptError, load_model
from learner import look
from machines import machine

#: How many views are asked, in words, and their indices in the order of ten_crop().
ASKED = {"one: the centre": [4], "two: centre and mirror": [4, 9], "ten": list(range(10))}
#: Faces of one picture that can be chosen.
MOST = 12
STYLE = """
.views {display: grid; grid-template-columns: repeat(auto-fill, minmax(110px, 1fr)); gap: 10px}
.views figure {margin: 0; text-align: center}
.views img {width: 100%; image-rendering: pixelated; border-radius: 4px}
"""
Box = tuple[int, int, int, int]


class Page:
    """The network, and what the page shows of a picture."""

    def __init__(self, model: nn.Module, card: dict[str, Any], detector: Detector) -> None:
        self.model, self.card, self.detector = model, card, detector

    def find(self, path: str, detect: bool) -> tuple[np.ndarray, list[Box | None]]:
        """Return the picture and the boxes of its faces; the whole picture, None, where none is looked for.

        Raises:
            ReadError: not a picture that can be read.
            DetectError: no face was found.
        """
        picture = np.asarray(read_picture(path))
        boxes: list[Box | None] = list(self.detector.boxes(picture)[:MOST]) if detect else [None]
        if not boxes:
            raise DetectError(
                "No face found. The detector sees upright faces that look at the camera; for a picture that is cropped "
                "to a face, turn the search off."
            )
        return picture, boxes

    def read(self, picture: np.ndarray, box: Box | None) -> tuple[np.ndarray, Tensor]:
        """Return the face as the network sees it, (48, 48, 3), and the logits of its ten views, (10, k)."""
        face = np.asarray(shrink(picture, box))
        with machine("cpu") as here:
            x = to_input(torch.from_numpy(face.transpose(2, 0, 1)[None].copy()))
            return face, look(self.model, x, here, voting=True)[0]

    def shares(self, logits: Tensor) -> dict[str, float]:
        """Return the calibrated probability of every class by the vote of all views."""
        row = predict.read_rows(logits[None], self.card)[0]
        return {name: row[name] for name in self.card["outputs"]}

    def views(self, face: np.ndarray, logits: Tensor) -> list[tuple[Image.Image, str]]:
        """Return every view, and the class that it chose."""
        cut = torch.from_numpy(face.transpose(2, 0, 1)[None].copy())
        for part in parts_of(settings(self.model).views):
            cut = split_views(cut, part)
        names = self.card["outputs"]
        return [
            (Image.fromarray(view.permute(1, 2, 0).numpy()), f"{names[int(share.argmax())]} {share.max():.0%}")
            for view, share in zip(cut, logits.softmax(1), strict=True)
        ]

    def votes(self, logits: Tensor) -> list[list[str]]:
        """Return a row for each number of views: the answer of the soft vote, and of the hard one."""
        rows = []
        for words, views in ASKED.items():
            some = logits[views]
            soft = vote(some, len(views), "soft")[0].div(self.card.get("temperature", 1.0)).softmax(0)
            hard = int(vote(some, len(views), "hard")[0].argmax())
            count = int((some.argmax(1) == hard).sum())
            names = self.card["outputs"]
            rows.append(
                [words, f"{names[int(soft.argmax())]} {soft.max():.0%}", f"{names[hard]}, {count} of {len(views)}"]
            )
        return rows


def table(rows: list[list[str]]) -> str:
    """Return the votes as Markdown."""
    head = ["| views asked | soft vote | hard vote |", "|---|---|---|"]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)])


def gallery(views: list[tuple[Image.Image, str]]) -> str:
    """Return pictures with a line below each as HTML, as many in a row as fit."""
    figures = []
    for picture, words in views:
        file = io.BytesIO()
        picture.save(file, "PNG")
        source = base64.b64encode(file.getvalue()).decode()
        words = html.escape(words)
        figures.append(
            f'<figure><img src="data:image/png;base64,{source}" alt="{words}"><figcaption>{words}</figcaption></figure>'
        )
    return f'<div class="views">{"".join(figures)}</div>'


def build(page: Page) -> Any:
    """Return the Gradio page."""
    import gradio as gr

    def show(path: str | None, detect: bool, number: int | None) -> list[Any]:
        if path is None:  # the picture was taken away
            return [gr.AnnotatedImage(visible=False), gr.Radio(choices=[], visible=False), None, "", ""]
        try:
            picture, boxes = page.find(path, detect)
            chosen = min(number or 0, len(boxes) - 1)
            face, logits = page.read(picture, boxes[chosen])
        except (ReadError, DetectError) as error:
            raise gr.Error(str(error), print_exception=False) from error
        marked: list[Any] = [(box, f"face {i + 1}") for i, box in enumerate(boxes) if box is not None]
        found = gr.AnnotatedImage((picture, marked), visible=bool(marked))
        choices = gr.Radio([(f"face {i + 1}", i) for i in range(len(boxes))], value=chosen, visible=len(boxes) > 1)
        return [found, choices, page.shares(logits), table(page.votes(logits)), gallery(page.views(face, logits))]

    with gr.Blocks(title="Ten views of a face", analytics_enabled=False) as blocks:
        gr.Markdown(
            f"# Ten views of a face vote\nTrained on {page.card['data']} ({page.card['summary']}). A class is "
            f"what annotators would say that the face shows, not what the person feels. Your picture stays on this "
            f"machine."
        )
        with gr.Row():
            with gr.Column():
                picture = gr.Image(
                    type="filepath", sources=["upload", "webcam", "clipboard"], label="picture", elem_id="picture"
                )
                detect = gr.Checkbox(True, label="look for faces")
                marked = gr.AnnotatedImage(label="faces found", show_legend=False, height=280, visible=False)
                number = gr.Radio(choices=[], label="which face", visible=False)
            with gr.Column():
                shares = gr.Label(label="vote of the ten views, calibrated", elem_id="shares")
                votes = gr.Markdown(elem_id="votes")
                gr.Markdown("**The ten views, and what each of them says:**")
                views = gr.HTML(elem_id="views")
        results = [marked, number, shares, votes, views]
        for event in (picture.change, detect.input):
            event(show, [picture, detect, gr.State(None)], results)
        number.input(show, [picture, detect, number], results)
    return blocks


def launch(blocks: Any, port: int | None, inbrowser: bool) -> None:
    """Serve the page on this machine alone, with the reader's own fonts, until Ctrl+C."""
    import gradio as gr

    fonts: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}
    blocks.launch(
        server_name="127.0.0.1", server_port=port, share=False, ssr_mode=False, max_file_size="20mb", footer_links=[],
        theme=gr.themes.Default(**fonts), css=STYLE, inbrowser=inbrowser,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    try:
        model, card = load_model(options.model)
        if card["after"] == "none" or card["target"] != "expression":
            raise KeptError(f"{card['folder']}: the page shows votes over expressions, and this network gives none.")
        blocks = build(Page(model.eval(), card, best_detector()))
    except ImportError:
        sys.exit('app.py: the page needs Gradio: pip install "cropvote[app]".')
    except (KeptError, DetectError, OSError) as error:
        sys.exit(f"app.py: {error}")
    launch(blocks, options.port, options.open)


def parse(argv: list[str] | None) -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(predict.WEIGHTS), metavar="RUN", help="a finished run's folder")
    parser.add_argument(
        "--port", type=int, metavar="NUMBER", help="of the page; by default the first free one from 7860"
    )
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
