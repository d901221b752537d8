"""The body of the GPU convolution, run on the CPU, also under sanitizers, against PyTorch in float64.

The program runs the very code that the kernel is made of, lane by lane (tests/native/host_cta.h); only
`mma.sync`, `ldmatrix` and `cp.async` are emulated, from NVIDIA's description of them.
"""

from __future__ import annotations

import shlex
import struct
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gatedconv import _build
from tests.native.test_sanitizers import CSRC, HERE, SANITIZE
from tests.tolerances import assert_close, tolerance

# math: (number, storage, relative error of one product sum)
MATHS = {
    "float16": (0, torch.float16, tolerance(torch.float16)),
    "bfloat16": (1, torch.bfloat16, tolerance(torch.bfloat16)),
    "tf32": (2, torch.float32, tolerance("tf32")),
    "float32": (3, torch.float32, tolerance(algorithm="magnitudes", terms=1)),
}
TILES = [(0, 0), *((mt, nt) for mt in (1, 2) for nt in (1, 2, 4, 8))]


@pytest.fixture(scope="module", params=["plain", pytest.param("sanitized", marks=pytest.mark.slow)])
def twin(tmp_path_factory, request):
    """Compile the program and keep it running."""
    program = build(tmp_path_factory.mktemp("twin"), SANITIZE if request.param == "sanitized" else ["-O1"])
    with subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield process
        process.stdin.close()
        assert process.wait(60) == 0


def build(folder: Path, options: list[str]) -> str:
    compiler = shlex.split(_build.find_compiler())
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    if subprocess.run([*compiler, *options, str(probe), "-o", str(folder / "probe")], capture_output=True).returncode:
        pytest.skip(f"{compiler[0]} cannot link {options[0]}")
    program = str(folder / "conv_twin")
    flags = ["-std=c++20", "-O0", "-Wall", "-Wextra", "-Wno-unknown-pragmas", *options, f"-I{CSRC}"]
    built = subprocess.run(
        [*compiler, *flags, str(HERE / "conv_twin.cpp"), "-o", program], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return program


def call(
    twin,
    math,
    x,
    weight,
    bias,
    out_open,
    in_open=None,
    residual=None,
    *,
    stride,
    padding,
    dilation,
    act=0,
    in_place=False,
    last=(True, True),
    tile=(0, 0),
    budget=48 * 1024,
):
    """Run a case; returns the output as float64, or None where no tile fits, and the tile."""
    number, dtype, _ = MATHS[math]
    size = [
        (x.shape[i + 2] + 2 * padding[i] - dilation[i] * (weight.shape[i + 2] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]
    masks = 1 if out_open.dim() == 1 else x.shape[0]
    in_masks = 0 if in_open is None else in_open.numel() // x.shape[1]
    header = [
        number,
        *tile,
        *x.shape,
        weight.shape[0],
        *size,
        *weight.shape[2:],
        *stride,
        *padding,
        *dilation,
        masks,
        act,
        bias is not None,
        residual is not None,
        in_masks,
        in_place,
        *last,
        budget if tile[0] else 4,
    ]
    twin.stdin.write(struct.pack(f"{len(header)}i", *map(int, header)))
    for tensor, order, kind in (
        (x, last[0], dtype),
        (weight, False, dtype),
        (bias, False, torch.float32),
        (residual, last[1], dtype),
        (out_open, False, torch.bool),
        (in_open, False, torch.bool),
    ):
        if tensor is not None:
            tensor = tensor.permute(0, 2, 3, 1) if order else tensor
            twin.stdin.write(tensor.to(kind).contiguous().flatten().view(torch.uint8).numpy().tobytes())
    twin.stdin.flush()
    fits, *used = struct.unpack("3i", read(twin, 12))
    if not fits:
        return None, used
    shape = (x.shape[0], weight.shape[0], *size)
    stored = (shape[0], *size, shape[1]) if last[1] else shape
    data = read(twin, torch.Size(shape).numel() * dtype.itemsize)
    out = torch.frombuffer(bytearray(data), dtype=dtype).view(stored)
    return (out.permute(0, 3, 1, 2) if last[1] else out).double(), used


def read(twin, count: int) -> bytes:
    data = twin.stdout.read(count)
    assert len(data) == count, f"the program ended: {twin.poll()}"
    return data


def expected(x, weight, bias, out_open, in_open, residual, stride, padding, dilation, act):
    """The definition, with PyTorch's own convolution of what is open, sample by sample."""
    out = []
    for n in range(x.shape[0]):
        of_sample = in_open if in_open is None or in_open.dim() == 1 else in_open[n]
        inputs = torch.arange(x.shape[1]) if of_sample is None else of_sample.nonzero().flatten()
        rows = (out_open if out_open.dim() == 1 else out_open[n]).nonzero().flatten()
        size = F.conv2d(x[:1, :1], weight[:1, :1], None, stride, padding, dilation).shape[2:]
        plane = torch.zeros(weight.shape[0], *size, dtype=torch.float64)
        if len(rows) and len(inputs):
            kept = weight[rows][:, inputs]
            plane[rows] = F.conv2d(x[n : n + 1, inputs], kept, None, stride, padding, dilation)[0]
        if bias is not None:
            plane[rows] += bias[rows, None, None]
        out.append(plane if residual is None else plane + residual[n])
    out = torch.stack(out)
    return out.relu() if act == 1 else out.clamp(0, 6) if act == 2 else out


def compare(twin, math, x, weight, bias, out_open, in_open=None, residual=None, *, act=0, **options):
    """Round what is given to the format, run both, compare; closed outputs must be exact."""
    _, dtype, limit = MATHS[math]
    x, weight, residual = (None if t is None else t.to(dtype).double() for t in (x, weight, residual))
    out, used = call(twin, math, x, weight, bias, out_open, in_open, residual, act=act, **options)
    if out is None:
        return None
    geometry = [options[name] for name in ("stride", "padding", "dilation")]
    bias = None if bias is None else bias.float().double()
    exact = expected(x, weight, bias, out_open, in_open, residual, *geometry, act)
    scale = expected(
        x.abs(),
        weight.abs(),
        None if bias is None else bias.abs(),
        out_open,
        in_open,
        None if residual is None else residual.abs(),
        *geometry,
        0,
    )
    closed = ~out_open.expand(x.shape[0], -1) if out_open.dim() == 1 else ~out_open
    assert torch.equal(out[closed], exact.to(dtype).double()[closed])
    assert bool(((out - exact).abs() <= limit * scale + 1e-7).all()), float((out - exact).abs().max())
    return used


@st.composite
def cases(draw):
    math = draw(st.sampled_from(sorted(MATHS)))
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (5, 5), (7, 7), (1, 3), (2, 1)]))
    stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 3)]))
    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, padding, strict=True)]
    height, width = (low + draw(st.sampled_from([0, 1, 2, 5, 11, 17])) for low in least)
    channels = draw(st.sampled_from([1, 3, 4, 7, 8, 11, 16, 24, 33]))
    outputs = draw(st.sampled_from([1, 5, 8, 13, 16, 24, 40, 72]))
    batch = draw(st.sampled_from([1, 2, 5]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))
    rate = draw(st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]))
    out_open = torch.rand((batch, outputs) if draw(st.booleans()) else (outputs,), generator=generator) < rate
    in_rate = draw(st.sampled_from([None, None, 0.0, 0.5, 1.0]))
    normal = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)  # noqa: E731
    in_shape = (batch, channels) if draw(st.booleans()) else (channels,)
    in_open = None if in_rate is None else torch.rand(in_shape, generator=generator) < in_rate
    x = normal(batch, channels, height, width)
    if in_open is not None:
        x[(~in_open).expand(batch, -1)] = float("nan")  # nobody may read it
    weight = normal(outputs, channels, *kernel)
    weight[~(out_open if out_open.dim() == 1 else out_open.any(0))] = float("nan")
    size = F.conv2d(x[:1, :1], weight[:1, :1], None, stride, padding, dilation).shape[2:]
    return dict(
        math=math,
        x=x,
        weight=weight,
        bias=normal(outputs) if draw(st.booleans()) else None,
        out_open=out_open,
        in_open=in_open,
        residual=normal(batch, outputs, *size) if draw(st.booleans()) else None,
        act=draw(st.sampled_from([0, 1, 2])),
        stride=stride,
        padding=padding,
        dilation=dilation,
        last=draw(st.tuples(st.booleans(), st.booleans())),
        tile=draw(st.sampled_from(TILES)),
    )


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_any_convolution(twin, case):
    compare(twin, **case)


