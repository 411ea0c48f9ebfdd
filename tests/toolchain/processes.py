"""Several processes or threads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from cropvote import CropVoteLoss
from toolchain.table import (
    TARGETS,
    Split,
    agree,
    agree_all,
    expected,
    images,
    oracle_gradients,
    still,
    tool,
    voting,
)


@tool("DataParallel", "each replica votes on its share of the batch")
def _(_path: Path, split: Split) -> None:
    model = voting(split)
    for replica in (model._replicate_for_data_parallel(), nn.DataParallel(model)):
        if isinstance(replica, nn.DataParallel):
            agree(replica(images()), expected(split))
            continue
        for name, child in model.named_children():  # as in torch.nn.parallel.replicate
            setattr(replica, name, child)
        agree(replica(images()), expected(split))


@tool("DistributedDataParallel", "two processes compute the same gradients as one with the whole batch", slow=True)
def _(path: Path, split: Split) -> None:
    agree_all(_two_processes(_ddp, path, split), oracle_gradients(split))


@tool("FSDP2 fully_shard", "sharded after the injection, two processes compute the same gradients as one", slow=True)
def _(path: Path, split: Split) -> None:
    agree_all(_two_processes(_fsdp, path, split), oracle_gradients(split))


def _two_processes(worker: Callable, path: Path, split: Split) -> dict[str, Tensor]:
    torch.multiprocessing.spawn(_process, (worker, str(path), split), nprocs=2)
    return torch.load(path / "gradients.pt", weights_only=True)


def _process(rank: int, worker: Callable, path: str, split: Split) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/gloo", rank=rank, world_size=2)
    share = slice(2 * rank, 2 * rank + 2)
    found = worker(images(4)[share], TARGETS[share], split)
    if rank == 0:
        torch.save(found, f"{path}/gradients.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _ddp(x: Tensor, targets: Tensor, split: Split) -> dict[str, Tensor]:
    model = nn.parallel.DistributedDataParallel(still(voting(split)))
    CropVoteLoss(nn.CrossEntropyLoss(), views=10)(model(x), targets).backward()
    return {name: p.grad for name, p in model.module.named_parameters()}


def _fsdp(x: Tensor, targets: Tensor, split: Split) -> dict[str, Tensor]:
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    model = still(voting(split))
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        fully_shard(stage, mesh=mesh)
    fully_shard(model, mesh=mesh)
    CropVoteLoss(nn.CrossEntropyLoss(), views=10)(model(x), targets).backward()
    found = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    agree(model.eval()(images()), expected(split))
    return found
