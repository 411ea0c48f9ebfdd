"""Training loops and their parts; timm's methods."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import timm
import timm.optim
import timm.utils
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import networks
import oracle
from cropvote import CropVoteLoss, inject_crop_vote
from toolchain.table import (
    SIDE,
    TARGETS,
    Split,
    agree,
    agree_all,
    expected,
    gradients,
    images,
    oracle_gradients,
    rows,
    still,
    tool,
    voting,
)


@tool("an optimizer made before the injection", "trains the same parameters")
def _(_path: Path, split: Split) -> None:
    model = networks.fer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    inject_crop_vote(model, after=split.after, input_size=SIDE)
    gradients(still(model))
    optimizer.step()
    moved = {name: (before[name] - p.detach()) / 0.1 for name, p in model.named_parameters()}
    agree_all(moved, oracle_gradients(split), 1e-4)


@tool("timm's param_groups_layer_decay", "the same groups as for the plain model")
def _(_path: Path) -> None:
    def groups(model: nn.Module) -> list[tuple[float, list[int]]]:
        names = {id(p): i for i, p in enumerate(model.parameters())}
        found = timm.optim.param_groups_layer_decay(model, weight_decay=0.1, layer_decay=0.7)
        return [(group["lr_scale"], [names[id(p)] for p in group["params"]]) for group in found]

    model = networks.timm_resnet()
    plain = groups(model)
    assert groups(inject_crop_vote(model, after="layer1")) == plain
    assert len(plain) > 5


@tool("torch.utils.checkpoint", "of the front, the site and the tail, reentrant and non-reentrant")
def _(_path: Path, split: Split) -> None:
    for reentrant in (False, True):
        for name in ("layer1", "layer2", "layer3"):
            model = still(voting(split))
            _checkpointed(model.get_submodule(name), reentrant)
            agree_all(gradients(model), oracle_gradients(split))


def _checkpointed(module: nn.Module, reentrant: bool) -> None:
    """Run each child of a Sequential in a checkpoint, as timm and torchvision users do."""
    for child in module:

        def forward(x: Tensor, run: Callable = child.forward) -> Tensor:
            return checkpoint(run, x, use_reentrant=reentrant)

        child.forward = forward


@tool("timm's set_grad_checkpointing", "switched on before or after the injection")
def _(_path: Path, split: Split) -> None:
    wanted = gradients(still(voting(split, make=networks.timm_resnet)))
    for early in (True, False):
        model = networks.timm_resnet()
        if early:
            model.set_grad_checkpointing(True)
        inject_crop_vote(model, after=split.after, input_size=SIDE)
        model.set_grad_checkpointing(True)
        agree_all(gradients(still(model)), wanted)


@tool("EMA", "`timm.utils.ModelEmaV3` and `torch.optim.swa_utils.AveragedModel`")
def _(_path: Path, split: Split) -> None:
    model = voting(split)
    averages = {"ema": timm.utils.ModelEmaV3(model, decay=0.25), "mean": torch.optim.swa_utils.AveragedModel(model)}
    for average in averages.values():
        agree(average.eval()(images()), expected(split))
    with torch.no_grad():
        averages["mean"].update_parameters(model)
        model.fc.weight.mul_(2)
        averages["ema"].update(model)
        averages["mean"].update_parameters(model)
    for name, share in (("ema", 0.75), ("mean", 0.5)):
        plain = networks.fer()
        with torch.no_grad():
            plain.fc.weight.mul_(1 + share)
        agree(averages[name](images()), oracle.vote(rows(plain, split), "soft"))


@tool("torch.func", "`functional_call`, `vmap` over models, `grad`")
def _(_path: Path, split: Split) -> None:
    model = voting(split)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    agree(torch.func.functional_call(model, state, (images(),)), expected(split))
    stacked = {name: torch.stack([t, t]) for name, t in state.items()}
    batch = images()
    found = torch.func.vmap(lambda s: torch.func.functional_call(model, s, (batch,)))(stacked)
    for one in found:
        agree(one, expected(split))
    loss = CropVoteLoss(nn.CrossEntropyLoss())
    still(model)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    batch = images(4)
    found = torch.func.grad(lambda s: loss(torch.func.functional_call(model, s, (batch,)), TARGETS))(parameters)
    agree_all(found, oracle_gradients(split))


class Faces(torch.utils.data.Dataset):
    """The images and targets as a data set."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def __len__(self) -> int:
        return len(TARGETS)

    def __getitem__(self, index: int) -> object:
        row = images(4)[index], TARGETS[index]
        return dict(zip(self.names, row, strict=True)) if self.names else row


