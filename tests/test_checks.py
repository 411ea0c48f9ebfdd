"""What the check on a fake copy can follow, its errors for the rest, and how to skip it."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import random
import subprocess
import sys
import threading
from types import MethodType

import pytest
import torch
from torch import nn

import networks
from cropvote import five_crop, inject_crop_vote, remove_crop_vote, settings, sites, ten_crop
from cropvote.errors import CheckUnavailableError, InputTypeError, PlainModelError, RowsError, SiteError, SurgeryError
from cropvote.probe import fakes, mode, taint, trace
from cropvote.surgery import inject
from networks import IMAGES

# --- without a check --------------------------------------------------------------------------------------------------


class Asserting(networks.Net):
    """Reads values of its data, which do not exist in a check."""

    def forward(self, x):
        assert not torch.isnan(x).any()
        return super().forward(x)


STATE = torch.get_rng_state()


def test_a_model_that_cannot_be_traced_votes_without_a_check(monkeypatch):
    with pytest.raises(PlainModelError):
        inject_crop_vote(Asserting().eval(), after="site", input_size=48)
    monkeypatch.setattr(inject, "check_sites", None)
    model = inject_crop_vote(Asserting().eval(), after="site", check=False)
    wanted = inject_crop_vote(networks.Net().eval(), after="site")
    model.load_state_dict(wanted.state_dict())
    for images in (IMAGES, IMAGES[:1], IMAGES[:, :, :24]):
        assert torch.allclose(model(images), wanted(images), atol=1e-6)
    assert copy.deepcopy(model)(IMAGES).shape == (3, 7)
    model.site = networks.Net().site
    with pytest.raises(RowsError):  # the splits that ran are still counted
        model(IMAGES)
    with pytest.raises(InputTypeError):
        inject_crop_vote(networks.Net(), after="site", check=None)


class Scaled(networks.Net):
    """Reads its scale, a parameter, as a number."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("limit", torch.ones(1))

    def forward(self, x):
        scale = self.scale.detach().exp().item() if float(self.limit) > 0 else 0.0
        return super().forward(x) * scale


def test_scalar_parameters_may_be_read():
    model = inject_crop_vote(Scaled().eval(), after="site", input_size=48)
    plain = inject_crop_vote(networks.Net().eval(), after="site", input_size=48)
    plain.load_state_dict(model.state_dict(), strict=False)
    assert torch.allclose(model(IMAGES), plain(IMAGES) * torch.tensor(0.5).exp(), atol=1e-6)


# --- what is refused, and what is not ---------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after", "both"])
def test_the_class_forward_bound_to_the_instance_is_allowed(when):
    """Accelerate leaves this behind, and so does ``model.forward = model.forward``."""
    model = networks.Net().eval()
    if when != "after":
        model.forward = model.forward
        model.site.forward = model.site.forward
    names = set(vars(model))
    inject_crop_vote(model, after="site", input_size=48)
    wanted = inject_crop_vote(networks.Net().eval(), after="site", input_size=48)
    wanted.load_state_dict(model.state_dict())
    assert torch.equal(model(IMAGES), wanted(IMAGES))
    assert torch.equal(copy.deepcopy(model)(IMAGES), wanted(IMAGES))
    if when != "before":
        model.forward = model.forward
        assert torch.equal(model(IMAGES), wanted(IMAGES))
    remove_crop_vote(model)
    assert type(model) is networks.Net
    assert set(vars(model)) == names | ({"forward"} if when == "after" else set())
    if when != "after":
        assert isinstance(model.site.forward, MethodType)
        assert model.forward.__func__ is networks.Net.forward
    assert torch.equal(model(IMAGES), remove_crop_vote(wanted)(IMAGES))


def test_tensors_outside_the_model_that_share_memory_are_put_back():
    counts = torch.zeros(4)
    first = counts[:1]

    class Counting(nn.Sequential):
        def forward(self, x):
            counts.add_(1)
            first.mul_(3)
            return super().forward(x)

    inject_crop_vote(Counting(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), after="0", input_size=16)
    assert counts.tolist() == [0, 0, 0, 0]


