"""Votes that stop when sure."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import networks
import oracle
from cropvote import (
    CropVote,
    CropVoteError,
    five_crop,
    hflip,
    inject_crop_vote,
    per_view,
    settings,
    vote,
    vote_until_sure,
)
from cropvote.stopping import _sure, choose_confidence

IMAGES = torch.randn(6, 3, 48, 48, generator=torch.Generator().manual_seed(1))
PLANS = {
    "layer2": "layer2",
    "input": "input",
    "two sites": {"layer1": hflip(), "layer3": five_crop()},
    "input first": {"input": hflip(), "layer3": five_crop()},
}


def voting(after="layer2", **options: object) -> nn.Module:
    return inject_crop_vote(networks.fer(), after=after, input_size=48, **options)


def between(confidences: torch.Tensor, below: int = 3) -> float:
    """Return a confidence that ``below`` samples do not reach and the others exceed."""
    return float(confidences.sort().values[below - 1 : below + 1].mean())


def by_hand(logits: torch.Tensor, first: list[int], confidence: float, how: str) -> tuple[torch.Tensor, list[int]]:
    """Compute the vote sample by sample, from all logits."""
    votes, used = [], []
    for sample in logits:
        few = oracle.vote(sample[None, first], how)[0]
        go_on = not float(few.softmax(0).max()) > confidence
        votes.append(oracle.vote(sample[None], how)[0] if go_on else few)
        used.append(logits.shape[1] if go_on else len(first))
    return torch.stack(votes).float(), used


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("first", ["centre+mirror", "centre", [5, 6, 7, 8, 9], [0, 1], [0, 1, 2, 3, 4, 9]])
@pytest.mark.parametrize("how", ["soft", pytest.param("probs", marks=pytest.mark.slow)])
def test_it_is_the_vote_of_few_or_of_all(plan, first, how):
    model = voting(PLANS[plan], vote=how)
    columns = {"centre": [4], "centre+mirror": [4, 9]}[first] if isinstance(first, str) else first
    with torch.no_grad():
        logits = per_view(model, IMAGES)
        few = vote(logits[:, columns].flatten(0, 1), len(columns), how).softmax(1).max(1).values
        confidence = between(few)
        votes, used = vote_until_sure(model, IMAGES, first=first, confidence=confidence)
    wanted, counts = by_hand(logits, columns, confidence, how)
    assert used.tolist() == counts
    assert set(counts) == {len(columns), 10}
    assert torch.allclose(votes, wanted, atol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_with_confidence_1_it_is_the_full_vote(plan):
    model = voting(PLANS[plan])
    with torch.no_grad():
        votes, used = vote_until_sure(model, IMAGES, confidence=1.0)
        assert torch.allclose(votes, model(IMAGES), atol=1e-5)
        assert used.tolist() == [10] * 6
        sure = torch.tensor([[0.0, 500.0]] * 10)  # a probability of exactly 1 is not above 1
        assert not _sure(sure[None], vote(sure, 10), 20, 1.0, "soft").any()


def test_the_network_runs_again_only_for_unsure_samples():
    model = voting()
    front, tail = [], []
    model.layer1.register_forward_hook(lambda m, a, out: front.append(len(out)))
    model.layer3.register_forward_hook(lambda m, a, out: tail.append(len(out)))
    with torch.no_grad():
        few = per_view(model, IMAGES)[:, [4, 9]].mean(1).softmax(1).max(1).values
        front.clear(), tail.clear()
        _, used = vote_until_sure(model, IMAGES, confidence=between(few, 2))
    assert sorted(used.tolist()) == [2, 2, 2, 2, 10, 10]
    assert front == [6, 2]
    assert tail == [12, 16]


def test_a_layer_and_a_network_that_holds_one():
    torch.manual_seed(0)
    tail = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 7))
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), CropVote(tail)).eval()
    with torch.no_grad():
        logits = per_view(net, IMAGES)
        confidence = between(logits[:, [4, 9]].mean(1).softmax(1).max(1).values)
        votes, used = vote_until_sure(net, IMAGES, confidence=confidence)
        wanted, counts = by_hand(logits, [4, 9], confidence, "soft")
        assert used.tolist() == counts
        assert torch.allclose(votes, wanted, atol=1e-5)
        again = vote_until_sure(net[1], net[0](IMAGES), confidence=confidence)
        assert torch.allclose(again.votes, votes, atol=1e-6)


def test_with_several_labels_every_label_must_be_sure():
    model = voting(vote="sigmoid")
    with torch.no_grad():
        logits = per_view(model, IMAGES)
        few = vote(logits[:, [4, 9]].flatten(0, 1), 2, "sigmoid").sigmoid()
        least = torch.maximum(few, 1 - few).min(1).values
        votes, used = vote_until_sure(model, IMAGES, confidence=between(least))
        assert used.tolist() == [2 if p > between(least) else 10 for p in least]
        wanted = oracle.vote(logits, "sigmoid").float()
    assert torch.allclose(votes[used == 10], wanted[used == 10], atol=1e-5)


@given(st.data())
def test_the_exact_stop_never_changes_a_winner(data):
    """No output of the remaining views could change it; where it continues, some output could."""
    classes, first, left = (data.draw(st.integers(least, most)) for least, most in ((2, 4), (1, 9), (1, 5)))
    row = st.lists(st.integers(-3, 3), min_size=classes, max_size=classes)
    rows = torch.tensor(data.draw(st.lists(row, min_size=first, max_size=first))).float()[None]
    total = first + left
    sure = bool(_sure(rows, vote(rows[0], first, "hard"), total, None, "hard")[0])
    now = int(vote(rows[0], first, "hard").argmax())
    changed = False
    for other in range(classes):
        against = torch.full((left, classes), -100.0)
        against[:, other] = 100.0
        changed |= int(vote(torch.cat([rows[0], against]), total, "hard").argmax()) != now
    rest = torch.tensor(data.draw(st.lists(row, min_size=left, max_size=left))).float()
    if sure:
        assert not changed
        assert int(vote(torch.cat([rows[0], rest]), total, "hard").argmax()) == now
    elif classes > 1:
        counts = torch.bincount(rows[0].argmax(1), minlength=classes).sort(descending=True).values
        assert counts[0] - counts[1] <= left


def test_the_exact_stop_of_a_model():
    model = voting(vote="hard")
    with torch.no_grad():
        votes, used = vote_until_sure(model, IMAGES, first=list(range(6)), confidence=None)
        logits = per_view(model, IMAGES)
        full = model(IMAGES)
    assert torch.equal(votes.argmax(1), full.argmax(1))
    for sample, count in zip(logits, used.tolist(), strict=True):
        most = torch.bincount(sample[:6].argmax(1), minlength=7).sort(descending=True).values
        assert count == (6 if most[0] - most[1] > 4 else 10)


def test_batches_of_none_and_of_one_and_all_views_first():
    model = voting()
    with torch.no_grad():
        votes, used = vote_until_sure(model, IMAGES[:0])
        assert (votes.shape, used.shape) == ((0, 7), (0,))
        assert torch.allclose(vote_until_sure(model, IMAGES[:1], confidence=1).votes, model(IMAGES[:1]), atol=1e-6)
        votes, used = vote_until_sure(model, IMAGES, first=list(range(10)), confidence=1)
        assert torch.allclose(votes, model(IMAGES), atol=1e-6)
        assert used.tolist() == [10] * 6


def test_the_settings_are_unchanged():
    model = voting(eval_views="centre")
    before = repr(settings(model))
    with torch.no_grad():
        votes, _ = vote_until_sure(model, IMAGES, confidence=1)
    assert repr(settings(model)) == before
    assert votes.shape == (6, 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"confidence": None}, "CV605"),
        ({"confidence": 1.5}, "CV845"),
        ({"confidence": True}, "CV845"),
        ({"confidence": 0.5, "how": "mean"}, "CV606"),
        ({"first": [10]}, "CV817"),
        ({"first": "center"}, "CV817"),
    ],
)
def test_misuse(options, message):
    with pytest.raises(CropVoteError, match=message):
        vote_until_sure(voting(), IMAGES, **options)


def test_unsupported_uses_raise():
    model = voting()
    one = networks.fer()
    one.fc = torch.nn.Linear(one.fc.in_features, 1)
    with pytest.raises(CropVoteError, match="CV604"):
        vote_until_sure(inject_crop_vote(one, after="layer2", input_size=48), IMAGES, confidence=0.5)
    with pytest.raises(CropVoteError, match="CV601"):
        vote_until_sure(voting().train(), IMAGES)
    with pytest.raises(CropVoteError, match="CV846"):
        vote_until_sure(model, [IMAGES])
    with pytest.raises(CropVoteError, match="CV418"):
        vote_until_sure(networks.fer(), IMAGES)
    with pytest.raises(Exception, match="CV502"):
        torch.compile(lambda x: vote_until_sure(model, x).votes, backend="eager", fullgraph=True)(IMAGES)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(IMAGES)
        assert torch.allclose(vote_until_sure(compiled, IMAGES, confidence=1).votes, model(IMAGES), atol=1e-6)


# --- the threshold ---------------------------------------------------------------------------------------------------


@given(st.data())
def test_the_threshold_is_the_lowest_that_keeps_the_accuracy(data):
    """Try every threshold at a sample's confidence."""
    samples = data.draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000)))
    logits = 3 * torch.randn(samples, 10, 3, generator=generator).round(decimals=1)
    targets = torch.randint(3, (samples,), generator=generator)
    loss = data.draw(st.sampled_from([0.0, 0.1, 0.5]))

    def accuracy(confidence: float) -> float:
        few = vote(logits[:, [4, 9]].flatten(0, 1), 2)
        stops = few.softmax(1).max(1).values > confidence
        full = vote(logits.flatten(0, 1), 10)
        return float((torch.where(stops, few.argmax(1), full.argmax(1)) == targets).double().mean())

    found = choose_confidence(logits, targets, max_loss=loss)
    least = accuracy(1.0) - loss - 1e-9
    assert accuracy(found) >= least
    winners = vote(logits[:, [4, 9]].flatten(0, 1), 2).softmax(1).max(1).values.tolist()
    stopped = sum(winner > found for winner in winners)
    for other in (0.0, *winners):
        assert accuracy(other) < least or sum(winner > other for winner in winners) <= stopped


@pytest.mark.parametrize(
    ("logits", "targets", "options", "message"),
    [
        (torch.zeros(4, 7), torch.zeros(4).long(), {}, "CV844"),
        (torch.zeros(4, 10, 1), torch.zeros(4).long(), {}, "CV844"),
        (torch.zeros(4, 10, 7), torch.zeros(4), {}, "CV841"),
        (torch.zeros(4, 10, 7), torch.zeros(4).long(), {"first": [4, 4]}, "CV817"),
        (torch.zeros(4, 10, 7), torch.zeros(4).long(), {"max_loss": -1}, "CV845"),
    ],
)
def test_threshold_misuse(logits, targets, options, message):
    with pytest.raises(CropVoteError, match=message):
        choose_confidence(logits, targets, **options)


def test_a_share_of_the_samples_is_met_exactly():
    """0.29 * 100 is 28.999..., and 29 of 100 is a share of 0.29."""
    logits = torch.zeros(100, 10, 2)
    logits[:, :, 1] = 1.0
    logits[:29, [4, 9], 1] = -0.1  # the first two views are wrong, all ten are right
    assert choose_confidence(logits, torch.ones(100).long(), max_loss=0.29) == 0.0
