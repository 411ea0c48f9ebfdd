"""CUDA: the same votes as on the CPU, fast modes, random views, training and costs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import networks
from cropvote import CropVoteLoss, inject_crop_vote, per_view, profile, settings, vote_until_sure
from cropvote.stopping import choose_confidence
from toolchain import table
from toolchain.engines import write_onnx
from toolchain.table import ONE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
PLAN = {"layer1": "hflip", "layer3": "five"}


@pytest.fixture
def voting():
    torch.manual_seed(0)
    return inject_crop_vote(networks.fer(width=16), after="layer1", input_size=48).eval()


@pytest.fixture(autouse=True)
def exact():
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


def images(n: int = 6) -> torch.Tensor:
    return torch.randn(n, 3, 48, 48, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def close(one: torch.Tensor, other: torch.Tensor, rtol: float = 1e-4) -> bool:
    one, other = one.float().cpu(), other.float().cpu()
    return one.shape == other.shape and float((one - other).abs().max()) <= rtol * float(other.abs().max())


@torch.no_grad()
def test_the_votes_of_the_cpu(voting):
    x = images()
    there = copy.deepcopy(voting).cuda()
    assert close(there(x.cuda()), voting(x))
    assert close(per_view(there, x.cuda()), per_view(voting, x))
    sure, asked = vote_until_sure(there, x.cuda(), confidence=0.5)[:2], vote_until_sure(voting, x, confidence=0.5)[:2]
    assert close(sure[0], asked[0])
    assert choose_confidence(per_view(there, x.cuda()), torch.arange(6).cuda() % 7) >= 0


@torch.no_grad()
def test_injected_on_the_device():
    torch.manual_seed(0)
    model = networks.fer(width=16).eval()
    there = inject_crop_vote(copy.deepcopy(model).cuda(), after="layer1", input_size=48)
    assert close(there(images().cuda()), inject_crop_vote(model, after="layer1", input_size=48)(images()))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_autocast(voting, kind, layout):
    there = copy.deepcopy(voting).cuda().to(memory_format=layout)
    with torch.autocast("cuda", kind):
        assert close(there(images().cuda().contiguous(memory_format=layout)), voting(images()), rtol=0.05)


# PyTorch's own warnings while compiling: float32 products, a graph without kernels, gradients read by dynamo
@pytest.mark.filterwarnings("ignore:TensorFloat32", "ignore:The CUDA Graph is empty", "ignore:The .grad attribute")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(voting, mode):
    there = copy.deepcopy(voting).cuda()
    fast = torch.compile(there, mode=mode)
    for seed in range(3):
        x = images() + seed
        with torch.no_grad():
            assert close(fast(x.cuda()), voting(x))
    fast.train()
    loss = CropVoteLoss(nn.CrossEntropyLoss())(fast(images().cuda()), torch.arange(6).cuda())
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in there.parameters())


@pytest.mark.parametrize("train_views", [None, 3])
def test_it_learns(voting, train_views):
    there = copy.deepcopy(voting).cuda().train()
    settings(there).train_views = train_views
    optimizer = torch.optim.SGD(there.parameters(), 0.05)
    losses = []
    for _ in range(15):
        loss = CropVoteLoss(nn.CrossEntropyLoss())(there(images().cuda()), torch.arange(6).cuda())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_measured_costs():
    table = profile(networks.fer(width=16), 48, sites=["layer1"], measure=True, device="cuda")
    assert all(row.milliseconds for row in table)


@torch.no_grad()
def test_tensorrt(tmp_path):
    """An exported network in ONNX Runtime's TensorRT, whose products of matrices may be rounded (TF32)."""
    runtime = pytest.importorskip("onnxruntime")
    if "TensorrtExecutionProvider" not in runtime.get_available_providers():
        pytest.skip("onnxruntime was built without TensorRT")
    file = write_onnx(tmp_path / "model.onnx", ONE)
    session = runtime.InferenceSession(file, providers=["TensorrtExecutionProvider"])
    assert session.get_providers()[0] == "TensorrtExecutionProvider"
    for count in (1, 2, 7):
        votes = torch.from_numpy(session.run(None, {"images": table.images(count).numpy()})[0])
        assert close(votes, table.expected(ONE, count), rtol=0.01)
