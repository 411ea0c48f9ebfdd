"""One table of what PyTorch's tools do to a voting model: each entry is a check, and a row of docs/compatibility.md.

A check raises an AssertionError where the tool gives another number than the oracle. ``RAISES`` are the tools that must
refuse, each with the message; ``LIMITS`` are those that ought to work and do not, each with the reason.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import oracle
import timm
import timm.optim
import timm.utils
import torch
import zoo
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cropvote import CropVoteLoss, inject_crop_vote, remove_crop_vote, settings

SIDE = 48
TARGETS = torch.tensor([0, 4, 6, 1])


class Tool(NamedTuple):
    name: str
    note: str
    check: Callable[[Path], None]
    slow: bool = False


TOOLS: list[Tool] = []
RAISES: dict[str, str] = {}
LIMITS: dict[str, str] = {}


def tool(name: str, note: str = "", *, raises: str = "", limit: str = "", slow: bool = False) -> Callable:
    """Enter a check in the table."""

    def enter(check: Callable[[Path], None]) -> Callable[[Path], None]:
        TOOLS.append(Tool(name, note, check, slow))
        if raises:
            RAISES[name] = raises
        if limit:
            LIMITS[name] = limit
        return check

    return enter


def images(count: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(count)).to(dtype)


def voting(site: str = "layer2", make: Callable[[], nn.Module] = zoo.fer, **options: object) -> nn.Module:
    return inject_crop_vote(make(), after=site, input_size=SIDE, **options)


@functools.cache
def expected(count: int = 3, site: str = "layer2", make: Callable[[], nn.Module] = zoo.fer) -> Tensor:
    """The soft vote as the oracle's hooks and loops find it, on a model that was never injected."""
    with torch.no_grad():
        return oracle.vote(oracle.tail_rows(make(), site, images(count)), "soft").float()


def agree(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    assert (found.float() - wanted.float()).abs().max() <= tolerance, (found - wanted).abs().max()


# ---- compilers and exporters -----------------------------------------------------------------------------------------


@tool("torch.compile", "`fullgraph=True, dynamic=True`, compiled after the injection; settings changed later are seen")
def _(_path: Path) -> None:
    model = voting()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (2, 3, 7):
        agree(compiled(images(count)), expected(count))
    settings(model).eval_output = "views"
    assert compiled(images()).shape == (30, 7)
    settings(model).enabled = False
    agree(compiled(images()), zoo.fer()(images()))


@tool("torch.compile before the injection", "the injection and the removal are seen by the compiled model")
def _(_path: Path) -> None:
    model = zoo.fer()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    agree(compiled(images()), model(images()))
    inject_crop_vote(model, after="layer2", input_size=SIDE)
    for count in (2, 3):
        agree(compiled(images(count)), expected(count))
    remove_crop_vote(model)
    agree(compiled(images()), zoo.fer()(images()))


@tool("torch.compile with Inductor", "training step and vote, dynamic batch", slow=True)
def _(_path: Path) -> None:
    model, plain = voting(), voting()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for count in (2, 7):
        with torch.no_grad():
            agree(compiled(images(count)), expected(count), 1e-4)
    loss = CropVoteLoss(nn.CrossEntropyLoss())
    for step in (compiled, plain):
        loss(step.train()(images(4)), TARGETS).backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        agree(one.grad, other.grad, 1e-3)


@tool("torch.export", "strict and not, dynamic batch; settings are frozen as they were at the export")
def _(_path: Path) -> None:
    for strict in (True, False):
        model = voting()
        batch = {0: torch.export.Dim("batch", min=2, max=64)}
        program = torch.export.export(model, (images(4),), dynamic_shapes=(batch,), strict=strict).module()
        settings(model).vote = "hard"  # too late
        for count in (2, 3, 7):
            agree(program(images(count)), expected(count))


@tool("torch.export, AOTInductor", "compiled package, dynamic batch", slow=True)
def _(path: Path) -> None:
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    with torch.no_grad():
        program = torch.export.export(voting(), (images(4),), dynamic_shapes=(batch,))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(path / "model.pt2"))
    model = torch._inductor.aoti_load_package(package)
    for count in (2, 7):
        agree(model(images(count)), expected(count), 1e-4)