@tool("Lightning", "`CropVoteLoss` in `training_step`, the vote in `validation_step`: docs/guides/trainers.md")
def _(path: Path, split: Split) -> None:
    import lightning

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = still(voting(split))
            self.loss = CropVoteLoss(nn.CrossEntropyLoss(), views=10)

        def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
            still(self.model)
            return self.loss(self.model(batch[0]), batch[1])

        def on_after_backward(self) -> None:
            agree_all({name: p.grad.clone() for name, p in self.model.named_parameters()}, oracle_gradients(split))
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
    agree(module.votes, expected(split, 4))


@tool(
    "Hugging Face's Trainer",
    "with `compute_loss_func=`; a loss computed inside the model would be computed before the vote",
)
def _(path: Path) -> None:
    import transformers

    model = inject_crop_vote(networks.hf_resnet(), after="resnet.encoder.stages.1", input_size=SIDE)
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
    assert [count for count, _ in losses] == [40, 40]
    found = trainer.predict(data)
    wanted = oracle.tail_rows(_logits(networks.hf_resnet()), "model.resnet.encoder.stages.1", images(4))
    model.load_state_dict(networks.hf_resnet().state_dict())  # BatchNorm's statistics have changed
    agree(torch.from_numpy(trainer.predict(data).predictions), oracle.vote(wanted, "soft"))
    assert found.predictions.shape == (4, 7)


def _logits(model: nn.Module) -> nn.Module:
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x).logits

    return Logits()


@tool("Hugging Face's models with labels=", "compute the loss outside", raises="CV123")
def _(_path: Path) -> None:
    model = inject_crop_vote(networks.hf_resnet(), after="resnet.encoder.stages.1", input_size=SIDE)
    model(images(4), labels=TARGETS)


@tool(
    "timm's training loop",
    "mixup's soft targets, NativeScaler, ModelEmaV3, CheckpointSaver, and resuming from its checkpoint",
)
def _(path: Path, split: Split) -> None:
    import timm.data
    import timm.loss
    import timm.scheduler

    model = voting(split, make=networks.timm_resnet).train()
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
    plain = networks.timm_resnet()
    timm.models.load_checkpoint(plain, str(path / "last.pth.tar"))
    agree(model.eval()(images()), oracle.vote(rows(plain, split), "soft"), 1e-4)
    assert ema(images()).shape == (3, 7)


@tool("timm's reset_classifier", "the new head votes")
def _(_path: Path) -> None:
    model = voting(make=networks.timm_resnet)
    model.reset_classifier(5)
    assert model(images()).shape == (3, 5)


@tool("timm's forward_features and forward_head", "after the site they return a row per view; only `forward` votes")
def _(_path: Path, split: Split) -> None:
    model = voting(split, make=networks.timm_resnet)
    features = model.forward_features(images())
    assert features.shape[0] == 30
    wanted = rows(networks.timm_resnet(), split)
    agree(model.forward_head(features), oracle.sample_major(list(wanted.unbind(1))))


@tool("timm's forward_intermediates", "maps after the site have a row per view, maps before it a row per image")
def _(_path: Path, split: Split) -> None:
    _, maps = voting(split, make=networks.timm_resnet).forward_intermediates(images())
    counts = {"one site": [3, 3, 30, 30, 30], "two sites": [3, 6, 30, 30, 30]}
    assert [len(x) for x in maps] == counts[split.name]
