"""The CUDA engine on a GPU: parity over a grid, no host sync, gradients, graphs, streams, networks."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
import torch.nn.functional as F

import gatedconv
from gatedconv import _native, ops
from gatedconv.ops import _masked_conv2d_cuda
from tests.cuda import plans
from tests.engine.nets import settle
from tests.tolerances import assert_close, floor

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

FORMATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "tf32": torch.float32, "float32": torch.float32}
# channels, outputs, size, kernel, stride, padding, dilation
SHAPES = [
    (16, 16, 32, 3, 1, 1, 1),
    (16, 32, 32, 3, 2, 1, 1),
    (64, 64, 8, 3, 1, 1, 1),
    (3, 64, 40, 7, 2, 3, 1),
    (64, 256, 14, 1, 1, 0, 1),
    (256, 64, 7, 1, 2, 0, 1),
    (11, 13, 9, 3, 1, 1, 1),
    (33, 70, 17, 5, 1, 2, 1),
    (8, 8, 20, 3, 1, 4, 4),
    (1, 1, 1, 1, 1, 0, 1),
]
MASKS = {"open": 1.0, "half": 0.5, "one": 0.0, "closed": -1.0}


@pytest.fixture(autouse=True)
def ours(monkeypatch):
    assert _native.load("cuda").available
    monkeypatch.setenv("GATEDCONV_CUDA_KERNELS", "on")


@pytest.fixture(params=FORMATS)
def dtype(request, monkeypatch):
    if request.param == "bfloat16" and torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("bfloat16 needs compute capability 8.0")
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "tf32" if request.param == "tf32" else "ieee"
    yield FORMATS[request.param]
    torch.backends.cudnn.conv.fp32_precision = before


def kind_of(dtype: torch.dtype) -> torch.dtype | str:
    """The type that convolutions compute in: "tf32" where it is allowed."""
    return "tf32" if dtype == torch.float32 and _masked_conv2d_cuda.allows_tf32() else dtype


def mask_of(kind: str, *shape: int) -> torch.Tensor:
    mask = torch.rand(shape, device="cuda") < MASKS[kind]
    if kind == "one":
        mask[..., shape[-1] // 3] = True
    return mask


def case(shape, kind, dtype, batch=3, last=True, per_sample=False):
    channels, outputs, size, kernel, stride, padding, dilation = shape
    layout = torch.channels_last if last else torch.contiguous_format
    draw = lambda *s: torch.randn(*s, device="cuda").to(dtype)  # noqa: E731
    x, weight = draw(batch, channels, size, size), draw(outputs, channels, kernel, kernel) / (channels**0.5 * kernel)
    geometry = {"stride": stride, "padding": padding, "dilation": dilation}
    like = F.conv2d(x, weight, None, **geometry)
    open_ = mask_of(kind, *((batch, outputs) if per_sample else (outputs,)))
    return (
        x.to(memory_format=layout),
        weight,
        draw(outputs),
        open_,
        torch.randn_like(like).to(memory_format=layout),
        geometry,
    )


def errors(dtype, x, weight, bias, out_open, residual, geometry, in_open=None):
    """(ours, PyTorch's): the largest difference from float64."""
    exact = ops.masked_conv2d_reference(
        x.double(), weight.double(), bias.double(), out_open, in_open, residual=residual.double(), relu=True, **geometry
    )
    result = ops.masked_conv2d(x, weight, bias, out_open, in_open, residual=residual, relu=True, **geometry)
    theirs = ops.masked_conv2d_reference(x, weight, bias, out_open, in_open, residual=residual, relu=True, **geometry)
    assert result.dtype == dtype and result.shape == exact.shape
    assert result.is_contiguous(memory_format=torch.channels_last) == theirs.is_contiguous(
        memory_format=torch.channels_last
    )
    return *(float((t.double() - exact).abs().max()) for t in (result, theirs)), float(exact.abs().max())


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape, kind, dtype):
    for last, per_sample in itertools.product((True, False), repeat=2):
        torch.manual_seed(0)
        mine, theirs, scale = errors(dtype, *case(shape, kind, dtype, last=last, per_sample=per_sample))
        assert mine <= max(2 * theirs, floor(kind_of(dtype)) * scale), (last, per_sample)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_closed_inputs_are_not_read(share, dtype):
    torch.manual_seed(0)
    x, weight, bias, out_open, residual, geometry = case(SHAPES[7], "half", dtype)
    in_open = torch.rand(x.shape[1], device="cuda") < share
    x[:, ~in_open] = float("nan")
    mine, theirs, scale = errors(dtype, x, weight, bias, out_open, residual, geometry, in_open)
    assert mine <= max(2 * theirs, floor(kind_of(dtype)) * scale)