@tool("ONNX", "`torch.onnx.export(dynamo=True)`, dynamic batch, run in ONNX Runtime with 1, 2 and 7 images")
def _(path: Path) -> None:
    import onnxruntime

    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    for make, site in ((zoo.fer, "layer2"), (zoo.plain, "0")):
        file = path / "model.onnx"
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # the exporter's own deprecations
            torch.onnx.export(
                voting(site, make), (images(2),), file, dynamo=True, dynamic_shapes=(batch,), input_names=["images"]
            )
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        for count in (1, 2, 7):
            found = session.run(None, {"images": images(count).numpy()})[0]
            agree(torch.from_numpy(found), expected(count, site, make), 1e-4)


@tool("torch.jit.trace", "any batch size; settings are frozen")
def _(_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        traced = torch.jit.trace(voting(), images(2))
    for count in (1, 2, 7):
        agree(traced(images(count)), expected(count))


@tool("torch.jit.script", "use `torch.export`", raises=r"forward|argument|cropvote")
def _(_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(voting())


@tool("torch.fx.symbolic_trace", "trace before the injection, or use `torch.export`", raises="torch.fx cannot trace")
def _(_path: Path) -> None:
    torch.fx.symbolic_trace(voting())


@tool("torchvision's create_feature_extractor", "extract from the model before the injection", raises="torch.fx cannot")
def _(_path: Path) -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    create_feature_extractor(voting(), ["layer2"])


# ---- copies and files ------------------------------------------------------------------------------------------------


@tool("copy.deepcopy and pickle", "the copy votes and has settings of its own")
def _(_path: Path) -> None:
    model = voting()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        agree(twin(images()), expected())
        settings(twin).enabled = False
        agree(model(images()), expected())


@tool("state_dict", "the plain model's keys, loaded with `weights_only=True`, both ways")
def _(path: Path) -> None:
    torch.save(voting().state_dict(), path / "voting.pt")
    torch.save(zoo.fer().state_dict(), path / "plain.pt")
    torch.manual_seed(9)
    other = voting(make=lambda: zoo.fer_resnet18(width=8).eval())
    other.load_state_dict(torch.load(path / "plain.pt", weights_only=True))
    agree(other(images()), expected())
    plain = zoo.fer()
    plain.load_state_dict(torch.load(path / "voting.pt", weights_only=True))
    agree(plain(images()), zoo.fer()(images()))


@tool("meta device", "shapes without data, `to_empty`, weights loaded after the injection")
def _(_path: Path) -> None:
    with torch.device("meta"):
        model = zoo.fer_resnet18(width=8).eval()
    inject_crop_vote(model, after="layer2", input_size=SIDE)
    assert model(images().to("meta")).shape == (3, 7)
    model.to_empty(device="cpu").load_state_dict(zoo.fer().state_dict())
    agree(model(images()), expected())


# ---- numbers ---------------------------------------------------------------------------------------------------------


@tool("autocast", "bfloat16 and float16; the vote is float32")
def _(_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            found = voting()(images())
            assert voting().train()(images()).shape == (30, 7)
        assert found.dtype == torch.float32
        agree(found, expected(), 0.05)


@tool("float64, bfloat16, float16", "the vote is float64 for float64, else float32")
def _(_path: Path) -> None:
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.01)):
        found = voting().to(dtype)(images(3, dtype))
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        agree(found, expected(), tolerance)


@tool("channels_last", "stays channels_last behind the split")
def _(_path: Path) -> None:
    model, seen = voting().to(memory_format=torch.channels_last), []
    model.layer2.register_forward_hook(lambda module, args, output: seen.append(output))
    agree(model(images().to(memory_format=torch.channels_last)), expected())
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


@tool("torchao", "int8 weight-only quantisation of a voting model")
def _(_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = inject_crop_vote(zoo.tokens(), after="blocks.0", input_size=SIDE)
    exact = model(images())
    quantize_(model, Int8WeightOnlyConfig())
    assert type(model.head.weight).__name__ != "Parameter"
    assert not torch.equal(model(images()), exact)
    agree(model(images()), exact, 0.05)


@tool("torch.nn.utils.prune", "before and after the injection, also at the site")
def _(_path: Path) -> None:
    from torch.nn.utils import prune

    def pruned(model: nn.Module) -> nn.Module:
        prune.l1_unstructured(model.site, "weight", amount=0.5)
        return model

    make = functools.partial(_seeded, zoo.Net)
    wanted = oracle.vote(oracle.tail_rows(pruned(make()), "site", images()), "soft")
    agree(inject_crop_vote(pruned(make()), after="site", input_size=SIDE)(images()), wanted)
    agree(pruned(inject_crop_vote(make(), after="site", input_size=SIDE))(images()), wanted)


@tool("parametrisations", "before and after the injection, also at the site; undo in the reverse order")
def _(_path: Path) -> None:
    from torch.nn.utils import parametrizations

    make = functools.partial(_seeded, zoo.Net)
    wanted = oracle.vote(oracle.tail_rows(make(), "site", images()), "soft")
    for early in (True, False):
        model = make()
        if early:
            parametrizations.weight_norm(model.site)
        inject_crop_vote(model, after="site", input_size=SIDE)
        if not early:
            parametrizations.weight_norm(model.site)
        agree(model(images()), wanted)


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


# ---- training --------------------------------------------------------------------------------------------------------


def gradients(model: nn.Module, count: int = 4) -> dict[str, Tensor]:
    model.zero_grad()
    CropVoteLoss(nn.CrossEntropyLoss(), views=10)(model(images(count)), TARGETS[:count]).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def still(model: nn.Module) -> nn.Module:
    """In training mode but for BatchNorm, whose statistics would depend on how the batch is shared out."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


def agree_all(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        agree(tensor, wanted[name], tolerance)


@functools.cache
def oracle_gradients(site: str = "layer2") -> dict[str, Tensor]:
    model = still(zoo.fer())
    oracle.loss_on_views(oracle.tail_rows(model, site, images(4)), TARGETS).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@tool("an optimizer made before the injection", "trains the same parameters")
def _(_path: Path) -> None:
    model = zoo.fer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    inject_crop_vote(model, after="layer2", input_size=SIDE)
    gradients(still(model))
    optimizer.step()
    moved = {name: (before[name] - p.detach()) / 0.1 for name, p in model.named_parameters()}
    agree_all(moved, oracle_gradients(), 1e-4)


@tool("timm's param_groups_layer_decay", "the same groups as for the plain model")
def _(_path: Path) -> None:
    def groups(model: nn.Module) -> list[tuple[float, list[int]]]:
        names = {id(p): i for i, p in enumerate(model.parameters())}
        found = timm.optim.param_groups_layer_decay(model, weight_decay=0.1, layer_decay=0.7)
        return [(group["lr_scale"], [names[id(p)] for p in group["params"]]) for group in found]

    model = zoo.timm_resnet()
    plain = groups(model)
    assert groups(inject_crop_vote(model, after="layer1")) == plain
    assert len(plain) > 5


@tool("torch.utils.checkpoint", "of the front, the site and the tail, reentrant and not")
def _(_path: Path) -> None:
    for reentrant in (False, True):
        for name in ("layer1", "layer2", "layer3"):
            model = still(voting())
            _checkpointed(model.get_submodule(name), reentrant)
            agree_all(gradients(model), oracle_gradients())


def _checkpointed(module: nn.Module, reentrant: bool) -> None:
    """Let each child of a Sequential run in a checkpoint, which is how timm and torchvision users do it."""
    for child in module:

        def forward(x: Tensor, run: Callable = child.forward) -> Tensor:
            return checkpoint(run, x, use_reentrant=reentrant)

        child.forward = forward


@tool("timm's set_grad_checkpointing", "on before or after the injection")
def _(_path: Path) -> None:
    wanted = gradients(still(voting(make=zoo.timm_resnet)))
    for early in (True, False):
        model = zoo.timm_resnet()
        if early:
            model.set_grad_checkpointing(True)
        inject_crop_vote(model, after="layer2", input_size=SIDE)
        model.set_grad_checkpointing(True)
        agree_all(gradients(still(model)), wanted)


@tool("EMA", "`timm.utils.ModelEmaV3` and `torch.optim.swa_utils.AveragedModel`")
def _(_path: Path) -> None:
    model = voting()
    averages = {"ema": timm.utils.ModelEmaV3(model, decay=0.25), "mean": torch.optim.swa_utils.AveragedModel(model)}
    for average in averages.values():
        agree(average.eval()(images()), expected())
    with torch.no_grad():
        averages["mean"].update_parameters(model)
        model.fc.weight.mul_(2)
        averages["ema"].update(model)
        averages["mean"].update_parameters(model)
    for name, share in (("ema", 0.75), ("mean", 0.5)):
        plain = zoo.fer()
        with torch.no_grad():
            plain.fc.weight.mul_(1 + share)
        agree(averages[name](images()), oracle.vote(oracle.tail_rows(plain, "layer2", images()), "soft"))


@tool("torch.func", "`functional_call`, `vmap` over models, `grad`")
def _(_path: Path) -> None:
    model = voting()
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    agree(torch.func.functional_call(model, state, (images(),)), expected())
    stacked = {name: torch.stack([t, t]) for name, t in state.items()}
    batch = images()
    found = torch.func.vmap(lambda s: torch.func.functional_call(model, s, (batch,)))(stacked)
    for one in found:
        agree(one, expected())
    loss = CropVoteLoss(nn.CrossEntropyLoss())
    still(model)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    batch = images(4)
    found = torch.func.grad(lambda s: loss(torch.func.functional_call(model, s, (batch,)), TARGETS))(parameters)
    agree_all(found, oracle_gradients())


class Faces(torch.utils.data.Dataset):
    """The images and targets as a loader's rows."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def __len__(self) -> int:
        return len(TARGETS)

    def __getitem__(self, index: int) -> object:
        row = images(4)[index], TARGETS[index]
        return dict(zip(self.names, row, strict=True)) if self.names else row


@tool("Lightning", "`CropVoteLoss` in `training_step`, the vote in `validation_step`: docs/recipes.md")
def _(path: Path) -> None:
    import lightning

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = still(voting())
            self.loss = CropVoteLoss(nn.CrossEntropyLoss(), views=10)

        def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
            still(self.model)
            return self.loss(self.model(batch[0]), batch[1])

        def on_after_backward(self) -> None:
            agree_all({name: p.grad.clone() for name, p in self.model.named_parameters()}, oracle_gradients())
            self.trained = True

        def validation_step(self, batch: list[Tensor], _index: int) -> None:
            self.votes = self.model(batch[0])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.model.parameters(), lr=0.0)

    module = Classifier()
    loader = torch.utils.data.DataLoader(Faces(), batch_size=4)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=path,
        enable_checkpointing=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, loader, loader)
    assert module.trained
    agree(module.votes, expected(4))


