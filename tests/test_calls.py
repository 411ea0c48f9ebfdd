"""Calls with some of the views in eval mode, or a few random ones in training."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import networks
import oracle
from calls import expected_rows, layered, voting
from cropvote import (
    CropVoteError,
    CropVoteLoss,
    Views,
    five_crop,
    hflip,
    inject_crop_vote,
    per_view,
    settings,
    vote,
)
from cropvote.call import draw
from cropvote.errors import OptionError, RowsError, SurgeryError
from networks import IMAGES

CPU = torch.device("cpu")


# ---- some views in eval mode -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["soft", "probs", "hard", "median"])
@pytest.mark.parametrize(("asked", "columns"), [([4, 9], [4, 9]), ("centre", [4]), ((9, 0, 3), [0, 3, 9])])
def test_a_subset_of_views_votes_like_its_columns(how, asked, columns):
    model = voting(vote=how, eval_views=asked)
    logits = per_view(model, IMAGES)
    assert torch.allclose(logits, expected_rows().float(), atol=1e-5)
    assert torch.allclose(model(IMAGES), vote(logits[:, columns].flatten(0, 1), len(columns), how=how), atol=1e-6)
    wanted = oracle.vote(expected_rows()[:, columns], how)
    assert torch.allclose(model(IMAGES).double(), wanted, atol=1e-5)
    settings(model).eval_output = "views"  # always in view order
    assert torch.allclose(model(IMAGES), logits[:, columns].flatten(0, 1), atol=1e-6)


def test_only_the_requested_views_are_computed():
    model = voting(eval_views="centre+mirror")
    front, tail = networks.counted(model.layer1), networks.counted(model.layer3)
    model(IMAGES)
    assert (front, tail) == ([3], [6])
    settings(model).eval_views = [0, 1, 2]
    assert settings(model).eval_views == (0, 1, 2)
    model(IMAGES)
    settings(model).eval_views = None
    model(IMAGES)
    assert tail == [6, 9, 30]
    assert model.train()(IMAGES).shape == (30, 7)  # training uses all views


@pytest.mark.parametrize("site", ["input", "layer1", "layer3"])
def test_some_views_at_any_site(site):
    model = voting(site, eval_views=[4, 9], eval_output="views")
    if site == "input":
        views = [networks.fer()(oracle.ten_views(IMAGES)[i]) for i in (4, 9)]
    else:
        views = list(expected_rows(site)[:, [4, 9]].unbind(1))
    assert torch.allclose(model(IMAGES), oracle.sample_major(views).float(), atol=1e-5)


def test_a_layer_has_the_same_options():
    model = layered()
    logits = per_view(model, IMAGES)
    settings(model[1]).eval_views = "centre+mirror"
    assert torch.allclose(model(IMAGES), logits[:, [4, 9]].mean(1), atol=1e-6)
    assert torch.equal(per_view(model, IMAGES), logits)
    assert torch.allclose(layered(eval_views=[4, 9])(IMAGES), logits[:, [4, 9]].mean(1), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eval_views": []}, "CV817"),
        ({"eval_views": [4, 4]}, "CV817"),
        ({"eval_views": [10]}, "CV817"),
        ({"eval_views": [-1]}, "CV817"),
        ({"eval_views": "center"}, "CV817"),
        ({"eval_views": [True]}, "CV817"),
        ({"eval_views": 4}, "CV817"),
        ({"train_views": 0}, "CV815"),
        ({"train_views": 11}, "CV815"),
        ({"train_views": 2.0}, "CV815"),
    ],
)
def test_invalid_views_are_refused(change, message):
    model = voting()
    ((name, value),) = change.items()
    with pytest.raises(CropVoteError, match=message):
        setattr(settings(model), name, value)
    with pytest.raises(CropVoteError, match=message):
        inject_crop_vote(networks.fer(), after="layer1", **change)
    assert settings(model).eval_views is None


def test_a_view_name_needs_that_view():
    with pytest.raises(OptionError, match="CV818"):
        voting(views=Views([(0.5, 0.5), (0, 0)]), eval_views="centre+mirror")
    with pytest.raises(OptionError, match="CV818"):
        voting(views=Views([(0, 0), (1, 1)]), eval_views="centre")
    assert voting(views=hflip(), eval_views="centre+mirror")(IMAGES).shape == (3, 7)


SITES = {
    "layer2": [("layer2", oracle.ten_views)],
    "two sites": [("layer1", oracle.flip_views), ("layer3", oracle.five_views)],
}
TWO = {"layer1": hflip(), "layer3": five_crop()}


@pytest.mark.parametrize("backend", [pytest.param("compile", marks=pytest.mark.slow), "export"])
@pytest.mark.parametrize("site", ["layer2", pytest.param("two sites", marks=pytest.mark.slow)])
def test_some_views_compiled_and_exported(backend, site):
    model = voting(TWO if site == "two sites" else site, eval_views=[4, 9])
    with torch.no_grad():
        rows = oracle.nested_rows(networks.fer(), SITES[site], IMAGES)
    wanted = rows[:, [4, 9]].mean(1).float()
    if backend == "compile":
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
        assert torch.allclose(compiled(IMAGES), wanted, atol=1e-5)
        settings(compiled).eval_views = "centre"
        assert torch.allclose(compiled(IMAGES), rows[:, 4].float(), atol=1e-5)
        assert per_view(compiled, IMAGES).shape == (3, 10, 7)
    else:
        batch = {0: torch.export.Dim("batch", min=1, max=64)}
        program = torch.export.export(model, (IMAGES,), dynamic_shapes=(batch,)).module()
        assert torch.allclose(program(IMAGES), wanted, atol=1e-5)
        assert program(IMAGES[:1]).shape == (1, 7)


# ---- whose mode decides ----------------------------------------------------------------------------------------------


def test_the_roots_mode_decides_for_the_split_too():
    """A frozen stage is in eval mode inside a training model, with the same number of views in both modes."""
    model = networks.still(voting(eval_views=[4, 9], train_views=2, eval_output="views"))
    every = expected_rows().float()
    assert len({tuple(oracle.whose(model(IMAGES), every)[0]) for _ in range(12)}) > 3  # drawn, not eval mode's two
    model.training = False
    for module in (model.layer2, *model.layer2):
        module.training = True
    rows = oracle.sample_major(list(expected_rows()[:, [4, 9]].unbind(1)))
    assert torch.allclose(model(IMAGES), rows.float(), atol=1e-5)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_follow_their_own_mode(duplicate):
    model = voting(eval_views=[4, 9]).train()
    twin = duplicate(model).eval()
    assert twin(IMAGES).shape == (3, 7)
    assert model(IMAGES).shape == (30, 7)
    model.eval()
    assert twin.train()(IMAGES).shape == (30, 7)
    assert model(IMAGES).shape == (3, 7)


def test_a_shallow_copy_in_another_mode_is_refused():
    model = voting(eval_views=[4, 9], train_views=2)
    twin = copy.copy(model)
    assert torch.equal(twin(IMAGES), model(IMAGES))
    twin.training = True
    with pytest.raises(SurgeryError, match="CV419"):
        twin(IMAGES)


def test_a_voting_model_is_freed_at_once():
    gc.disable()
    try:
        model = voting()
        gone = weakref.ref(model)
        stage = model.layer2
        del model
        assert gone() is None
        assert stage(torch.zeros(1, 8, 24, 24)).shape == (10, 16, 10, 10)  # a part alone goes by its own mode
    finally:
        gc.enable()


# ---- a few views, drawn, in training ---------------------------------------------------------------------------------


def test_a_few_views_are_drawn_for_each_batch():
    model, every = networks.still(voting(train_views=3)), expected_rows().float()
    drawn = [oracle.whose(model(IMAGES), every) for _ in range(12)]
    for views in drawn:
        assert all(sample == views[0] for sample in views)  # one draw per batch
        assert views[0] == sorted(set(views[0]))
        assert len(views[0]) == 3
    assert len({tuple(views[0]) for views in drawn}) > 6
    torch.manual_seed(7)
    first = model(IMAGES)
    torch.manual_seed(7)
    assert torch.equal(model(IMAGES), first)
    model.eval()
    assert torch.allclose(model(IMAGES), every.mean(1), atol=1e-5)  # all views vote


def test_every_view_is_drawn_equally_often():
    torch.manual_seed(0)
    counts = torch.zeros(10)
    for _ in range(2000):
        counts[draw(10, 3, CPU)] += 1
    assert ((counts - 600) / (2000 * 0.3 * 0.7) ** 0.5).abs().max() < 4


def test_processes_draw_different_views_and_stay_in_step(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 16)
    draws, states = [], []
    for rank in range(16):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        torch.manual_seed(0)
        draws.append(tuple(tuple(draw(10, 2, CPU).tolist()) for _ in range(4)))
        states.append(torch.get_rng_state())
    assert len(set(draws)) == 16
    assert all(torch.equal(state, states[0]) for state in states)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("part", ["layer2", "all"])
def test_a_checkpoint_draws_the_same_again(reentrant, part):
    def gradients(checkpointed: bool) -> torch.Tensor:
        model = networks.still(voting(train_views=2))
        if checkpointed and part == "layer2":
            kind, stage = type(model.layer2), model.layer2
            plain = stage.forward
            stage.forward = lambda x: checkpoint(plain, x, use_reentrant=reentrant)
            assert type(stage) is kind
        torch.manual_seed(3)
        images = IMAGES.clone().requires_grad_()
        run = (lambda x: checkpoint(model, x, use_reentrant=reentrant)) if checkpointed and part == "all" else model
        CropVoteLoss(nn.CrossEntropyLoss())(run(images), torch.tensor([0, 1, 2])).backward()
        return torch.cat([images.grad.flatten(), model.layer2[0].conv1.weight.grad.flatten()])

    assert torch.allclose(gradients(True), gradients(False), atol=1e-7)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_that_would_draw_other_views_is_refused(reentrant):
    model, loss = networks.still(voting(train_views=2)), CropVoteLoss(nn.CrossEntropyLoss())

    def learn(**options) -> None:
        rows = checkpoint(model, IMAGES.clone().requires_grad_(), use_reentrant=reentrant, **options)
        loss(rows, torch.tensor([0, 1, 2])).backward()

    with pytest.raises(RowsError, match="CV322"):
        learn(preserve_rng_state=False)
    learn()


@pytest.mark.parametrize(
    "strict", [pytest.param(None, marks=pytest.mark.slow), False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_a_few_views_compiled_and_exported(strict):
    model, every = networks.still(voting(train_views=3)), expected_rows().float()
    if strict is None:
        run = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    else:
        run = torch.export.export(model, (IMAGES,), strict=strict).module()
    drawn = [oracle.whose(run(IMAGES), every) for _ in range(8)]
    assert all(sample == views[0] for views in drawn for sample in views)
    assert len({tuple(views[0]) for views in drawn}) > 2
    assert all(views[0] == sorted(set(views[0])) for views in drawn)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_draw_cannot_be_traced():
    with pytest.raises(OptionError, match="CV501"):
        torch.jit.trace(networks.still(voting(train_views=2)), IMAGES, check_trace=False)
