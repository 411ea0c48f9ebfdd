"""The votes, repeat_targets and CropVoteLoss against the oracle's loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import oracle
from cropvote import CropVoteError, CropVoteLoss, inject_crop_vote, repeat_targets, ten_crop, vote
from cropvote.errors import InputTypeError, RowsError
from strategies import logits, quick

RULES = ["soft", "probs", "hard", "sigmoid", "mean", "median"]
rules = pytest.mark.parametrize("how", RULES)


def seeded(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return normal random numbers, the same in every run."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


# ---------------------------------------------------------------- rules


@rules
@quick
@given(rows=logits() | logits(minus_infinity=True))
def test_rules_equal_the_loops(how: str, rows: Tensor) -> None:
    """In float64 (which stays float64) and in float32."""
    want = oracle.vote(rows, how)
    found = vote(rows.flatten(0, 1), rows.shape[1], how=how)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)
    single = vote(rows.float().flatten(0, 1), rows.shape[1], how=how)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, want.float(), rtol=1e-4, atol=1e-4)


@quick
@given(rows=logits())
def test_hard_elects_the_majority_and_breaks_ties_by_mean_probability(rows: Tensor) -> None:
    found = vote(rows.flatten(0, 1), rows.shape[1], how="hard")
    for sample, result in zip(rows.tolist(), found, strict=True):
        winner = oracle.majority(sample)
        assert winner is None or int(result.argmax()) == winner


def test_hard_on_a_tie_worked_by_hand() -> None:
    """Two views choose class 0, two class 1 with more confidence; class 2 is always a close second."""
    p = torch.tensor([[0.50, 0.05, 0.45], [0.50, 0.05, 0.45], [0.00, 0.60, 0.40], [0.00, 0.60, 0.40]])
    counts, mean = torch.tensor([2.0, 2.0, 0.0]), torch.tensor([0.25, 0.325, 0.425])
    found = vote(p.log(), 4, how="hard")
    torch.testing.assert_close(found, ((counts + mean) / 5).log()[None])
    assert found.argmax() == 1
    assert vote(p.log(), 4, how="probs").argmax() == 2


@pytest.mark.parametrize("how", ["probs", "hard"])
@given(rows=logits())
@quick
def test_probs_and_hard_are_log_distributions(how: str, rows: Tensor) -> None:
    found = vote(rows.flatten(0, 1), rows.shape[1], how=how).exp().sum(dim=1)
    torch.testing.assert_close(found, torch.ones_like(found))


@pytest.mark.parametrize("how", ["probs", "hard"])
def test_distant_logits_do_not_underflow(how: str) -> None:
    """A class 200 below the winner has a log-probability near -200 in float32, not -inf."""
    rows = torch.tensor([[[0.0, -200.0, -201.0], [-1.0, -200.5, -203.0]]])
    found = vote(rows.flatten(0, 1), 2, how=how)
    views = [[value - max(view) for value in view] for view in rows[0].tolist()]
    log_mean = torch.logsumexp(torch.tensor(views, dtype=torch.float64), dim=0) - torch.tensor(2.0).double().log()
    want = log_mean if how == "probs" else log_mean - torch.tensor(3.0).double().log()
    torch.testing.assert_close(found[0, 1:].double(), want[1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["soft", "mean", "median"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_view_is_the_plain_model_bit_for_bit(how: str, dtype: torch.dtype) -> None:
    rows = seeded(6, 5, dtype=dtype) * 1e3
    rows[0, 0] = float("-inf")
    assert torch.equal(vote(rows, 1, how=how), rows)


@rules
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_voted_in_float32(how: str, dtype: torch.dtype) -> None:
    """The result is the same as for float32 logits."""
    rows = seeded(12, 5).to(dtype)
    found = vote(rows, 4, how=how)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, oracle.vote(rows.reshape(3, 4, 5), how).float(), rtol=1e-5, atol=1e-5)


@rules
def test_autocast_does_not_lower_the_votes_precision(how: str) -> None:
    rows = seeded(12, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = vote(rows, 4, how=how)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, oracle.vote(rows.reshape(3, 4, 5), how).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["soft", "probs", "mean", "median"])
def test_votes_are_differentiable(how: str) -> None:
    rows = seeded(6, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: vote(z, 3, how=how), rows)


def test_a_callable_gets_samples_views_classes() -> None:
    rows = seeded(12, 5)
    found = vote(rows, 4, how=lambda z: z.amax(dim=1))
    assert torch.equal(found, torch.stack([rows[4 * n : 4 * n + 4].amax(dim=0) for n in range(3)]))


def test_views_may_be_a_number_or_views() -> None:
    rows = seeded(20, 5)
    assert torch.equal(vote(rows, ten_crop()), vote(rows, 10))
    assert torch.equal(vote(rows, 10), vote(rows, 10, how="soft"))


@pytest.mark.parametrize(
    ("rows", "views", "how", "builtin"),
    [
        (torch.zeros(11, 5), 10, "soft", ValueError),
        (torch.zeros(9, 5), 10, "soft", ValueError),
        (torch.zeros(10), 10, "soft", ValueError),
        (torch.zeros(10, 5, 4, 4), 10, "soft", ValueError),
        (torch.zeros(10, 5), 0, "soft", ValueError),
        (torch.zeros(10, 5), -10, "soft", ValueError),
        (torch.zeros(10, 5), 10, "sotf", (ValueError, LookupError)),
        (torch.zeros(10, 5), 10, None, (ValueError, TypeError, LookupError)),
        (torch.zeros(10, 5, dtype=torch.int64), 10, "soft", (ValueError, TypeError)),
        (torch.zeros(10, 5, dtype=torch.bool), 10, "hard", (ValueError, TypeError)),
        (torch.zeros(10, 5), 10, lambda z: z, ValueError),
        (torch.zeros(10, 5), 10, lambda z: z.mean(dim=(1, 2)), ValueError),
        (torch.zeros(10, 5), 5, lambda z: z.mean(dim=0), ValueError),
        (torch.zeros(10, 5), 10, lambda z: z.mean(dim=1)[:, :4], ValueError),
        (torch.zeros(10, 5), 10, lambda z: None, (ValueError, TypeError)),
    ],
)
def test_bad_votes_are_refused(rows: Tensor, views: int, how, builtin) -> None:
    """The library's error is also the builtin that users would catch."""
    with pytest.raises(CropVoteError) as caught:
        vote(rows, views, how=how)
    assert isinstance(caught.value, builtin)