@tool("Hugging Face's Trainer", "`compute_loss_func=`, since a loss computed inside the model would precede the vote")
def _(path: Path) -> None:
    import transformers

    model = inject_crop_vote(zoo.hf_resnet(), after="resnet.encoder.stages.1", input_size=SIDE)
    criterion = CropVoteLoss(nn.CrossEntropyLoss(), views=10)
    losses = []

    def loss(outputs: dict, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
        losses.append((len(outputs["logits"]), criterion(outputs["logits"], labels)))
        return losses[-1][1]

    arguments = transformers.TrainingArguments(
        path, per_device_train_batch_size=4, max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no", learning_rate=0.0, logging_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    data = Faces("pixel_values", "labels")
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data, compute_loss_func=loss)
    trainer.train()
    assert [rows for rows, _ in losses] == [40, 40]
    found = trainer.predict(data)
    rows = oracle.tail_rows(_logits(zoo.hf_resnet()), "model.resnet.encoder.stages.1", images(4))
    model.load_state_dict(zoo.hf_resnet().state_dict())  # BatchNorm's statistics moved
    agree(torch.from_numpy(trainer.predict(data).predictions), oracle.vote(rows, "soft"))
    assert found.predictions.shape == (4, 7)


def _logits(model: nn.Module) -> nn.Module:
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x).logits

    return Logits()


