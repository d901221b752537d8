import math
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gatedconv.bench.conv_case import ConvCase
from gatedconv.ops import _masked_conv2d_native, masked_conv2d, masked_conv2d_reference
from gatedconv.ops._masked_conv2d_args import check_arguments
from tests.ops.conv_oracle import masked_conv2d_oracle
from tests.tolerances import assert_close, relative_error, tolerance

SCALE = 1e-3  # of the terms, where a result may be empty or cancel


def mask_of(bits: list[int]) -> torch.Tensor:
    return torch.tensor(bits, dtype=torch.bool)


@pytest.fixture(params=["native", "compact"])
def backend(request, monkeypatch):
    """Run with the native library, and as if there were none."""
    if request.param == "compact":
        monkeypatch.setattr(_masked_conv2d_native, "ready", lambda: False)
    else:
        assert _masked_conv2d_native.ready(), "no native library: the tests of it would test nothing"
    return request.param


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda x: torch.stack([x, x + 1], -1)[..., 0],
    "batch_innermost": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


@st.composite
def cases(draw):
    """Draw a convolution whose kernel fits, with masks, in any layout."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    per_group, rows = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    kernel = [draw(st.integers(1, 3)) for _ in range(2)]
    dilation = [draw(st.integers(1, 2)) for _ in range(2)]
    stride = [draw(st.integers(1, 3)) for _ in range(2)]
    padding = draw(st.sampled_from(["valid", "same", 0, (1, 2), (2, 0)]))
    if padding == "same":
        stride = [1, 1]
    size = [dilation[i] * (kernel[i] - 1) + 1 + draw(st.integers(0, 6)) for i in range(2)]
    batch = draw(st.integers(0, 3))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def normal(*shape):
        layout = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))] if len(shape) == 4 else LAYOUTS["contiguous"]
        return layout(torch.randn(shape, generator=generator, dtype=dtype))

    def mask(*shape):
        share = draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
        return torch.rand(shape, generator=generator) < share

    input, weight = normal(batch, groups * per_group, *size), normal(groups * rows, per_group, *kernel)
    numbers = {"stride": tuple(stride), "padding": padding, "dilation": tuple(dilation), "groups": groups}
    bias = normal(groups * rows) if draw(st.booleans()) else None
    shape = F.conv2d(input, weight, None, **numbers).shape
    residual = normal(*shape) if draw(st.booleans()) else None
    out_open = mask(batch, groups * rows) if draw(st.booleans()) else mask(groups * rows)
    in_open = mask(groups * per_group) if draw(st.booleans()) else None
    numbers |= {"residual": residual, "relu": draw(st.booleans())}
    return (input, weight, bias, out_open, in_open), numbers


def check_case(case) -> None:
    tensors, numbers = case
    if tensors[0].shape[0] == 0:
        expected = F.conv2d(*tensors[:2], None, *(numbers[k] for k in ("stride", "padding", "dilation", "groups")))
    else:
        expected = masked_conv2d_oracle(*tensors, **numbers)
    for function in (masked_conv2d, masked_conv2d_reference):
        out = function(*tensors, **numbers)
        assert out.dtype == tensors[0].dtype and out.shape == expected.shape
        assert relative_error(out, expected) <= tolerance(out.dtype)


@pytest.fixture(scope="module", params=["avx512", "avx2", "portable"])
def instruction_set(request):
    with pytest.MonkeyPatch.context() as patch:
        assert _masked_conv2d_native.ready()
        patch.setenv("GATEDCONV_ISA", request.param)
        try:
            masked_conv2d(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), None, mask_of([1]))
        except RuntimeError as error:
            assert "GATEDCONV_ISA" in str(error)
            pytest.skip(f"this processor has no {request.param}")
        yield request.param


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_native_equals_the_definition(instruction_set, case):
    check_case(case)


@settings(max_examples=25, deadline=None)
@given(cases())
def test_the_native_fp64_body_equals_the_definition(case):
    tensors, numbers = case
    if tensors[0].shape[0] == 0:
        return
    *tensors, out_open, in_open = tensors
    tensors = [None if t is None else t.double() for t in tensors]
    residual = None if numbers["residual"] is None else numbers["residual"].double()
    numbers |= {"residual": residual}
    out = _masked_conv2d_native.call(check_arguments(*tensors, out_open, in_open, **numbers))
    expected = masked_conv2d_oracle(*tensors, out_open, in_open, **numbers)
    assert relative_error(out, expected, SCALE) <= tolerance(torch.float64)


# Shapes of real layers, odd counts among them, so that bands, tiles and register tails are all met.
REAL_LAYERS = [
    f"n3 {channels} {size} {kernel} open50"
    for channels in ("i16 o16", "i11 o13", "i33 o7")
    for size in ("h32", "h15 w17", "h8")
    for kernel in ("k3", "k3 s2", "k1", "k1 s2", "k7 s2")
]


@pytest.mark.parametrize("text", REAL_LAYERS)
def test_real_layers(instruction_set, text):
    case = ConvCase.parse(text)
    (x, w, b), out_open, in_open = case.tensors(), case.mask(), torch.rand(case.in_channels) < 0.7
    remaining = (x * in_open[:, None, None]).double(), w.double(), b.double()
    expected = F.conv2d(*remaining, case.stride, case.pad) * out_open[:, None, None]
    for memory_format in (torch.contiguous_format, torch.channels_last):
        out = masked_conv2d(
            x.contiguous(memory_format=memory_format), w, b, out_open, in_open, stride=case.stride, padding=case.pad
        )
        assert relative_error(out, expected, SCALE) <= tolerance()
        assert not out[:, ~out_open].any()


@settings(max_examples=50, deadline=None)
@given(cases())
def test_compact_tensors_equal_the_definition(case):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_masked_conv2d_native, "ready", lambda: False)
        check_case(case)


@settings(max_examples=30, deadline=None)
@given(cases(), st.booleans())
def test_gradients_equal_the_definitions(case, native):
    tensors, numbers = case
    input, weight, bias, out_open, in_open = tensors
    if input.shape[0] == 0:
        return
    leaves = [None if t is None else t.double().requires_grad_() for t in (input, weight, bias, numbers["residual"])]
    wanted = [leaf for leaf in leaves if leaf is not None]

    def gradients(function):
        x, w, b, residual = leaves
        out = function(x, w, b, out_open, in_open, **{**numbers, "residual": residual})
        # Weights that differ from output to output, so that no two gradients can be confused.
        ramp = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        if not out.requires_grad:  # the oracle of a layer with nothing open
            assert function is masked_conv2d_oracle
            return [torch.zeros_like(leaf) for leaf in wanted]
        return torch.autograd.grad((out * ramp).sum(), wanted, allow_unused=True, materialize_grads=True)

    with pytest.MonkeyPatch.context() as patch:
        if not native:
            patch.setattr(_masked_conv2d_native, "ready", lambda: False)
        got = gradients(masked_conv2d)
    for ours, theirs, plain in zip(
        got, gradients(masked_conv2d_oracle), gradients(masked_conv2d_reference), strict=True
    ):
        assert relative_error(ours, theirs, SCALE) <= tolerance(torch.float64)
        assert relative_error(plain, theirs, SCALE) <= tolerance(torch.float64)


@pytest.mark.parametrize("input_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("weight_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("channels", [(1, 5), (6, 1), (6, 5)])
def test_output_has_the_memory_format_of_conv2d(backend, input_layout, weight_layout, kernel, channels):
    x = LAYOUTS[input_layout](torch.randn(2, channels[0], 6, 7))
    w = LAYOUTS[weight_layout](torch.randn(channels[1], channels[0], kernel, kernel))
    out = masked_conv2d(x, w, None, torch.ones(channels[1], dtype=torch.bool))
    expected = F.conv2d(x, w)
    assert out.stride() == expected.stride()


def test_all_open_equals_conv2d_on_pytorchs_own_samples(backend, monkeypatch):
    # Importing the samples freezes PyTorch's flags; that is undone at the end.
    monkeypatch.setitem(torch.backends.flags_frozen.__globals__, "__allow_nonbracketed_mutation_flag", True)
    invocations = pytest.importorskip("torch.testing._internal.common_methods_invocations")
    info = next(op for op in invocations.op_db if op.name == "nn.functional.conv2d")
    checked = 0
    for dtype in (torch.float32, torch.float64):
        for sample in info.sample_inputs("cpu", dtype):
            weight, bias = (sample.args[0], sample.args[1] if len(sample.args) > 1 else sample.kwargs.get("bias"))
            numbers = {k: v for k, v in sample.kwargs.items() if k != "bias"}
            if sample.input.dim() != 4:
                continue
            everything = torch.ones(weight.shape[0], dtype=torch.bool)
            out = masked_conv2d(sample.input, weight, bias, everything, **numbers)
            torch.testing.assert_close(out, F.conv2d(sample.input, weight, bias, **numbers))
            checked += 1
    assert checked >= 10


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("groups", [1, 2])
def test_nan_and_inf_stay_out_of_what_is_closed(backend, bad, groups):
    out_open, in_open = mask_of([1, 0, 1, 0]), mask_of([1, 1, 0, 1])
    x, w, b = torch.randn(2, 4, 5, 5), torch.randn(4, 4 // groups, 3, 3), torch.randn(4)
    expected = masked_conv2d_oracle(x, w, b, out_open, in_open, groups=groups)
    x[:, 2], w[1], b[3] = bad, bad, bad
    x.requires_grad_(), w.requires_grad_(), b.requires_grad_()
    out = masked_conv2d(x, w, b, out_open, in_open, groups=groups)
    assert torch.equal(out[:, ~out_open], torch.zeros(2, 2, 3, 3))
    assert relative_error(out, expected, SCALE) <= tolerance()
    to_x, to_w, to_b = torch.autograd.grad(out.square().sum(), (x, w, b))
    assert to_x.isfinite().all() and to_w.isfinite().all() and to_b.isfinite().all()
    assert not to_x[:, ~in_open].any() and not to_w[~out_open].any() and not to_b[~out_open].any()


@pytest.mark.parametrize("function", [masked_conv2d, masked_conv2d_reference])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_closed_sample_of_nan_stays_out_of_the_gradients(backend, function, groups):
    x, w, b = torch.randn(3, 4, 5, 5), torch.randn(4, 4 // groups, 3, 3), torch.randn(4)
    # The second sample is closed; in the third the second group alone, where there are two.
    out_open = mask_of([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]])
    closed = torch.zeros(3, 4, dtype=torch.bool)
    closed[1] = True
    closed[2, 2:] = groups == 2

    def gradients(fill):
        leaves = [torch.where(closed[:, :, None, None], fill, x), w.clone(), b.clone()]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        return torch.autograd.grad(function(*leaves, out_open, groups=groups).square().sum(), leaves)

    for got, expected in zip(gradients(float("nan")), gradients(0.0), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("padding", [0, 1])
def test_nan_and_inf_go_where_conv2d_sends_them(backend, padding):
    x, w = torch.randn(1, 3, 6, 6), torch.randn(4, 3, 3, 3)
    x[0, 1, 2, 3], x[0, 2, 5, 5] = float("nan"), float("inf")
    if padding == 0:  # whether an infinite weight on a padded pixel makes a NaN differs inside PyTorch itself
        w[2, 0, 0, 0] = float("-inf")
    everything = torch.ones(4, dtype=torch.bool)
    for relu in (False, True):
        expected = F.conv2d(x, w, padding=padding)
        expected = expected.relu() if relu else expected
        out = masked_conv2d(x, w, None, everything, padding=padding, relu=relu)
        torch.testing.assert_close(out, expected, equal_nan=True)


# 3x3 filters over so many channels go through Winograd's algorithm, whose transforms mix pixels, or with a
# stride through direct sums over channels that lie side by side; 8 of 16 closed leave unused lanes in a register.
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("stride, size", [(1, 12), (1, 7), (2, 13)])
@pytest.mark.parametrize("closed", [0, 1, 8, 20])
@torch.no_grad()
def test_side_by_side_channels(instruction_set, layout, stride, size, closed):
    channels = 20 if closed in (1, 20) else 16
    out_open = torch.arange(channels) >= closed
    x, w, b = torch.randn(5, 24, size, size), torch.randn(channels, 24, 3, 3), torch.randn(channels)
    x = x.contiguous(memory_format=layout)
    numbers = {"stride": stride, "padding": 1}
    for residual, relu in ((False, False), (False, True), (True, True)):
        exact = masked_conv2d_oracle(x.double(), w.double(), b.double(), out_open, None, **numbers)
        added = torch.randn_like(exact.float()) if residual else None
        exact = exact if added is None else exact + added
        exact = exact.relu() if relu else exact
        out = masked_conv2d(x, w, b, out_open, residual=added, relu=relu, **numbers)
        assert relative_error(out, exact, SCALE) <= tolerance()


# Channels that lie side by side are read where they are; only windows that hang over the edge are copied.
@pytest.mark.parametrize(
    "size, stride, padding",
    [
        ((9, 12), (2, 2), (1, 1)),
        ((12, 9), (2, 1), (0, 1)),
        ((7, 20), (1, 2), (1, 0)),
        ((16, 16), (3, 2), (2, 3)),
        ((3, 3), (2, 2), (1, 1)),
        ((5, 1), (2, 2), (1, 1)),
        ((1, 8), (1, 2), (1, 1)),
        ((24, 5), (2, 2), (1, 4)),
    ],
)
@torch.no_grad()
def test_windows_over_the_edge(instruction_set, size, stride, padding):
    wide = torch.randn(7, size[0] + 3, size[1] + 2, 24).permute(0, 3, 1, 2)
    inside = wide[:, :16, 2 : 2 + size[0], 1 : 1 + size[1]]  # what is around it must not be read
    w, b = torch.randn(32, 16, 3, 3), torch.randn(32)
    numbers = {"stride": stride, "padding": padding}
    for out_open in (torch.ones(32, dtype=torch.bool), torch.arange(32) % 3 > 0):
        exact = masked_conv2d_oracle(inside.double(), w.double(), b.double(), out_open, None, **numbers)
        for x in (inside, inside.contiguous(memory_format=torch.channels_last)):
            for weight in (w, w.contiguous(memory_format=torch.channels_last)):
                out = masked_conv2d(x, weight, b, out_open, **numbers)
                assert relative_error(out, exact, SCALE) <= tolerance()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -3e38])
@torch.no_grad()
def test_side_by_side_channels_mix_no_pixels(instruction_set, layout, stride, bad):
    x, w = torch.randn(2, 16, 17, 15), torch.randn(16, 16, 3, 3)
    x[0, 3, 8, 6] = x[1, 2, 0, 14] = bad
    x = x.contiguous(memory_format=layout)
    out_open = torch.arange(16) % 2 == 0
    for mask in (out_open, torch.ones(16, dtype=torch.bool)):
        out = masked_conv2d(x, w, None, mask, stride=stride, padding=1)
        expected = torch.where(mask[:, None, None], F.conv2d(x, w, None, stride, 1), 0)
        assert torch.equal(out[:, ~mask], torch.zeros_like(out[:, ~mask]))
        assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(out.isinf(), expected.isinf())
        usual = expected.abs() < 1e3
        assert usual.sum() > 0.9 * usual.numel()
        assert_close(out[usual], expected[usual], algorithm="winograd4", terms=144)


def test_closed_output_with_residual_is_the_activated_residual(backend):
    residual = torch.randn(2, 3, 4, 4)
    x, w, b = torch.full((2, 2, 4, 4), float("nan")), torch.randn(3, 2, 1, 1), torch.randn(3)
    closed = torch.zeros(3, dtype=torch.bool)
    assert torch.equal(masked_conv2d(x, w, b, closed, residual=residual), residual)
    assert torch.equal(masked_conv2d(x, w, b, closed, residual=residual, relu=True), residual.relu())


def test_expanded_and_zero_stride_tensors(backend):
    x = torch.randn(1, 3, 1, 6).expand(4, 3, 5, 6)
    w = torch.randn(1, 3, 3, 3).expand(2, 3, 3, 3)
    b = torch.randn(1).expand(2)
    residual = torch.randn(2, 1, 1).expand(4, 2, 3, 4)
    out_open = torch.ones(1, dtype=torch.bool).expand(2)
    out = masked_conv2d(x, w, b, out_open, residual=residual)
    assert relative_error(out, masked_conv2d_oracle(x, w, b, out_open, residual=residual), SCALE) <= tolerance()


def test_more_than_two_to_the_31_elements():
    # Expanded, so that it takes no memory; the last pixel lies beyond what 32 bits can count.
    row = torch.arange(32769, dtype=torch.float32)
    x = row.expand(1, 1, 65536, 32769)
    assert x.numel() > 2**31
    out = masked_conv2d(x, torch.ones(1, 1, 1, 1), None, mask_of([1]), stride=(65535, 32768))
    assert torch.equal(out, torch.tensor([[[[0.0, 32768.0], [0.0, 32768.0]]]]))


def test_arguments_stay_as_they_were(backend):
    x, w, residual = torch.randn(1, 2, 4, 4), torch.randn(2, 2, 1, 1), torch.randn(1, 2, 4, 4)
    before = [t.clone() for t in (x, w, residual)]
    closed = torch.zeros(2, dtype=torch.bool)
    out = masked_conv2d(x, w, None, closed, residual=residual)
    out.fill_(7)
    assert all(torch.equal(t, old) for t, old in zip((x, w, residual), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_err_no_more_than_pytorch_twice(dtype):
    x, w = torch.randn(2, 8, 6, 6, dtype=dtype), torch.randn(6, 8, 3, 3, dtype=dtype)
    out_open = mask_of([1, 0, 1, 1, 0, 1])
    exact = masked_conv2d_oracle(x, w, None, out_open)
    plain = F.conv2d(x, w) * out_open[:, None, None]
    ours = (masked_conv2d(x, w, None, out_open).double() - exact).abs().max()
    assert ours <= 2 * (plain.double() - exact).abs().max()


def test_autocast_computes_in_the_autocast_type(backend):
    x, w = torch.randn(1, 2, 4, 4), torch.randn(3, 2, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        out = masked_conv2d(x, w, None, mask_of([1, 0, 1]))
    assert out.dtype == torch.bfloat16
    expected = masked_conv2d_oracle(x.bfloat16(), w.bfloat16(), None, mask_of([1, 0, 1]))
    assert_close(out, expected)


def test_the_compact_convolution_multiplies_only_what_is_open(monkeypatch):
    monkeypatch.setattr(_masked_conv2d_native, "ready", lambda: False)
    from torch.utils.flop_counter import FlopCounterMode

    x, w = torch.randn(2, 8, 6, 6, requires_grad=True), torch.randn(10, 8, 3, 3, requires_grad=True)
    out_open, in_open = torch.arange(10) % 2 == 0, torch.arange(8) % 4 == 0
    with FlopCounterMode(display=False) as counter:
        masked_conv2d(x, w, None, out_open, in_open, padding=1).sum().backward()
    # 5 open outputs, 2 open inputs; FLOPs are two to a MAC, and the backward does the work twice.
    assert counter.get_total_flops() == 3 * 2 * (2 * 6 * 6) * 5 * 2 * 9


def test_the_backward_operator_multiplies_only_what_is_open():
    from torch.utils.flop_counter import FlopCounterMode

    x, w = torch.randn(2, 8, 6, 6), torch.randn(10, 8, 3, 3)
    out_open, in_open = torch.arange(10) % 2 == 0, torch.arange(8) % 4 == 0
    with FlopCounterMode(display=False) as counter:
        made = _masked_conv2d_native._backward_op(
            torch.randn(2, 10, 6, 6), x, w, out_open, in_open, None, [1, 1], [1] * 4, [1, 1], 1, [True] * 4
        )
    assert made[0].shape == x.shape and made[1].shape == w.shape
    assert counter.get_total_flops() == 2 * 2 * (2 * 6 * 6) * 5 * 2 * 9


def test_both_languages_agree_where_winograds_algorithm_serves():
    """The choice of PyTorch's convolution in Python relies on what the operator does in C++."""
    module = import_module("gatedconv.ops.masked_conv2d")  # the package has the function under this name
    text = (Path(__file__).parents[2] / "csrc/cpu/masked_maps.cpp").read_text()
    found = dict(re.findall(r"constexpr int64_t (kMostWeights|kLeastInputs) = ([0-9 *]+);", text))
    values = {name: math.prod(int(factor) for factor in product.split("*")) for name, product in found.items()}
    assert values == {"kMostWeights": module._MOST_WEIGHTS, "kLeastInputs": module._LEAST_INPUTS}