# ---------------------------------------------------------------- loss


@quick
@given(rows=logits(), smoothing=st.sampled_from([0.0, 0.1]), data=st.data())
def test_loss_on_class_indices_equals_the_loops(rows: Tensor, smoothing: float, data: st.DataObject) -> None:
    count, _views, classes = rows.shape
    targets = torch.tensor([data.draw(st.integers(0, classes - 1)) for _ in range(count)])
    loss = CropVoteLoss(nn.CrossEntropyLoss(label_smoothing=smoothing))(rows.flatten(0, 1), targets)
    torch.testing.assert_close(loss, oracle.loss_on_views(rows, targets, smoothing))


def test_loss_on_soft_targets_equals_the_loops() -> None:
    """Mixup's targets, a distribution per sample, are repeated for each of its views."""
    rows, targets = seeded(3, 4, 5, dtype=torch.float64), seeded(3, 5, dtype=torch.float64).softmax(dim=1)
    total = 0.0
    for n in range(3):
        for v in range(4):
            for k in range(5):
                total -= float(targets[n, k] * (rows[n, v, k] - rows[n, v].logsumexp(0)))
    loss = CropVoteLoss(nn.CrossEntropyLoss())(rows.flatten(0, 1), targets)
    assert float(loss) == pytest.approx(total / 12)


def test_loss_for_regression() -> None:
    rows, targets = seeded(3, 4, 2, dtype=torch.float64), seeded(3, 2, dtype=torch.float64)
    want = sum(float(((rows[n, v] - targets[n]) ** 2).sum()) for n in range(3) for v in range(4)) / 24
    assert float(CropVoteLoss(nn.MSELoss())(rows.flatten(0, 1), targets)) == pytest.approx(want)


@pytest.mark.parametrize("views", [None, 4])
def test_reduction_none_gives_one_loss_per_row(views: int | None) -> None:
    """The shape is (N*V,), sample by sample."""
    rows, targets = seeded(12, 5), torch.tensor([4, 0, 2])
    loss = CropVoteLoss(nn.CrossEntropyLoss(reduction="none"), views=views)(rows, targets)
    want = [float(rows[4 * n + v].logsumexp(0) - rows[4 * n + v, targets[n]]) for n in range(3) for v in range(4)]
    assert loss.shape == (12,)
    torch.testing.assert_close(loss, torch.tensor(want))


@pytest.mark.parametrize("views", [None, 10, ten_crop()], ids=["none", "int", "Views"])
@pytest.mark.parametrize("targets", [torch.tensor([1, 0, 4]), seeded(3, 5).softmax(dim=1)], ids=["indices", "soft"])
def test_on_an_unsplit_model_the_loss_is_the_criterion(views, targets: Tensor) -> None:
    """With one row per target (no split, or the vote), the loss is exactly the criterion."""
    rows, criterion = seeded(3, 5), nn.CrossEntropyLoss(label_smoothing=0.1)
    assert torch.equal(CropVoteLoss(criterion, views=views)(rows, targets), criterion(rows, targets))