@pytest.mark.parametrize("per_sample", [False, True])
def test_the_host_waits_for_nothing(per_sample):
    x, weight, bias, out_open, residual, geometry = case(SHAPES[0], "half", torch.float16, per_sample=per_sample)
    in_open = mask_of("half", x.shape[1])

    def run():
        with torch.no_grad():
            return ops.masked_conv2d(x, weight, bias, out_open, in_open, residual=residual, relu=True, **geometry)

    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    out_open.copy_(~out_open)  # the graph reads the mask anew at every replay
    graph.replay()
    assert torch.equal(result, run())


def test_gradients_are_those_of_the_cpu():
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    x, weight, bias, out_open, residual, geometry = case(SHAPES[6], "half", torch.float32)
    results = []
    for device in ("cuda", "cpu"):
        leaves = [t.detach().to(device).requires_grad_() for t in (x, weight, bias, residual)]
        out = ops.masked_conv2d(*leaves[:3], out_open.to(device), residual=leaves[3], relu=True, **geometry)
        torch.manual_seed(1)
        results.append([g.cpu() for g in torch.autograd.grad(out, leaves, torch.randn(out.shape).to(device))])
    for mine, theirs in zip(*results, strict=True):
        assert_close(mine, theirs, algorithm="gradient")


def test_compiled_and_exported():
    x, weight, bias, out_open, residual, geometry = case(SHAPES[0], "half", torch.float16)

    def run(x, mask):
        return ops.masked_conv2d(x, weight, bias, mask, residual=residual, relu=True, **geometry) + 1

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(run, fullgraph=True)(x, out_open), run(x, out_open))