@pytest.mark.slow
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_any_of_more_convolutions(twin, case):
    compare(twin, **case)


@pytest.mark.parametrize("math", MATHS)
@pytest.mark.parametrize("kernel,dilation", [((7, 7), (3, 3)), ((5, 5), (4, 4)), ((3, 3), (9, 9)), ((1, 7), (1, 60))])
def test_a_tile_is_found_while_taps_reach_over_400_pixels(twin, math, kernel, dilation):
    """What `gatedconv.ops._masked_conv2d_cuda.supports` promises, of every tile."""
    x, weight = torch.randn(1, 5, 40, 380).double(), torch.randn(9, 5, *kernel).double()
    for tile in TILES:
        out_open = torch.rand(9) < 0.5
        used = compare(
            twin,
            math,
            x[:, :, :, : 370 if kernel[0] == 1 else 40],
            weight,
            None,
            out_open,
            stride=(3, 7),
            padding=(1, 2),
            dilation=dilation,
            tile=tile,
        )
        assert used is not None, tile


def test_closed_outputs_stay_in_memory_where_the_plan_skips_them(twin):
    x, weight, stream = torch.randn(2, 8, 9, 7), torch.randn(16, 8, 3, 3), torch.randn(2, 16, 9, 7)
    out_open = torch.rand(16) < 0.5
    options = dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1))
    out, _ = call(twin, "float32", x, weight, None, out_open, None, stream, act=1, in_place=True, **options)
    assert torch.equal(out[:, ~out_open], stream[:, ~out_open].double())  # not even a ReLU
    exact = expected(*(t.double() for t in (x, weight)), None, out_open, None, stream.double(), *options.values(), 1)
    assert_close(out[:, out_open], exact[:, out_open], dtype=torch.float32)


@pytest.mark.parametrize("math", MATHS)
def test_layers_of_a_resnet(twin, math):
    """Whole vectors, many chunks of channels, several slots of outputs and samples in a tile."""
    for channels, outputs, size, stride, kernel in (
        (16, 16, 32, 1, 3),
        (64, 64, 8, 1, 3),
        (32, 64, 16, 2, 3),
        (256, 64, 7, 1, 1),
        (64, 128, 8, 2, 1),
        (8, 64, 24, 2, 7),
    ):
        x = torch.randn(3, channels, size, size).double()
        weight = torch.randn(outputs, channels, kernel, kernel).double()
        options = dict(stride=(stride, stride), padding=(kernel // 2, kernel // 2), dilation=(1, 1))
        for out_open in (torch.ones(outputs, dtype=torch.bool), torch.rand(outputs) < 0.5):
            assert compare(twin, math, x, weight, torch.randn(outputs), out_open, act=1, **options)