@pytest.mark.parametrize("views", [10, ten_crop()], ids=["int", "Views"])
def test_given_views_must_match_the_rows(views) -> None:
    criterion, targets = nn.CrossEntropyLoss(), torch.tensor([1, 0, 4])
    loss = CropVoteLoss(criterion, views=views)
    assert torch.equal(loss(seeded(30, 5), targets), criterion(seeded(30, 5), repeat_targets(targets, 10)))
    for rows in (15, 60, 6):
        with pytest.raises(CropVoteError) as caught:
            loss(seeded(rows, 5), targets)
        assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(("rows", "targets"), [(20, 3), (3, 20), (10, 0), (0, 3), (7, 2)])
def test_a_wrong_number_of_targets_is_refused(rows: int, targets: int) -> None:
    for views in (None, 10):
        with pytest.raises(CropVoteError) as caught:
            CropVoteLoss(nn.CrossEntropyLoss(), views=views)(seeded(rows, 5), torch.zeros(targets, dtype=torch.int64))
        assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("views", ["soft", torch.tensor(2), {"a": 1, "b": 2}, 2.0, True, None])
def test_an_invalid_number_of_views_is_refused(views) -> None:
    """A string also has a length."""
    with pytest.raises(CropVoteError):
        vote(torch.zeros(4, 3), views)


@pytest.mark.parametrize("how", ["soft", "probs"])
def test_a_class_that_every_view_masks_has_a_finite_gradient(how: str) -> None:
    rows = torch.tensor([[0.0, 1.0, -torch.inf], [2.0, 0.0, -torch.inf]], requires_grad=True)
    result = vote(rows, 2, how)
    assert result[0, 2] == -torch.inf
    result[:, :2].sum().backward()
    assert rows.grad.isfinite().all()


@pytest.mark.parametrize("how", ["probs", "hard"])
def test_a_single_output_cannot_use_class_votes(how: str) -> None:
    """Its log-probability is 0, whatever the output."""
    with pytest.raises(RowsError, match="CV607"):
        vote(seeded(10, 1), 10, how=how)
    assert torch.equal(vote(seeded(10, 1), 10), seeded(10, 1).mean(0, keepdim=True))


def test_a_class_is_not_a_criterion() -> None:
    with pytest.raises(InputTypeError, match="CV833"):
        CropVoteLoss(nn.CrossEntropyLoss)


def test_rows_without_a_class_are_refused() -> None:
    with pytest.raises(CropVoteError):
        vote(torch.zeros(10, 0), 10, how="hard")


# --- rows and targets are never broadcast -----------------------------------------------------------------------------


def squares(rows, targets):
    return ((rows - targets) ** 2).mean()