def gated(name="resnet20", position="after"):
    torch.manual_seed(0)
    model = settle(getattr(gatedconv.models, name)(gate="channel", position=position))
    masks = {name: torch.rand(gate.num_gates) < 0.5 for name, gate in gatedconv.gates(model).items()}
    return gatedconv.compact(gatedconv.freeze(model, masks=masks), torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("mode", ["off", "auto", "on"])
@pytest.mark.parametrize("position", ["after", "middle", "before"])
def test_engine(position, mode, dtype, monkeypatch, tmp_path):
    monkeypatch.setenv("GATEDCONV_CUDA_KERNELS", mode)
    monkeypatch.setenv("GATEDCONV_CACHE", str(tmp_path))
    model = gated(position=position).cuda().to(dtype)
    x = torch.randn(65, 3, 32, 32, device="cuda").to(dtype)
    engine = gatedconv.Engine(model, x[:5])
    assert engine.reason is None and "Nothing is left to PyTorch" in engine.describe()
    with torch.no_grad():
        exact = model.double()(x.double())
        theirs = model.to(dtype)(x)
    allowed = max(2 * plans.rms(theirs, exact), floor(kind_of(dtype), "network") * float(exact.square().mean().sqrt()))
    for batch in (5, 1, 65):
        mine = torch.cat([engine(part) for part in x.split(batch)])
        assert plans.rms(mine, exact) <= allowed
    assert ("[gatedconv" in engine.describe()) >= (mode == "on")


def test_two_streams_replay_one_graph():
    model = gated().cuda().half()
    engine = gatedconv.Engine(model, torch.zeros(4, 3, 32, 32, device="cuda", dtype=torch.float16))
    inputs = [torch.randn(4, 3, 32, 32, device="cuda").half() for _ in range(2)]
    expected = [engine(x) for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    for _ in range(100):
        results = []
        for x, stream in zip(inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(engine(x))
        torch.cuda.synchronize()
        assert all(torch.equal(got, want) for got, want in zip(results, expected, strict=True))


def test_threads_share_an_engine():
    engine = gatedconv.Engine(gated().cuda().half(), torch.zeros(2, 3, 32, 32, device="cuda", dtype=torch.float16))
    inputs = [torch.randn(n, 3, 32, 32, device="cuda").half() for n in (1, 2, 3, 4)]
    expected = [engine(x) for x in inputs]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                result = engine(inputs[i])
                torch.cuda.current_stream().synchronize()
                if not torch.equal(result, expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_users_own_graph_may_hold_an_engine():
    engine = gatedconv.Engine(gated().cuda().half(), torch.zeros(4, 3, 32, 32, device="cuda", dtype=torch.float16))
    x = torch.randn(4, 3, 32, 32, device="cuda").half()
    expected = engine(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = engine(x)
    x.mul_(1)
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    "options",
    [{"gate": "layer"}, {"gate": "channel", "position": "before"}, {"gate": "channel", "position": "middle"}],
    ids=lambda options: " ".join(options.values()),
)
def test_gates_decide_without_the_host(options, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")
    torch.manual_seed(0)
    model = settle(gatedconv.models.resnet20(**options)).cuda()
    with torch.no_grad():
        for gate in gatedconv.gates(model).values():
            torch.nn.init.normal_(gate.fc2.weight, std=3.0)
    x = plans.clear_images(model, torch.randn(64, 3, 32, 32, device="cuda"), 8)
    expected = model(x).detach()
    with torch.no_grad():
        model(x)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            result = model(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert_close(result, expected, dtype="tf32", algorithm="network")


@pytest.mark.parametrize("tile", _masked_conv2d_cuda.TILES, ids=str)
def test_every_tile(tile, dtype):
    """The operator of plans against what it promises, for each kernel of the library."""
    torch.manual_seed(0)
    outputs = 72
    x = torch.randn(2, 16, 11, 9, device="cuda").to(dtype).to(memory_format=torch.channels_last)
    weight = (torch.randn(outputs, 16, 3, 3, device="cuda") / 12).to(dtype)
    bias = torch.randn(outputs, device="cuda")
    stream = torch.randn(2, outputs, 11, 9, device="cuda").relu().to(dtype).to(memory_format=torch.channels_last)
    order = torch.cat([torch.randperm(outputs), torch.tensor([29])]).int().cuda()
    for out_index in (None, order):
        result, expected = stream.clone(), stream.cpu()
        tf32 = kind_of(dtype) == "tf32"
        arguments = [[3, 3, 1, 1, 1, 1, 1, 1], 1, out_index is not None, tf32, tile]
        packed = _masked_conv2d_cuda.conv_pack(weight, None, tf32)
        _masked_conv2d_cuda.conv_run(x, packed, bias, None, out_index, result, result, *arguments)
        plain = plans.conv_pack(weight.cpu(), None, False)
        host_index = None if out_index is None else out_index.cpu()
        plans.conv_run(
            x.cpu(),
            plain,
            bias.cpu(),
            None,
            host_index,
            expected.clone(memory_format=torch.preserve_format),
            expected,
            *arguments,
        )
        assert_close(result.cpu(), expected, dtype=kind_of(dtype))


def test_operators_refuse_tensors_that_their_kernels_cannot_read():
    x, weight, bias, out_open, residual, _ = case(SHAPES[0], "half", torch.float32)
    numbers = ([1, 1], [0, 0, 0, 0], [1, 1], 1, False)
    tensors = [x, weight, bias, out_open, mask_of("half", x.shape[1]), residual]
    for i in range(1, len(tensors)):
        mixed = [tensor.cpu() if k == i else tensor for k, tensor in enumerate(tensors)]
        with pytest.raises(RuntimeError, match="masked_conv2d: expected all tensors on one device"):
            torch.ops.gatedconv.masked_conv2d.default(*mixed, *numbers)
    packed = _masked_conv2d_cuda.conv_pack(weight, None, True)
    geometry = [weight.shape[2], weight.shape[3], 1, 1, 0, 0, 1, 1]
    index = torch.arange(x.shape[1], device="cuda")
    for bad, words in ((index, "contiguous int32"), (index.int().cpu(), "one device")):
        with pytest.raises(RuntimeError, match=words):
            _masked_conv2d_cuda.conv_run(x, packed, bias, bad, None, None, residual, geometry, 0, False, True, (0, 0))
