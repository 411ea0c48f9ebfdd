"""Calls with one image or one view track the data, at only Python's cost, and leave no trace of it."""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import networks
from cropvote import hflip, inject_crop_vote, per_view, remove_crop_vote, settings, vote_until_sure
from cropvote.errors import RowsError, SiteError
from cropvote.surgery import checking, injection
from cropvote.tracking import Tracked, came_around, plain, track
from networks import IMAGES


def test_what_is_computed_from_a_tracked_tensor_is_tracked():
    x, y = track(torch.randn(2, 3), 0), torch.randn(2, 3)
    joined = [x + y, y + x, torch.cat([y, x]), x.sum(), x.max(1).values, x.chunk(2)[1], y * x.mean(), x[0], x.T, x.mT]
    joined += [x.data, x.detach(), x.view(-1), torch.einsum("ij,kj->ik", y, x), x.double(), torch.where(y > 0, y, x)]
    for made in joined:
        assert came_around(made, 1)
    assert type(x.shape) is torch.Size
    for made in (torch.zeros_like(x), torch.zeros_like(input=x), x.new_ones(2), y.clone(), plain(x), plain(x + y)):
        assert type(made) is torch.Tensor
    for template in (y.to(x), y.type_as(x), y.view_as(x), x.new_tensor([1.0]), x.new(2), x.new_full((2,), 1.0)):
        assert type(template) is torch.Tensor
    with pytest.warns(UserWarning, match="copy construct"):
        assert came_around(x.new_tensor(x), 1)
    assert came_around(x.to(y), 1)
    behind = track(torch.randn(2, 3), 1)
    assert not came_around(behind + y, 1)
    assert came_around(behind + x, 1)
    behind.add_(x)
    assert came_around(behind, 1)


def test_gradients_files_and_copies_match_plain_tensors():
    leaf = torch.randn(3, requires_grad=True)
    track(leaf, 0).square().sum().backward()
    assert torch.allclose(leaf.grad, 2 * leaf)
    file = io.BytesIO()
    torch.save(track(torch.ones(2), 0), file)
    file.seek(0)
    assert type(torch.load(file, weights_only=True)) is torch.Tensor
    assert copy.deepcopy(track(torch.ones(2), 1)).passed == copy.copy(track(torch.ones(2), 1)).passed == 1