def test_a_class_whose_forward_is_compiled_is_refused_at_once():
    class Decorated(networks.Net):
        @torch.compile(backend="eager")
        def forward(self, x):
            return super().forward(x)

    with pytest.raises(SurgeryError):
        inject_crop_vote(Decorated().eval(), after="site", input_size=48)


def test_a_batch_size_read_from_the_images_is_named_as_the_reason():
    class Viewing(networks.Net):
        def forward(self, x):
            b = x.size(0)
            return self.fc(nn.functional.adaptive_avg_pool2d(self.site(self.front(x)), 1).view(b, -1))

    with pytest.raises(SiteError, match="CV120"):
        inject_crop_vote(Viewing().eval(), after="site", input_size=48)


def test_a_model_with_every_attribute_is_not_taken_for_compiled():
    class Answering(networks.Net):
        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return None

    assert inject_crop_vote(Answering().eval(), after="site", input_size=48)(IMAGES).shape == (3, 7)


def test_lazy_modules_must_be_called_first():
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 7)).eval()
    with pytest.raises(SurgeryError, match="CV406"):
        inject_crop_vote(model, after="0", input_size=48)
    model(IMAGES)
    assert inject_crop_vote(model, after="0", input_size=48)(IMAGES).shape == (3, 7)


def test_views_that_would_be_valid_are_named():
    with pytest.raises(SiteError, match="CV121"):
        inject_crop_vote(Fixed().eval(), after="site", input_size=48)


class Fixed(networks.Net):
    """Its linear layer takes a single map size."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8 * 48 * 48, 7)

    def forward(self, x):
        return self.fc(self.site(self.front(x)).flatten(1))


def test_a_module_whose_output_is_changed_later_is_not_a_site():
    class Aliased(networks.Net):
        def __init__(self):
            super().__init__()
            self.point = nn.Identity()

        def forward(self, x):
            y = self.front(x)
            z = self.point(y)
            y.mul_(0.5).add_(1)
            return self.head(self.site(z))

    with pytest.raises(SiteError, match="CV109"):
        inject_crop_vote(Aliased().eval(), after="point", input_size=48)
    inject_crop_vote(Aliased().eval(), after="front", input_size=48)

    class InPlace(networks.Net):
        def __init__(self):
            super().__init__()
            self.point, self.relu = nn.Identity(), nn.ReLU(inplace=True)

        def forward(self, x):
            return self.head(self.site(self.relu(self.point(self.front(x)))))

    inject_crop_vote(InPlace().eval(), after="point", input_size=48)


# --- another PyTorch --------------------------------------------------------------------------------------------------


@pytest.fixture
def canary():
    taint.check_taint_is_followed.cache_clear()
    yield
    taint.check_taint_is_followed.cache_clear()


@pytest.mark.parametrize(
    "broken",
    [
        lambda patch: patch.setattr(mode, "written_arguments", lambda *_: []),
        lambda patch: patch.setattr(taint, "_NO_DATA", set()),
        lambda patch: patch.setattr(taint, "storage_key", lambda x: (x, id(x))),
        lambda patch: patch.setattr(taint, "name_of", lambda operation: operation.no_such_name),
        lambda patch: patch.setattr(taint.Taint, "of", lambda *_: 0),
    ],
)
def test_the_canary_says_that_checks_are_unavailable(canary, broken, monkeypatch):
    """Everything else still works."""
    broken(monkeypatch)
    with pytest.raises(CheckUnavailableError, match="CV490"):
        inject_crop_vote(networks.Net().eval(), after="site", input_size=48)
    with pytest.raises(CheckUnavailableError):
        sites(networks.Net().eval(), 48)
    assert inject_crop_vote(networks.Net().eval(), after="site", check=False)(IMAGES).shape == (3, 7)


def test_an_error_of_the_library_is_not_blamed_on_the_model(monkeypatch):
    monkeypatch.setattr(trace, "_MOVING", None)  # an error in the middle of the model's forward
    with pytest.raises(CheckUnavailableError):
        inject_crop_vote(networks.Net().eval(), after="site", input_size=48)


@pytest.mark.parametrize(
    ("gone", "missing"),
    [
        ("torch._subclasses.fake_tensor", "FakeTensorMode"),
        ("torch.utils._python_dispatch", "_disable_current_modes"),
        ("torch.utils._pytree", "tree_leaves"),
    ],
)
def test_the_rest_works_without_a_private_name(gone, missing):
    """``from cropvote import split_views`` still works; a check says what is missing."""
    code = f"""