@pytest.mark.parametrize("criterion", [nn.MSELoss(), squares])
@pytest.mark.parametrize("rows", [40, 4])
def test_one_number_per_sample_matches_rows_of_one_output(criterion, rows):
    """(rows, 1) against (rows,) would be (rows, rows), without an error."""
    outputs, targets = torch.randn(rows, 1), torch.randn(4)
    wanted = sum((outputs[i, 0] - targets[i * 4 // rows]) ** 2 for i in range(rows)) / rows
    assert torch.allclose(CropVoteLoss(criterion)(outputs, targets), wanted)


@pytest.mark.parametrize(
    ("outputs", "targets"),
    [
        (torch.zeros(40, 7), torch.zeros(4)),
        (torch.zeros(40, 7), torch.zeros(4, 1)),
        (torch.zeros(40, 7), torch.zeros(4, 1, dtype=torch.long)),
        (torch.zeros(40), torch.zeros(4, 1)),
        (torch.zeros(40, 7), torch.zeros(4, dtype=torch.bool)),
        (torch.zeros(40, 1, 3, 3), torch.zeros(4, 3, 3)),
        (torch.zeros(4, 7), torch.zeros(4, 1)),
    ],
)
def test_shapes_that_would_be_broadcast_are_refused(outputs, targets):
    for criterion in (squares, lambda rows, targets: rows.sum()):
        with pytest.raises(RowsError):
            CropVoteLoss(criterion)(outputs, targets)


def test_an_elementwise_loss_refuses_class_indices():
    """With as many classes as rows, they would be broadcast."""
    losses = [nn.MSELoss, nn.L1Loss, nn.HuberLoss, nn.BCEWithLogitsLoss, nn.MultiLabelSoftMarginLoss]
    for criterion in [kind() for kind in (*losses, nn.SoftMarginLoss, nn.HingeEmbeddingLoss, nn.MultiLabelMarginLoss)]:
        with pytest.raises(RowsError):
            CropVoteLoss(criterion)(torch.zeros(20, 20), torch.zeros(2, dtype=torch.long))


def test_a_number_of_rows_that_is_not_the_views_is_refused():
    loss = CropVoteLoss(nn.CrossEntropyLoss(), views=10)
    loss(torch.zeros(40, 7), torch.zeros(4, dtype=torch.long))
    for rows, targets in ((40, 5), (20, 4), (40, 3)):
        with pytest.raises(RowsError):
            loss(torch.zeros(rows, 7), torch.zeros(targets, dtype=torch.long))


def test_class_indices_of_every_pixel_and_labels_of_every_class():
    outputs, targets = torch.randn(6, 5, 2, 3), torch.randint(5, (2, 2, 3))
    wanted = nn.functional.cross_entropy(outputs, targets.repeat_interleave(3, 0))
    assert torch.allclose(CropVoteLoss(nn.CrossEntropyLoss())(outputs, targets), wanted)
    outputs, targets = torch.randn(6, 5), torch.randint(2, (2, 5)).float()
    wanted = nn.functional.binary_cross_entropy_with_logits(outputs, targets.repeat_interleave(3, 0))
    assert torch.allclose(CropVoteLoss(nn.BCEWithLogitsLoss())(outputs, targets), wanted)


@pytest.mark.parametrize("rows", [6, 2])
def test_a_samples_weight_applies_to_each_of_its_views(rows):
    outputs, targets, weights = torch.randn(rows, 5), torch.tensor([1, 4]), torch.tensor([0.5, 2.0])
    losses = [nn.functional.cross_entropy(outputs[i], targets[i * 2 // rows]) for i in range(rows)]
    of_rows = [float(weights[i * 2 // rows]) for i in range(rows)]
    wanted = sum(w * x for w, x in zip(of_rows, losses, strict=True)) / sum(of_rows)
    loss = CropVoteLoss(nn.CrossEntropyLoss(reduction="none"))
    assert torch.allclose(loss(outputs, targets, weights), wanted)
    with pytest.raises(RowsError):
        loss(outputs, targets, weights[:1])
    with pytest.raises(RowsError):
        CropVoteLoss(nn.CrossEntropyLoss())(outputs, targets, weights)


@pytest.mark.parametrize("options", [{"ignore_index": 4}, {"weight": torch.tensor([1.0, 3.0, 1.0, 1.0, 0.5])}])
def test_equal_weights_change_nothing(options):
    outputs, targets = torch.randn(6, 5), torch.tensor([1, 4])
    wanted = CropVoteLoss(nn.CrossEntropyLoss(**options))(outputs, targets)
    loss = CropVoteLoss(nn.CrossEntropyLoss(**options, reduction="none"))
    assert torch.allclose(loss(outputs, targets, torch.ones(2)), wanted)
    assert torch.allclose(loss(outputs, targets, torch.full((2,), 3.0)), wanted)


# ---------------------------------------------------------------- votes that a loss cannot be meant for


def _voting(how: str = "soft", **options) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    return inject_crop_vote(net, after="0", vote=how, input_size=12, **options)


def test_a_model_left_in_eval_mode_does_not_learn_from_its_votes() -> None:
    """As from_pretrained and Lightning leave it: the norms would be frozen, and nothing would say so."""
    loss, x, y = CropVoteLoss(nn.CrossEntropyLoss()), seeded(4, 3, 12, 12), torch.arange(4)
    model = _voting().eval()
    scored = loss(model(x), y)  # a validation loss that nobody differentiates
    with pytest.raises(RowsError, match="CV315"):
        scored.backward()
    loss(model.train()(x), y).backward()
    norms_frozen = model.train()
    norms_frozen[1].eval()
    loss(norms_frozen(x), y).backward()
    assert model[0].weight.grad is not None


def test_a_model_that_trains_through_its_vote_may() -> None:
    model = _voting(train_output="vote").eval()
    CropVoteLoss(nn.CrossEntropyLoss())(model(seeded(4, 3, 12, 12)), torch.arange(4)).backward()
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("criterion", [nn.BCEWithLogitsLoss(), nn.MultiLabelSoftMarginLoss()])
def test_a_vote_of_classes_is_nothing_to_a_loss_of_labels(criterion: nn.Module) -> None:
    loss, x, labels = CropVoteLoss(criterion), seeded(4, 3, 12, 12), (seeded(4, 5) > 0).float()
    for how in ("probs", "hard"):
        with torch.no_grad(), pytest.raises(RowsError, match="CV316"):
            loss(_voting(how).eval()(x), labels)
    for how in ("soft", "sigmoid"):
        with torch.no_grad():
            assert loss(_voting(how).eval()(x), labels).isfinite()


def test_votes_are_saved_as_plain_tensors(tmp_path) -> None:
    votes = _voting(lambda rows: rows.mean(1)).eval()(seeded(2, 3, 12, 12))
    torch.save(votes, tmp_path / "votes.pt")
    loaded = torch.load(tmp_path / "votes.pt", weights_only=True)
    assert torch.equal(loaded, votes)
    assert vars(votes) == vars(loaded) == {}
