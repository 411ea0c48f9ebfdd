"""Where a run happens: one process on a CPU or GPU, or several started by torchrun."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class MachineError(Exception):
    """This machine cannot run the options given; the message says what is missing."""


@dataclass(frozen=True)
class Machine:
    """This process: its device, its precision and its rank."""

    device: torch.device
    precision: torch.dtype
    fast: bool
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Return whether this process is the one that prints and writes."""
        return self.rank == 0

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32)

    def mine(self, rows: Tensor) -> Tensor:
        """Return every ``size``-th row, so each belongs to exactly one process."""
        return rows[self.rank :: self.size]

    def gather(self, thing: Any) -> list[Any]:
        """Return every process's object, in rank order, to all processes."""
        if self.size == 1:
            return [thing]
        things: list[Any] = [None] * self.size
        dist.all_gather_object(things, thing)
        return things

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of a tensor over all processes."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.size
        return value

    def share_buffers(self, model: nn.Module) -> None:
        """Copy the first process's buffers to all: BatchNorm's statistics differ, as each has seen other faces."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def wait(self) -> None:
        """Wait until every process gets here."""
        if self.size > 1:
            dist.barrier()

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """Run the first process before the others, which then use its result (a cache, for example)."""
        if not self.first:
            self.wait()
        yield  # if the first fails, the others wait until torchrun ends them
        if self.first:
            self.wait()

    def name(self) -> str:
        if self.device.type == "cuda":
            return f"cuda: {torch.cuda.get_device_name(self.device)}"
        return f"{self.device.type}: {platform.processor() or platform.machine()}"


@contextlib.contextmanager
def machine(device: str, precision: str = "", fast: bool = False) -> Iterator[Machine]:
    """Yield this process's machine; under torchrun it joins the process group and leaves it at the end.

    Raises:
        MachineError: If there is no CUDA device, fewer than processes, or float16 is set on a CPU.
    """
    gpus, size = torch.cuda.device_count(), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda" and gpus == 0:
        raise MachineError("--device cuda: PyTorch sees no CUDA device here; use --device auto or cpu.")
    on_gpu = gpus > 0 and device != "cpu"
    if on_gpu and local >= gpus:
        raise MachineError(f"torchrun started process {local} here, and this machine has {gpus} GPUs.")
    if not on_gpu and precision == "float16":
        raise MachineError("--precision float16 needs a GPU; use bfloat16 or float32.")
    place = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(place)
        torch.backends.cudnn.benchmark = fast  # all batches have one size, so one search per kernel is enough
    kind = getattr(torch, precision or ("bfloat16" if fast else "float32"))
    if size == 1:
        yield Machine(place, kind, fast)
        return
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(hours=2))  # decoding takes long
    try:
        yield Machine(place, kind, fast, dist.get_rank(), dist.get_world_size())
    finally:
        gc.collect()  # free models that hold the group, whose threads could crash the exit
        dist.destroy_process_group()
