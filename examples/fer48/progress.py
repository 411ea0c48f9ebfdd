"""What a person sees while a network trains: one bar for the whole run, a line for every epoch."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor
from tqdm import tqdm

BOARD = "tensorboard"


class Progress:
    """A bar with loss, rate, faces a second and time left (on a terminal only), and TensorBoard's files if installed.

    The loss is copied from the device at one refresh and shown at the next, so the device never waits for the bar.
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
        """After a batch: ``total`` is the sum of the losses of the epoch's ``steps`` batches so far."""
        if self.bar.update(faces):
            loss = "" if self.loss is None else f"{self.loss[0].item() / self.loss[1]:.3f}"
            self.bar.set_description_str(f"epoch {epoch + 1}/{self.epochs}", refresh=False)
            self.bar.set_postfix_str(f"loss {loss}, rate {rate:.1e}", refresh=False)
            self.loss = total.detach().to("cpu", non_blocking=True, copy=True), steps

    def scoring(self, epoch: int) -> None:
        """The epoch's batches are done; its validation faces are read now."""
        self.bar.set_description_str(f"epoch {epoch + 1}/{self.epochs}, validation")

    def epoch(self, row: dict[str, Any], measure: str) -> None:
        """After an epoch: one line that stays."""
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