@tool("Hugging Face's models with labels=", "compute the loss outside", raises="Trainer: compute_loss_func=")
def _(_path: Path) -> None:
    model = inject_crop_vote(zoo.hf_resnet(), after="resnet.encoder.stages.1", input_size=SIDE)
    model(images(4), labels=TARGETS)


@tool("timm's training loop", "mixup's soft targets, NativeScaler, ModelEmaV3, CheckpointSaver and its resume")
def _(path: Path) -> None:
    import timm.data
    import timm.loss
    import timm.scheduler

    model = voting(make=zoo.timm_resnet).train()
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.8)
    scheduler, _ = timm.scheduler.create_scheduler_v2(optimizer, num_epochs=2)
    mixup = timm.data.Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=7)
    criterion = CropVoteLoss(timm.loss.SoftTargetCrossEntropy(), views=10)
    ema, scaler = timm.utils.ModelEmaV3(model, decay=0.9), timm.utils.NativeScaler("cpu")
    saver = timm.utils.CheckpointSaver(model, optimizer, checkpoint_dir=str(path), recovery_dir=str(path))
    for epoch in range(2):
        x, soft = mixup(images(4), TARGETS)
        output = model(x)
        assert output.shape == (40, 7)
        optimizer.zero_grad()
        scaler(criterion(output, soft), optimizer, clip_grad=1.0, parameters=model.parameters())
        ema.update(model)
        scheduler.step(epoch + 1)
        saver.save_checkpoint(epoch, metric=float(epoch))
    plain = zoo.timm_resnet()
    timm.models.load_checkpoint(plain, str(path / "last.pth.tar"))
    rows = oracle.tail_rows(plain, "layer2", images())
    agree(model.eval()(images()), oracle.vote(rows, "soft"), 1e-4)
    assert ema(images()).shape == (3, 7)