import torch
import {gone} as module
del module.{missing}
from cropvote import CropVoteError, inject_crop_vote, profile, sites, split_views, ten_crop
print(split_views(torch.zeros(2, 3, 12, 12), ten_crop()).shape[0])
net = torch.nn.Sequential(
    torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 7)
).eval()
for check in (lambda: sites(net, 12), lambda: inject_crop_vote(net, after="0", input_size=12)):
    try:
        check()
    except CropVoteError as error:
        print(type(error).__name__)
print(len(inject_crop_vote(net, after="0", check=False)(torch.zeros(3, 3, 12, 12))))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["20", *["CheckUnavailableError"] * 2, "3"], done.stderr


# --- processes and versions -------------------------------------------------------------------------------------------


def _inject_in_a_child(queue) -> None:
    inject_crop_vote(networks.Net().eval(), after="site", input_size=48)
    queue.put("done")


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
@pytest.mark.filterwarnings("ignore:This process")
def test_a_process_forked_during_a_check_can_check():
    held, go = threading.Event(), threading.Event()

    def check() -> None:
        with fakes._LOCK:
            held.set()
            go.wait(30)

    thread = threading.Thread(target=check)
    thread.start()
    held.wait(30)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_inject_in_a_child, args=(queue,))
    child.start()
    try:
        assert queue.get(timeout=60) == "done"
    finally:
        go.set()
        thread.join()
        child.terminate()
        child.join()


def test_a_pickle_of_another_version_says_so():
    model = inject_crop_vote(networks.fer(), after="layer2", input_size=48)
    for part in (settings(model), model._cropvote):
        name = next(name for name in vars(part) if not name.startswith("_"))
        value = vars(part).pop(name)
        data = pickle.dumps(part)
        vars(part)[name] = value
        with pytest.raises(SurgeryError, match="CV411"):
            pickle.loads(data)
    assert settings(pickle.loads(pickle.dumps(model))).views == ten_crop() != five_crop()


@pytest.mark.parametrize("change", [lambda: torch.manual_seed(42), lambda: torch.set_rng_state(STATE)])
def test_a_model_that_sets_the_same_seed_leaves_no_trace(change, monkeypatch):
    monkeypatch.setattr(threading, "active_count", lambda: 1)

    class Seeding(networks.Net):
        def forward(self, x):
            change()
            return super().forward(x)

    model = Seeding().eval()
    torch.manual_seed(42)
    torch.randn(10)
    before = torch.get_rng_state()
    inject_crop_vote(model, after="site", input_size=12)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_interrupted_check_leaves_no_tensor():
    kept = {}

    class Interrupted(networks.Net):
        def forward(self, x):
            kept[1, 2] = self.front(x)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sites(Interrupted().eval(), 12)
    assert not kept


def test_a_global_tensor_that_a_forward_writes_keeps_its_values():
    calls = torch.zeros(3)

    class Counting(networks.Net):
        def forward(self, x):
            calls.add_(1)
            return super().forward(x)

    inject_crop_vote(Counting().eval(), after="site", input_size=48)
    assert calls.tolist() == [0, 0, 0]


def test_a_model_that_never_runs_twice_alike_is_not_blamed_for_its_class():
    drawn = random.Random(0)  # not the generator that a check puts back

    class Skipping(networks.Net):
        def forward(self, x):
            x = self.act(self.site(self.front(x)))
            for _ in range(drawn.randrange(6)):
                x = torch.relu(x)
            return self.head(x)

    for _ in range(3):
        assert "site" in {site.name for site in sites(Skipping().eval(), 48)}


def test_the_switch_for_fast_attention_is_left_alone():
    seen = []

    class Attending(networks.Net):
        def __init__(self):
            super().__init__()
            self.attend = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

        def forward(self, x):
            seen.append(torch.backends.mha.get_fastpath_enabled())
            return self.fc(self.attend(self.site(self.front(x)).flatten(2).transpose(1, 2)).mean(1))

    assert "site" in {site.name for site in sites(Attending().eval(), 8)}
    assert set(seen) == {True}