@pytest.mark.parametrize("images", [IMAGES[:1], IMAGES])
@pytest.mark.parametrize("options", [{}, {"eval_views": "centre"}, {"train_views": 1}])
@pytest.mark.parametrize("training", [False, True])
def test_a_tracked_call_gives_the_same_numbers(images, options, training):
    results = []
    for tracking in (True, False):
        model = networks.still(inject_crop_vote(networks.fer(), after="layer2", input_size=48, **options))
        model.train(training)
        networks.still(model)
        model._cropvote.tracking = tracking
        torch.manual_seed(0)
        x = images.clone().requires_grad_()
        output = model(x)
        output.square().sum().backward()
        assert type(output) is torch.Tensor
        results.append((output.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.allclose(results[0][1], results[1][1], atol=1e-6)


def test_nothing_tracked_is_returned():
    class Features(networks.Net):
        def forward(self, x):
            front = self.front(x)
            return {"logits": self.head(self.site(front)), "features": [front, {"images": x}]}

    model = inject_crop_vote(Features().eval(), after="site", input_size=48)
    output = model(IMAGES[:1])
    assert [type(x) for x in (output["logits"], *output["features"][:1], output["features"][1]["images"])] == [
        torch.Tensor
    ] * 3


def test_a_new_size_and_a_counting_argument_need_no_check(monkeypatch):
    class Counting(networks.Net):
        def forward(self, x, step: int = 0, name: str = ""):
            return super().forward(x)

    model = inject_crop_vote(Counting().eval(), after="site", input_size=48)
    model(IMAGES, 1, name="a")
    checked = []
    check = checking.check_sites
    monkeypatch.setattr(checking, "check_sites", lambda *args: checked.append(1) or check(*args))
    for i in range(100):
        model(torch.randn(1 + i % 2, 3, 40 + i, 48), i + 2, name=f"picture {i}")
    assert not checked
    assert len(model._cropvote.checked) <= 4
    assert not model._cropvote.layouts_by_size


def test_the_memory_of_checks_is_bounded():
    class Flags(networks.Net):
        def forward(self, x, **flags):
            return super().forward(x)

    model = inject_crop_vote(Flags().eval(), after="site", input_size=48)
    for i in range(injection.MOST_CALLS + 10):
        model(IMAGES, **{f"flag_{i}": True})
    assert len(model._cropvote.checked) <= injection.MOST_CALLS


class Opening(networks.Net):
    """Opens a path around the site with the function ``way``."""

    way = None

    def forward(self, x):
        front = self.front(x)
        y = self.head(self.site(front))
        if self.way is not None:
            mean = front.mean((2, 3))[:, :7]
            y = self.way(y, mean, front)
        return y


def added(y, mean, front):
    y.add_(mean)
    return y


def set_item(y, mean, front):
    y[:, :3] += mean[:, :3]
    return y


def into_zeros(y, mean, front):
    z = mean.new_zeros(mean.shape)
    z[:] = mean
    return y + z


def by_out(y, mean, front):
    return torch.add(y, mean, out=torch.empty_like(y))


def by_a_named_tuple(y, mean, front):
    return y + torch.stack(tuple(front.flatten(1).aminmax(dim=1)), 1).sum(1, keepdim=True)


@pytest.mark.parametrize("way", [added, set_item, into_zeros, by_out, by_a_named_tuple])
def test_ways_around_the_site_with_one_image(way):
    model = inject_crop_vote(Opening().eval(), after="site", input_size=48)
    with torch.no_grad():
        model(IMAGES[:1])
        model.way = way
        with pytest.raises(SiteError):
            model(IMAGES[:1])


def test_the_result_of_a_one_time_path_is_not_returned():
    """A check afterwards runs on a copy with a later count."""

    class Counting(networks.Net):
        count = 0

        def forward(self, x):
            self.count += 1
            front = self.front(x)
            y = self.site(front)
            return self.head(y * front.mean((2, 3), keepdim=True) if self.count == 3 else y)

    model = inject_crop_vote(Counting().eval(), after="site", input_size=48)
    first = model(IMAGES[:1])
    assert torch.equal(model(IMAGES[:1]), first)
    with pytest.raises(SiteError):
        model(IMAGES[:1])
    assert torch.equal(model(IMAGES[:1]), first)


class Scaled(torch.Tensor):
    """A weight with its own override, like a quantised one."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        args = [x.as_subclass(torch.Tensor) * 2 if type(x) is cls else x for x in args]
        return func(*args, **(kwargs or {}))


def test_overrides_of_weight_classes_are_used():
    class Quantised(networks.Net):
        def __init__(self):
            super().__init__()
            self.kernel = torch.randn(8, 8, 1, 1, generator=torch.Generator().manual_seed(2)).as_subclass(Scaled)

        def forward(self, x):
            return self.head(self.site(nn.functional.conv2d(self.front(x), self.kernel)))

    model = inject_crop_vote(Quantised().eval(), after="site", check=False)
    wanted = model(IMAGES)[:1]
    model._cropvote.check = model._cropvote.tracking = True
    model._cropvote.checked = {(False, model._cropvote.images_only): None}
    assert torch.allclose(model(IMAGES[:1]), wanted, atol=1e-5)


def test_a_model_that_rejects_tensor_subclasses_runs_untracked():
    class Strict(networks.Net):
        def forward(self, x):
            if type(x) is Tracked:
                raise TypeError("only tensors of the usual classes")
            return super().forward(x)

    model = inject_crop_vote(Strict().eval(), after="site", input_size=48)
    plain = inject_crop_vote(networks.Net().eval(), after="site", input_size=48)
    plain.load_state_dict(model.state_dict())
    for images in (IMAGES[:1], IMAGES[:1, :, :40]):
        assert torch.allclose(model(images), plain(images), atol=1e-6)


def test_a_buffer_that_a_call_replaces_stays_a_plain_tensor():
    class Averaging(networks.Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("ema", torch.zeros(8))

        def forward(self, x):
            front = self.front(x)
            self.ema = 0.9 * self.ema + 0.1 * front.detach().mean((0, 2, 3))
            return self.head(self.site(front))

    model = inject_crop_vote(Averaging(), after="site", input_size=48, train_views=1)
    model(IMAGES)
    assert type(model.ema) is torch.Tensor
    assert model.ema.abs().sum() > 0


class Gated(networks.Net):
    gate = False

    def forward(self, x):
        x = self.front(x)
        y = self.site(x)
        return self.head(y * x.mean((2, 3), keepdim=True) if self.gate else y)


def test_several_rows_that_do_not_fit_say_why():
    model = inject_crop_vote(Gated().eval(), after="site", input_size=48)
    model(IMAGES)
    model.gate = True
    with pytest.raises(RowsError) as caught:
        model(IMAGES)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert "CV101" in str(caught.value)


def test_an_adapter_put_around_the_site_is_found():
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.side = base, nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return self.base(x) + self.side(x).mean((2, 3), keepdim=True)

    model = inject_crop_vote(networks.Net().eval(), after="site", input_size=48)
    model.site = Adapter(model.site)
    with pytest.raises(SiteError):
        model(IMAGES[:1])
    with pytest.raises(RowsError):
        model(IMAGES)


@pytest.mark.parametrize("read", [per_view, lambda model, x: vote_until_sure(model, x, first="centre")])
def test_reading_the_views_is_tracked_too(read):
    model = inject_crop_vote(Gated().eval(), after="site", input_size=48)
    read(model, IMAGES[:1])
    model.gate = True
    with pytest.raises(SiteError):
        read(model, IMAGES[:1])


# --- a call is read from the settings once ----------------------------------------------------------------------------

CHANGES = {
    "enabled": ({"enabled": False}, {"enabled": True}),
    "disabled": ({}, {"enabled": False}),
    "other views": ({"eval_views": [0, 1]}, {"eval_views": [2, 3]}),
    "output": ({}, {"eval_output": "views"}),
    "vote": ({}, {"vote": "hard"}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_in_the_middle_of_a_call_has_no_effect_on_it(change):
    before, after = change
    model = inject_crop_vote(networks.fer(), after="layer2", input_size=48)
    for name, value in before.items():
        setattr(settings(model), name, value)
    wanted = model(IMAGES)
    hook = model.layer1.register_forward_hook(
        lambda *_: [setattr(settings(model), name, value) for name, value in after.items()] and None
    )
    assert torch.equal(model(IMAGES), wanted)
    hook.remove()


@pytest.mark.parametrize("change", [{"eval_views": [2, 3]}, {"enabled": False}, "train"])
def test_a_checkpoint_that_would_rerun_with_other_settings_is_refused(change):
    """The checkpointed part, the split and what follows, runs again in the backward pass."""

    class Checkpointed(networks.Net):
        def forward(self, x):
            return checkpoint(lambda x: self.head(self.act(self.site(x))), self.front(x), use_reentrant=False)

    options = {"train_views": 2, "eval_views": [0, 1]}
    model = inject_crop_vote(Checkpointed().eval(), after="site", input_size=48, **options)
    gradients = []
    for changed in (False, True):
        loss = model(IMAGES).square().sum()
        if not changed:
            loss.backward()
            gradients.append(model.front.weight.grad)
            continue
        if change == "train":
            model.train()
        else:
            for name, value in change.items():
                setattr(settings(model), name, value)
        with pytest.raises(RowsError):
            loss.backward()
    assert gradients[0].abs().sum() > 0


def test_threads_that_read_views_do_not_change_the_compilers_stance():
    model = inject_crop_vote(networks.fer(), after="layer2", input_size=48)
    barrier = threading.Barrier(4, timeout=30)

    def work() -> None:
        barrier.wait()
        for _ in range(5):
            per_view(model, IMAGES)
            vote_until_sure(model, IMAGES)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    graphs: list[int] = []

    def backend(graph, example):
        graphs.append(1)
        return graph.forward

    torch.compile(nn.Linear(2, 2), backend=backend)(torch.zeros(1, 2))
    assert graphs


def test_reading_views_of_a_separately_compiled_part_is_an_error():
    model = inject_crop_vote(networks.fer(), after="layer2", input_size=48, views=hflip())
    model.layer2.compile(backend="eager")
    with torch.no_grad():
        wanted = model(IMAGES)
        assert wanted.shape == (3, 7)
        with pytest.raises(RowsError):
            per_view(model, IMAGES)
    assert isinstance(track(IMAGES, 0), Tracked)


def foreach(h, x):
    torch._foreach_add_([h], [x])
    return h


def into_out(h, x):
    values, indices = h.new_empty(x.shape[:2]), torch.empty(x.shape[:2], dtype=torch.long)
    torch.max(x.flatten(2), 2, out=(values, indices))
    return h + values[..., None, None]


@pytest.mark.filterwarnings("ignore::UserWarning")  # of PyTorch, about copies
@pytest.mark.parametrize(
    "leak", [foreach, into_out, lambda h, x: h + copy.copy(x), lambda h, x: h + copy.deepcopy(x),
             lambda h, x: h + x.new_tensor(x)]
)  # fmt: skip
def test_data_paths_other_than_functions(leak):
    class Sometimes(networks.Net):
        open = False

        def forward(self, x):
            h = self.site(self.front(x))
            if self.open:
                h = leak(h, self.front(x).mean((2, 3), keepdim=True).expand(-1, -1, *h.shape[2:]).clone())
            return self.head(h)

    model = inject_crop_vote(Sometimes().eval(), after="site", input_size=48)
    model(IMAGES[:1])
    model.open = True
    with torch.no_grad(), pytest.raises(SiteError, match="CV1"):
        model(IMAGES[:1])


def test_a_repeated_call_has_side_effects_only_once():
    """If a model rejects other tensor classes, BatchNorm still counts one call, and random numbers are drawn once."""

    class Refusing(networks.Net):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(8)

        def forward(self, x):
            h = self.bn(self.front(x)) + torch.rand(1)
            if type(x) is Tracked:
                raise TypeError("only plain tensors")
            return self.head(self.site(h))

    model = inject_crop_vote(Refusing(), after="site", train_views=1, input_size=48).train()
    torch.manual_seed(0)
    model(IMAGES)
    assert model.bn.num_batches_tracked == 1
    after = torch.rand(1)
    torch.manual_seed(0)
    model(IMAGES)
    assert torch.equal(torch.rand(1), after)


@pytest.mark.parametrize(
    "scale",
    [
        lambda x, t: t.to(x),
        lambda x, t: t.type_as(x),
        lambda x, t: x.new_tensor([2.0]),
        lambda x, t: x.new(1).fill_(2),
        lambda x, t: x.new_empty_strided((1,), (1,)).fill_(2),
        lambda x, t: t.view(1, 1).view_as(x[:1, 0, 0, :1])[0],
    ],
)
def test_images_that_only_say_the_type_or_the_shape_are_no_path(scale):
    class Scaling(networks.Net):
        def forward(self, x):
            return super().forward(x) / scale(x, torch.tensor([2.0]))

    for options in ({}, {"eval_views": "centre"}):
        model = inject_crop_vote(Scaling().eval(), after="site", input_size=48, **options)
        assert torch.allclose(model(IMAGES[:1]), model(IMAGES)[:1], atol=1e-6)


def test_what_a_forward_keeps_is_an_ordinary_tensor():
    kept = []

    class Keeping(networks.Net):
        mean = None

        def forward(self, x):
            if self.mean is None:
                self.mean = torch.ones(1, 3, 1, 1).to(x) * x.mean().detach()
            kept.append(x * 2)
            self.aside = {"half": [x / 2]}
            return super().forward(x - self.mean * 0)

    model = inject_crop_vote(Keeping().eval(), after="site", check=False)
    model._cropvote.check = model._cropvote.tracking = True
    model._cropvote.checked = {(False, model._cropvote.images_only): None}
    model(IMAGES[:1])
    for tensor in (model.mean, kept[-1], model.aside["half"][0]):
        assert type(tensor) is torch.Tensor
        assert "passed" not in vars(tensor)
    remove_crop_vote(model)
    torch.compiler.reset()
    assert torch.compile(model, backend="eager", fullgraph=False)(IMAGES).shape == (3, 7)


@pytest.mark.parametrize("calls_before", [0, 1])
def test_a_call_that_cannot_be_tracked_leaves_the_buffers_of_one_call(calls_before):
    class Strict(networks.Net):
        strict = False

        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))

        def forward(self, x):
            self.mean = self.mean * 0.9 + x.detach().mean((0, 2, 3)) * 0.1
            if self.strict and type(x) is Tracked:
                raise TypeError("plain tensors only")
            return super().forward(x)

    plain_net, model = Strict(), inject_crop_vote(Strict(), after="site", train_views=1)
    for net in (plain_net, model):
        for i in range(calls_before + 1):
            net.strict = i == calls_before
            net.train()(IMAGES)
    assert type(model.mean) is torch.Tensor
    assert torch.allclose(model.mean, plain_net.mean)
