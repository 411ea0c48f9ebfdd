"""Geometry, order and derivatives of split_views against the oracle's explicit slices."""

from __future__ import annotations

import copy
import io
import pickle
from fractions import Fraction
from typing import Literal

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import oracle
from cropvote import CropVoteError, Views, five_crop, hflip, repeat_targets, split_views, ten_crop, vote
from cropvote.views import View, d4, grid
from strategies import Spec, maps, quick, scale_pairs, scales, sides, specs, thorough

DTYPES = [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64]
SMALL = Spec([(Fraction(0), Fraction(0)), (Fraction(1), Fraction(1, 3))], (Fraction(1, 2), Fraction(3, 4)), True)


def numbered(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return a map whose values all differ: 0, 1, 2, ..."""
    count = 1
    for size in shape:
        count *= size
    return torch.arange(count).reshape(shape).to(dtype)


def expected_split(x: Tensor, spec: Spec) -> Tensor:
    """Return the oracle's batch."""
    return oracle.sample_major(oracle.free_views(x, spec.positions, spec.scale, spec.mirror))


def assert_refused(spec: Spec, high: int, wide: int) -> None:
    """Check that every use of the views on a map of this size raises the library's ValueError."""
    for use in (
        lambda: spec.views().crop_size(high, wide),
        lambda: spec.views().offsets(high, wide),
        lambda: split_views(torch.zeros(2, 1, high, wide), spec.views()),
    ):
        with pytest.raises(CropVoteError) as caught:
            use()
        assert isinstance(caught.value, ValueError)


# ---------------------------------------------------------------- geometry


@thorough
@given(high=sides, wide=sides, spec=specs)
@example(high=3, wide=9, spec=Spec([(Fraction(0), Fraction(0)), (Fraction(1), Fraction(0))], Fraction(5, 6), True))
@example(high=9, wide=3, spec=Spec([(Fraction(0), Fraction(0)), (Fraction(1), Fraction(0))], Fraction(5, 6), True))
def test_sizes_and_offsets_match_the_contract(high: int, wide: int, spec: Spec) -> None:
    """Sizes, offsets, and errors exactly as in the contract."""
    if oracle.is_error(high, wide, spec.positions, spec.scale):
        assert_refused(spec, high, wide)
        return
    views = spec.views()
    places = oracle.offsets(high, wide, spec.positions, spec.scale, spec.mirror)
    assert len(views) == len(spec.positions) * (2 if spec.mirror else 1)
    assert tuple(views.crop_size(high, wide)) == oracle.crop_size(high, wide, spec.scale)
    assert [tuple(place[:2]) for place in views.offsets(high, wide)] == places


@pytest.mark.parametrize("side", range(1, 65))
def test_ten_crop_on_every_side(side: int) -> None:
    """(5*H + 3) // 6 for all sides; only sides 1 to 3 are refused."""
    crop = (5 * side + 3) // 6
    if side <= 3:
        for high, wide in ((side, 24), (24, side)):
            with pytest.raises(CropVoteError):
                ten_crop().crop_size(high, wide)
        return
    assert tuple(ten_crop().crop_size(side, 24)) == (crop, 20)
    assert tuple(ten_crop().crop_size(24, side)) == (20, crop)
    assert ten_crop().offsets(side, 24)[4] == ((side - crop) // 2, 2)


@quick
@given(side=sides, scale=st.floats(0.01, 1.0))
def test_a_float_scale_is_its_nearest_simple_fraction(side: int, scale: float) -> None:
    """A float s means Fraction(s).limit_denominator(1000)."""
    nearest = Fraction(scale).limit_denominator(1000)
    spec = Spec([(Fraction(1, 2), Fraction(1, 2))], nearest, False)
    assume(not oracle.is_error(side, side, spec.positions, nearest))
    views = Views(spec.positions, scale=scale)
    assert tuple(views.crop_size(side, side)) == oracle.crop_size(side, side, nearest)


@pytest.mark.parametrize("scale", [0, 0.0, -0.5, Fraction(7, 6), 1.01, float("nan"), float("inf"), (0.5, 0), (2, 0.5)])
def test_impossible_scales_are_refused(scale: object) -> None:
    with pytest.raises(CropVoteError) as caught:
        ten_crop(scale=scale)  # type: ignore[arg-type]
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("position", [(-0.1, 0), (0, 1.1), (Fraction(3, 2), 0), (float("nan"), 0)])
def test_positions_outside_the_margin_are_refused(position: tuple) -> None:
    with pytest.raises(CropVoteError) as caught:
        Views([position], scale=0.5)
    assert isinstance(caught.value, ValueError)


def test_no_positions_are_refused() -> None:
    with pytest.raises(CropVoteError):
        Views([])


# ---------------------------------------------------------------- split equals explicit slices


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(quick, max_examples=25)
@given(data=st.data(), spec=specs)
def test_split_equals_the_slices(dtype: torch.dtype, data: st.DataObject, spec: Spec) -> None:
    """Exactly, in NCHW and in NHWC, with the map's dtype."""
    x = data.draw(maps(dtype))
    if oracle.is_error(x.shape[2], x.shape[3], spec.positions, spec.scale):
        assert_refused(spec, x.shape[2], x.shape[3])
        return
    want = expected_split(x, spec)
    for found in (
        split_views(x, spec.views()),
        split_views(x.permute(0, 2, 3, 1).contiguous(), spec.views(), layout="NHWC").permute(0, 3, 1, 2),
    ):
        assert found.dtype == dtype
        assert torch.equal(found, want)


@pytest.mark.parametrize("shape", [(2, 3, 24, 24), (1, 2, 4, 7), (3, 1, 13, 8), (2, 2, 48, 36)])
def test_ten_crop_equals_ten_hand_written_slices(shape: tuple[int, ...]) -> None:
    x = numbered(*shape)
    assert torch.equal(split_views(x, ten_crop()), oracle.sample_major(oracle.ten_views(x)))
    assert torch.equal(split_views(x, five_crop()), oracle.sample_major(oracle.five_views(x)))
    assert torch.equal(split_views(x, hflip()), oracle.sample_major([x, x.flip(3)]))


@quick
@given(x=maps(min_side=4), rows=st.integers(2, 3), columns=st.integers(2, 4), scale=scale_pairs, mirror=st.booleans())
def test_grid_is_row_by_row_from_edge_to_edge(x: Tensor, rows: int, columns: int, scale, mirror: bool) -> None:
    spec = Spec(oracle.grid_positions(rows, columns), scale, mirror)
    assume(not oracle.is_error(x.shape[2], x.shape[3], spec.positions, scale))
    found = split_views(x, grid(rows, columns, scale=scale, mirror=mirror))
    assert torch.equal(found, expected_split(x, spec))


@quick
@given(x=maps(min_side=4), scale=scales)
def test_ten_and_five_crop_take_a_scale(x: Tensor, scale: Fraction) -> None:
    half = Fraction(1, 2)
    places = [(Fraction(v), Fraction(h)) for v, h in ((0, 0), (0, 1), (1, 0), (1, 1), (half, half))]
    assume(not oracle.is_error(x.shape[2], x.shape[3], places, scale))
    assert torch.equal(split_views(x, ten_crop(scale)), expected_split(x, Spec(places, scale, True)))
    assert torch.equal(split_views(x, five_crop(scale)), expected_split(x, Spec(places, scale, False)))


def test_d4_holds_the_eight_symmetries_of_a_square() -> None:
    x = numbered(1, 2, 5, 5)
    want = [torch.rot90(image, turns, (2, 3)) for image in (x, oracle.mirrored(x)) for turns in range(4)]
    found = split_views(x, d4())
    assert len(found) == len(d4()) == 8
    assert torch.equal(found[0], x[0])
    assert all(any(torch.equal(image[0], row) for row in found) for image in want)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_turns_are_counter_clockwise_and_their_gradients_turn_back(layout: Literal["NCHW", "NHWC"]) -> None:
    """A mirrored view is mirrored first, then turned."""
    views = Views([View(0, 1, mirror=mirror, turns=turns) for mirror in (False, True) for turns in range(4)], scale=0.5)
    x, weights = torch.rand(2, 3, 8, 8, dtype=torch.double), torch.rand(16, 3, 4, 4, dtype=torch.double)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    by_hand = [
        torch.rot90(theirs.flip(3) if mirror else theirs, turns, (2, 3))[:, :, :4, 4:]
        for mirror in (False, True)
        for turns in range(4)
    ]
    there, back = ((0, 2, 3, 1), (0, 3, 1, 2)) if layout == "NHWC" else ((0, 1, 2, 3),) * 2
    found = split_views(ours.permute(there), views, layout=layout).permute(back)
    assert torch.equal(found, torch.stack(by_hand, 1).flatten(0, 1))
    (found * weights).sum().backward()
    (torch.stack(by_hand, 1).flatten(0, 1) * weights).sum().backward()
    assert torch.allclose(ours.grad, theirs.grad)


@pytest.mark.parametrize("side", [9, 12, 24, 29, 48, 60])
def test_torchvision_ten_crop_agrees(side: int) -> None:
    """Same crops in the same order (for sides where torchvision rounds the centre down)."""
    functional = pytest.importorskip("torchvision.transforms.functional")
    crop = (5 * side + 3) // 6
    assert round((side - crop) / 2) == (side - crop) // 2
    x = numbered(2, 3, side, side)
    assert torch.equal(split_views(x, ten_crop()), oracle.sample_major(functional.ten_crop(x, [crop, crop])))


@pytest.mark.parametrize("views", [ten_crop(), hflip(), grid(2, 3), SMALL.views()], ids=["ten", "hflip", "grid", "odd"])
def test_memory_format_is_kept(views: Views) -> None:
    """channels_last in, channels_last out; contiguous in, contiguous out; strided maps work."""
    x = numbered(2, 3, 12, 8)
    last = x.contiguous(memory_format=torch.channels_last)
    want = split_views(x, views)
    assert want.is_contiguous()
    found = split_views(last, views)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found, want)
    nhwc = split_views(last.permute(0, 2, 3, 1), views, layout="NHWC")
    assert nhwc.is_contiguous()
    assert torch.equal(nhwc.permute(0, 3, 1, 2), want)
    wide = numbered(2, 6, 12, 16)[:, ::2, :, ::2]
    assert torch.equal(split_views(wide, views), split_views(wide.contiguous(), views))


# ---------------------------------------------------------------- order and round trips


@quick
@given(count=st.integers(1, 4), high=st.integers(1, 20), wide=st.integers(1, 20), spec=specs)
def test_rows_are_sample_major(count: int, high: int, wide: int, spec: Spec) -> None:
    """Row n*V + v is view v of sample n: the map's channels encode sample, row and column."""
    assume(not oracle.is_error(high, wide, spec.positions, spec.scale))
    x = torch.stack(torch.meshgrid(*(torch.arange(size) for size in (count, high, wide)), indexing="ij"), dim=1)
    rows = split_views(x, spec.views())
    places = oracle.offsets(high, wide, spec.positions, spec.scale, spec.mirror)
    for n in range(count):
        for v, (top, left) in enumerate(places):
            row = rows[n * len(places) + v]
            assert (row[0] == n).all()
            assert row[1, 0, 0] == top
            is_mirrored = v >= len(spec.positions)
            assert row[2, 0, 0] == (wide - 1 - left if is_mirrored else left)
    assert torch.equal(repeat_targets(torch.arange(count), spec.views()), rows[:, 0, 0, 0])
    assert torch.equal(repeat_targets(torch.arange(count), len(places)), rows[:, 0, 0, 0])


@quick
@given(x=maps(torch.float64, min_side=3), spec=specs, how=st.sampled_from(["soft", "probs", "hard", "mean", "median"]))
def test_vote_gathers_the_rows_that_split_made(x: Tensor, spec: Spec, how: str) -> None:
    """The vote over pooled views equals the oracle's vote over its own views of each sample."""
    assume(not oracle.is_error(x.shape[2], x.shape[3], spec.positions, spec.scale))
    assume(x.shape[1] > 1 or how not in ("probs", "hard"))
    x = torch.sin(x)
    views = [view.mean(dim=(2, 3)) for view in oracle.free_views(x, spec.positions, spec.scale, spec.mirror)]
    found = vote(split_views(x, spec.views()).mean(dim=(2, 3)), spec.views(), how=how)
    torch.testing.assert_close(found, oracle.vote(torch.stack(views, dim=1), how), rtol=0, atol=1e-9)


@quick
@given(x=maps(torch.float32))
def test_one_view_of_the_whole_map_is_the_identity(x: Tensor) -> None:
    whole = Views([(Fraction(1, 2), Fraction(1, 2))], scale=1)
    assert torch.equal(split_views(x, whole), x)


@pytest.mark.parametrize("targets", [torch.tensor([3, 1]), torch.tensor([[0.2, 0.8], [0.5, 0.5]]), torch.rand(2, 1)])
def test_repeat_targets_repeats_each_sample_in_place(targets: Tensor) -> None:
    """Class indices, soft targets and regression targets."""
    want = torch.stack([targets[n] for n in range(2) for _ in range(10)])
    assert torch.equal(repeat_targets(targets, ten_crop()), want)


# ---------------------------------------------------------------- derivatives and transforms


@pytest.mark.parametrize("spec", [SMALL, Spec(oracle.grid_positions(2, 2), Fraction(2, 3), True)], ids=["odd", "grid"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_gradcheck_and_gradgradcheck(spec: Spec, layout: str, memory: torch.memory_format) -> None:
    x = torch.randn(2, 2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=memory).requires_grad_()
    views = spec.views()
    assert gradcheck(lambda x: split_views(x, views, layout=layout), x)
    assert gradgradcheck(lambda x: split_views(x, views, layout=layout), x)
    assert gradgradcheck(lambda x: split_views(x, views, layout=layout).pow(3), x)


@quick
@given(x=maps(torch.float64, min_side=3), spec=specs)
@example(x=numbered(2, 3, 12, 8), spec=SMALL)
def test_gradient_equals_autograd_through_naive_slices(x: Tensor, spec: Spec) -> None:
    """The match is exact because the incoming gradients are whole numbers."""
    assume(not oracle.is_error(x.shape[2], x.shape[3], spec.positions, spec.scale))
    naive, ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    want = expected_split(naive, spec)
    weight = numbered(*want.shape)
    want.backward(weight)
    split_views(ours, spec.views()).backward(weight)
    assert torch.equal(ours.grad, naive.grad)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("views", [ten_crop(), Views([(0, 0)], scale=1)], ids=["ten", "whole"])
def test_the_rows_may_be_changed_in_place(views: Views, memory: torch.memory_format) -> None:
    """An in-place ReLU at the tail's start, for example, works with autograd and leaves the map unchanged."""
    x = numbered(2, 3, 12, 9).sub(300).contiguous(memory_format=memory)
    naive, ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.relu_(split_views(ours, views)).pow(2).sum().backward()
    split_views(naive, views).relu().pow(2).sum().backward()
    assert torch.equal(ours.grad, naive.grad)
    assert torch.equal(ours, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradient_counts_the_views_over_each_pixel(dtype: torch.dtype) -> None:
    """Also with an expanded incoming gradient (from .sum()), in low precision, and channels_last."""
    x = numbered(2, 3, 12, 9, dtype=dtype).contiguous(memory_format=torch.channels_last)
    naive, ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    sum(view.sum() for view in oracle.ten_views(naive)).backward()
    split_views(ours, ten_crop()).sum().backward()
    assert ours.grad.dtype == dtype
    assert torch.equal(ours.grad, naive.grad)
    assert ours.grad.sum() == 2 * 3 * 10 * 10 * 8


def test_vmap_equals_a_loop() -> None:
    """Over the first or another dimension, and through the gradient."""
    x = numbered(3, 2, 2, 6, 7)
    views = SMALL.views()
    want = torch.stack([split_views(one, views) for one in x])
    assert torch.equal(torch.func.vmap(lambda one: split_views(one, views))(x), want)
    moved = x.movedim(0, 2)
    assert torch.equal(torch.func.vmap(lambda one: split_views(one, views), in_dims=2)(moved), want)

    def energy(one: Tensor, cut) -> Tensor:
        return cut(one).pow(2).sum()

    naive = torch.stack([torch.func.grad(energy)(one, lambda x: expected_split(x, SMALL)) for one in x])
    found = torch.func.vmap(torch.func.grad(lambda one: energy(one, lambda x: split_views(x, views))))(x)
    assert torch.equal(found, naive)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:Warning")  # raised inside torch's own jvp
def test_forward_mode_is_right() -> None:
    """torch.func.jvp and the dual numbers of torch.autograd.forward_ad never give a silent zero."""
    x, tangent = numbered(2, 2, 6, 7), numbered(2, 2, 6, 7).cos()
    want = expected_split(tangent, SMALL)
    _, found = torch.func.jvp(lambda x: split_views(x, SMALL.views()), (x,), (tangent,))
    assert torch.equal(found, want)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        found = torch.autograd.forward_ad.unpack_dual(split_views(dual, SMALL.views())).tangent
    assert torch.equal(found, want)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("views", [ten_crop(), SMALL.views()], ids=["ten", "odd"])
def test_compile_traces_in_one_graph(dynamic: bool | None, views: Views) -> None:
    """fullgraph, several batch sizes and map sizes, forward and backward."""
    compiled = torch.compile(lambda x: split_views(x, views) * 2, fullgraph=True, backend="eager", dynamic=dynamic)
    for count, high, wide in ((2, 12, 8), (3, 12, 8), (5, 24, 18)):
        plain, traced = (numbered(count, 2, high, wide).requires_grad_() for _ in "ab")
        want = split_views(plain, views) * 2
        found = compiled(traced)
        assert torch.equal(found, want)
        weight = numbered(*want.shape)
        want.backward(weight)
        found.backward(weight)
        assert torch.equal(traced.grad, plain.grad)


# ---------------------------------------------------------------- bad maps


@pytest.mark.parametrize("shape", [(8,), (8, 8), (2, 8, 8), (1, 2, 3, 8, 8)])
def test_a_map_that_is_not_4_d_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(CropVoteError):
        split_views(torch.zeros(shape), ten_crop())


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(CropVoteError):
        split_views(torch.zeros(2, 3, 8, 8), ten_crop(), layout="CHWN")  # type: ignore[arg-type]


WRITTEN = [
    ten_crop(), ten_crop(2 / 3), ten_crop((1, 0.7)), ten_crop(1), five_crop().aligned(4), hflip(), d4(),
    grid(2, 3, mirror=True), grid(1, 3, scale=Fraction(1, 1234)), ten_crop().take([4, 9]), hflip().take([1]),
    Views([View(Fraction(1, 2), Fraction(0), True, 1), (0, 1 / 3)], scale=0.5, stride=4),
    Views([(0, 0)], scale=1, stride=3),
]  # fmt: skip


@pytest.mark.parametrize("views", WRITTEN, ids=repr)
def test_repr_and_files_give_the_same_views(views):
    names = {one.__name__: one for one in (Views, View, Fraction, ten_crop, five_crop, hflip, d4)}
    assert eval(repr(views), names) == views  # noqa: S307
    stream = io.BytesIO()
    torch.save(views, stream)
    stream.seek(0)
    assert torch.load(stream, weights_only=True) == views
    assert pickle.loads(pickle.dumps(views)) == copy.deepcopy(views) == views