# ---- timm's methods --------------------------------------------------------------------------------------------------


@tool("timm's reset_classifier", "the new head votes")
def _(_path: Path) -> None:
    model = voting(make=zoo.timm_resnet)
    model.reset_classifier(5)
    assert model(images()).shape == (3, 5)


@tool("timm's forward_features and forward_head", "a row per view behind the site: the vote is in `forward`")
def _(_path: Path) -> None:
    model = voting(make=zoo.timm_resnet)
    features = model.forward_features(images())
    assert features.shape[0] == 30
    rows = oracle.tail_rows(zoo.timm_resnet(), "layer2", images())
    agree(model.forward_head(features), oracle.sample_major(list(rows.unbind(1))))


@tool("timm's forward_intermediates", "the maps behind the site hold a row per view, those in front a row per image")
def _(_path: Path) -> None:
    _, maps = voting(make=zoo.timm_resnet).forward_intermediates(images())
    assert [len(x) for x in maps] == [3, 3, 30, 30, 30]


# ---- several processes -----------------------------------------------------------------------------------------------


@tool("DataParallel", "replicas vote, each on its share")
def _(_path: Path) -> None:
    model = voting()
    for replica in (model._replicate_for_data_parallel(), nn.DataParallel(model)):
        if isinstance(replica, nn.DataParallel):
            agree(replica(images()), expected())
            continue
        for name, child in model.named_children():  # as torch.nn.parallel.replicate wires them
            setattr(replica, name, child)
        agree(replica(images()), expected())


@tool("DistributedDataParallel", "two processes: the gradients of one process with the whole batch")
def _(path: Path) -> None:
    agree_all(_two_processes(_ddp, path), oracle_gradients())


@tool("FSDP2 fully_shard", "two processes, sharded after the injection: the gradients of one process")
def _(path: Path) -> None:
    agree_all(_two_processes(_fsdp, path), oracle_gradients())


def _two_processes(worker: Callable, path: Path) -> dict[str, Tensor]:
    torch.multiprocessing.spawn(_process, (worker, str(path)), nprocs=2)
    return torch.load(path / "gradients.pt", weights_only=True)


def _process(rank: int, worker: Callable, path: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/gloo", rank=rank, world_size=2)
    share = slice(2 * rank, 2 * rank + 2)
    found = worker(images(4)[share], TARGETS[share])
    if rank == 0:
        torch.save(found, f"{path}/gradients.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _ddp(x: Tensor, targets: Tensor) -> dict[str, Tensor]:
    model = nn.parallel.DistributedDataParallel(still(voting()))
    CropVoteLoss(nn.CrossEntropyLoss(), views=10)(model(x), targets).backward()
    return {name: p.grad for name, p in model.module.named_parameters()}


def _fsdp(x: Tensor, targets: Tensor) -> dict[str, Tensor]:
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    model = still(voting())
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        fully_shard(stage, mesh=mesh)
    fully_shard(model, mesh=mesh)
    CropVoteLoss(nn.CrossEntropyLoss(), views=10)(model(x), targets).backward()
    found = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    agree(model.eval()(images()), expected())
    return found
