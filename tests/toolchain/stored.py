"""Stores that carry the injection beside the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch

import networks
from cropvote import Views, five_crop, inject_crop_vote, to_config
from toolchain.table import SIDE, Split, agree, expected, images, tool, voting


@tool(
    "Hugging Face's save_pretrained",
    "store it with `model.config.cropvote = to_config(model)`; `from_pretrained` restores that attribute",
)
def _(path: Path) -> None:
    import transformers

    model = inject_crop_vote(networks.hf_resnet(), after="resnet.encoder.stages.1", input_size=SIDE, vote="probs")
    votes = model(images()).logits
    model.config.cropvote = to_config(model)
    model.save_pretrained(path)
    again = transformers.AutoModelForImageClassification.from_pretrained(path)
    assert not torch.allclose(again(images()).logits, votes, atol=1e-3)  # not yet injected
    inject_crop_vote(again, **again.config.cropvote)
    agree(again(images()).logits, votes)


@tool("Lightning's hyperparameters", "`save_hyperparameters()` stores `to_config(model)` or Views, `weights_only=True`")
def _(path: Path, split: Split) -> None:
    import lightning

    class Classifier(lightning.LightningModule):
        def __init__(self, injection: dict[str, Any], spare: Views) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.model = inject_crop_vote(networks.fer(), **injection)

    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, default_root_dir=path, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    module = Classifier(to_config(voting(split)), five_crop(scale=0.7))
    with torch.no_grad():
        module.model.fc.weight.mul_(2)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path / "last.ckpt")
    again = Classifier.load_from_checkpoint(path / "last.ckpt", weights_only=True).eval()
    assert again.hparams.spare == five_crop(scale=0.7)
    with torch.no_grad():
        again.model.fc.weight.div_(2)
    agree(again.model(images()), expected(split))


@tool("timm's save_for_hf", '`model_config={"cropvote": to_config(model)}`, which is read back from config.json')
def _(path: Path) -> None:
    model = inject_crop_vote(networks.timm_resnet(), after="layer2", input_size=SIDE)
    votes = model(images())
    timm.models.save_for_hf(model, path, model_config={"cropvote": to_config(model)}, safe_serialization=True)
    stored = json.loads((path / "config.json").read_text())
    again = timm.create_model(f"local-dir:{path}", pretrained=True)
    inject_crop_vote(again, **stored["cropvote"])
    agree(again.eval()(images()), votes)
