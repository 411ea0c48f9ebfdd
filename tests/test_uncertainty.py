"""Agreement, entropy and mutual information, against plain Python and known values."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import networks
from cropvote import CropVoteError, inject_crop_vote, per_view
from cropvote.errors import InputTypeError, RowsError
from cropvote.plots import plot_agreement, plot_views
from cropvote.uncertainty import agreement, mutual_information
from cropvote.uncertainty import predictive_entropy as entropy

FUNCTIONS = [agreement, entropy, mutual_information]


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    weights = [math.exp(x - top) for x in row]
    return [w / math.fsum(weights) for w in weights]


def spread(shares: list[float]) -> float:
    return -math.fsum(p * math.log(p) for p in shares if p > 0)


def by_hand(sample: list[list[float]]) -> tuple[float, float, float]:
    views = [softmax(row) for row in sample]
    chosen = Counter(row.index(max(row)) for row in sample)
    mean = [math.fsum(column) / len(views) for column in zip(*views, strict=True)]
    return (
        max(chosen.values()) / len(sample),
        spread(mean),
        spread(mean) - math.fsum(map(spread, views)) / len(views),
    )


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_single_output_has_no_classes(function):
    with pytest.raises(CropVoteError, match="CV604"):
        function(torch.randn(2, 10, 1))


@given(st.integers(1, 4), st.integers(1, 12), st.integers(2, 7), st.floats(0, 30), st.integers(0, 1000))
def test_against_plain_python(samples, views, classes, scale, seed):
    logits = scale * torch.randn(samples, views, classes, generator=torch.Generator().manual_seed(seed)).double()
    wanted = [by_hand(sample.tolist()) for sample in logits]
    for function, values in zip(FUNCTIONS, zip(*wanted, strict=True), strict=True):
        assert torch.allclose(function(logits), torch.tensor(values, dtype=torch.float64), atol=1e-9)


def test_the_ends_of_their_scales():
    opposite = torch.eye(5).mul(1000.0)[None]  # five views, each sure of a different class
    alike = opposite[:, :1].expand(-1, 5, -1)
    unsure = torch.zeros(1, 5, 5)
    assert [float(f(opposite)) for f in FUNCTIONS] == pytest.approx([0.2, math.log(5), math.log(5)])
    assert [float(f(alike)) for f in FUNCTIONS] == pytest.approx([1, 0, 0])
    assert [float(f(unsure)) for f in FUNCTIONS] == pytest.approx([1, math.log(5), 0], abs=1e-6)
    assert mutual_information(torch.randn(50, 10, 7) * 1e-4).min() >= 0  # no negative rounding errors


def test_half_precision_masks_and_no_samples():
    logits = torch.randn(3, 10, 7)
    for function in FUNCTIONS:
        assert function(logits.half()).dtype == torch.float32
        assert function(logits[:0]).shape == (0,)
        masked = torch.cat([logits, torch.full((3, 10, 1), -math.inf)], 2)
        assert torch.allclose(function(masked), function(logits), atol=1e-6)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_invalid_logits(function):
    with pytest.raises(CropVoteError, match="CV844"):
        function(torch.zeros(30, 7))
    with pytest.raises(CropVoteError, match="CV844"):
        function(torch.zeros(3, 0, 7))
    with pytest.raises(CropVoteError, match="CV844"):
        function(torch.zeros(3, 10, 7, dtype=torch.long))
    with pytest.raises(InputTypeError, match="CV844"):
        function([1.0])


def test_pictures(tmp_path):
    model = inject_crop_vote(networks.fer(), after="layer1", input_size=48)
    image = torch.randn(3, 48, 48)
    plot_views(model, image, tmp_path / "views.png", classes="abcdefg")
    plot_agreement(per_view(model, image.expand(4, -1, -1, -1)).detach(), tmp_path / "agreement.svg")
    assert min(path.stat().st_size for path in tmp_path.iterdir()) > 3000
    with pytest.raises(CropVoteError, match="CV840"):
        plot_views(model, image[None], tmp_path / "views.png")
    with pytest.raises(CropVoteError, match="CV843"):
        plot_views(model, image, tmp_path / "views.png", classes=["a", "b"])
    one = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1)).eval()
    inject_crop_vote(one, after="0", input_size=48)
    with pytest.raises(RowsError, match="CV604"):
        plot_views(one, image, tmp_path / "views.png")
    with pytest.raises(InputTypeError, match="CV841"):
        plot_agreement(torch.randn(4, 10, 7), tmp_path / "agreement.png", targets=torch.zeros(3))


def test_of_independent_labels_each_is_a_pair_of_classes():
    logits = 3 * torch.randn(4, 10, 5, generator=torch.Generator().manual_seed(0)).double()
    for function in FUNCTIONS:
        found = function(logits, multilabel=True)
        pairs = torch.stack([logits, torch.zeros_like(logits)], dim=-1)  # softmax of (x, 0) is sigmoid(x)
        wanted = torch.stack([function(pairs[:, :, label]) for label in range(5)], dim=1)
        assert torch.allclose(found, wanted, atol=1e-12)
    assert agreement(logits[:, :, :1], multilabel=True).shape == (4, 1)
    logits[1, 3, 2] = torch.nan
    for function in FUNCTIONS:
        assert function(logits, multilabel=True).isnan().nonzero().tolist() == [[1, 2]]
