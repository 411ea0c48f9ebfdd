"""The display during training: one progress bar for the run, one line per epoch."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor
from tqdm import tqdm

BOARD = "tensorboard"


class Progress:
    """A bar with loss, rate, faces per second and time left (terminal only), and TensorBoard logs if installed.

    The loss is copied from the device at one refresh and shown at the next, so training never waits for the bar.
    """

    def __init__(self, folder: Path, epochs: int, faces: int, done: int, shown: bool) -> None:
        self.epochs, self.shown = epochs, shown
        self.loss: tuple[Tensor, int] | None = None
        self.bar = tqdm(
            total=epochs * faces, initial=done * faces, unit=" faces", unit_scale=True, mininterval=0.5,
            smoothing=0.1, disable=None if shown else True,
        )  # fmt: skip
        self.board = _board(folder) if shown else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.bar.close()
        if self.board is not None:
            self.board.close()

    def step(self, faces: int, epoch: int, total: Tensor, steps: int, rate: float) -> None:
        """Update the bar after a batch; ``total`` is the summed loss of the epoch's ``steps`` batches so far."""
        if self.bar.update(faces):
            loss = "" if self.loss is None else f"{self.loss[0].item() / self.loss[1]:.3f}"
            self.bar.set_description_str(f"epoch {epoch + 1}/{self.epochs}", refresh=False)
            self.bar.set_postfix_str(f"loss {loss}, rate {rate:.1e}", refresh=False)
            self.loss = total.detach().to("cpu", non_blocking=True, copy=True), steps

    def scoring(self, epoch: int) -> None:
        """Show that the epoch's training is done and validation has begun."""
        self.bar.set_description_str(f"epoch {epoch + 1}/{self.epochs}, validation")

    def epoch(self, row: dict[str, Any], measure: str) -> None:
        """Print a permanent line after an epoch."""
        if not self.shown:
            return
        scored = f", {measure} {row['score']:.3f}" if "score" in row else ""
        speed = f"{row['faces_per_second']:,.0f} faces/s"
        self.bar.write(f"epoch {row['epoch']}/{self.epochs}: loss {row['loss']:.3f}{scored}, {speed}")
        if self.board is not None:
            for name in row.keys() - {"epoch"}:
                self.board.add_scalar(name, row[name], row["epoch"])


def _board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / BOARD))
