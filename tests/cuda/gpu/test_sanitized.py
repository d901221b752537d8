"""Small runs of our convolution kernels alone, for compute-sanitizer: cuDNN is not what is looked at."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gatedconv
from gatedconv import ops
from gatedconv.engine.cuda import resident
from gatedconv.engine.cuda.resident import ResidentLaunch
from gatedconv.ops import _masked_conv2d_cuda
from tests.engine.nets import Residual

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("shape", [(16, 24, 3, 1), (11, 13, 3, 2), (40, 72, 1, 1), (3, 8, 7, 2)])
def test_masked_conv2d(shape, per_sample, dtype, monkeypatch):
    monkeypatch.setenv("GATEDCONV_CUDA_KERNELS", "on")
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("bfloat16 needs compute capability 8.0")
    channels, outputs, kernel, stride = shape
    generator = torch.Generator().manual_seed(0)
    # Made on the host: every kernel that runs before ours is one more for the sanitizer to watch.
    x = torch.randn(2, channels, 9, 9, generator=generator).to(dtype).cuda()
    weight = torch.randn(outputs, channels, kernel, kernel, generator=generator).to(dtype).cuda()
    open_ = (torch.rand((2, outputs) if per_sample else (outputs,), generator=generator) < 0.5).cuda()
    in_open = (torch.rand(channels, generator=generator) < 0.7).cuda()
    with torch.no_grad():
        out = ops.masked_conv2d(x, weight, None, open_, in_open, stride=stride, padding=kernel // 2, relu=True)
    assert bool(out.cpu().isfinite().all())


@pytest.mark.parametrize("tile", _masked_conv2d_cuda.TILES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_tiles(tile, dtype):
    from gatedconv import _native

    assert _native.load("cuda").available
    x = torch.ones(1, 16, 10, 10).to(dtype).cuda().to(memory_format=torch.channels_last)
    packed = _masked_conv2d_cuda.conv_pack(torch.ones(24, 16, 3, 3).to(dtype).cuda(), None, False)
    out = torch.zeros(1, 24, 10, 10).to(dtype).cuda().to(memory_format=torch.channels_last)
    _masked_conv2d_cuda.conv_run(
        x, packed, None, None, None, None, out, [3, 3, 1, 1, 1, 1, 1, 1], 0, False, False, tile
    )
    assert float(out[0, 0, 5, 5].cpu()) == 144


def sanitized_network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        Residual(8, 72, 2),
        gatedconv.nn.PadShortcut(8, 13, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(13, 5, 1),
    ).eval()


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_resident(ranks, dtype, monkeypatch):
    """Every kind of step, several passes, and a cluster where there are any."""
    from tests.cuda.gpu.test_resident import resident_plan

    limits = resident.limits(torch.device("cuda"), dtype)

    if dtype == torch.float32 and torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("tf32 needs compute capability 8.0")
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "tf32" if dtype == torch.float32 else "ieee")
    torch.manual_seed(0)
    x = torch.randn(2, 3, 12, 12).to(dtype).cuda()
    plan = resident_plan(sanitized_network(), x, ranks)
    (run,) = plan._find_runs(x)
    candidate = ResidentLaunch(run, dtype, x.device, ranks, limits.shared_bytes)  # neither a graph nor cuDNN
    assert bool(candidate(plan._enter(x), None).cpu().isfinite().all())
