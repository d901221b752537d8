"""nvcc's PTX of the tiled convolution, executed: against PyTorch in float64, without races or stray accesses."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.native.test_conv_twin import MATHS, expected
from tests.ptx import convolution
from tests.ptx.convolution import FORMATS, TILES

# Error of a sum of products, relative to the sum of their magnitudes.
NAMES = {"f16": "float16", "bf16": "bfloat16", "tf32": "tf32", "fp32": "float32"}
LIMIT = {form: MATHS[name][2] for form, name in NAMES.items()}
NAN = float("nan")

# (channels, outputs, size, kernel, stride, padding, dilation)
SHAPES = [
    (16, 16, 9, 3, 1, 1, 1),
    (16, 24, 9, 3, 2, 1, 1),
    (40, 72, 5, 1, 1, 0, 1),
    (3, 8, 9, 7, 2, 3, 1),
    (11, 13, 7, 3, 1, 1, 1),
    (8, 8, 10, 3, 1, 4, 4),
    (64, 16, 4, 1, 2, 0, 1),
    (33, 20, 6, 3, 1, 1, 1),
]
# (masks of outputs, masks of inputs, residual and output are one, output is channels_last)
MASKS = [
    (None, None, False, True),
    ("batch", "batch", False, True),
    ("sample", None, False, False),
    ("sample", "sample", False, True),
    ("batch", None, True, True),
    (None, "sample", False, False),
]


def check(form, shape, masks, tile, architecture=90, act=1, **options):
    """Run a case; what is closed must be exact, what is open within the format's error, and nothing noted."""
    channels, outputs, size, kernel, stride, padding, dilation = shape
    per_output, per_input, in_place, last = masks
    dtype, batch = FORMATS[form][2], 3
    layout = torch.channels_last if last else torch.contiguous_format
    geometry = dict(stride=stride, padding=padding, dilation=dilation)
    x = torch.randn(batch, channels, size, size).to(dtype).contiguous(memory_format=layout)
    weight = (torch.randn(outputs, channels, kernel, kernel) / (channels**0.5 * kernel)).to(dtype)
    bias = torch.randn(outputs)
    sizes = torch.nn.functional.conv2d(x[:, :1].float(), weight[:1, :1].float(), **geometry).shape[2:]
    residual = torch.randn(batch, outputs, *sizes).to(dtype).contiguous(memory_format=layout)
    draw = lambda per, count: None if per is None else torch.rand((batch, count) if per == "sample" else count) < 0.5  # noqa: E731
    out_open, in_open = draw(per_output, outputs), draw(per_input, channels)
    if in_open is not None:  # what is closed is not read
        x = torch.where(in_open.view(-1, channels, 1, 1), x, NAN).contiguous(memory_format=layout)
    opened = torch.ones(outputs, dtype=torch.bool) if out_open is None else out_open
    pair = {name: (value, value) for name, value in geometry.items()}
    exact = expected(x.double(), weight.double(), bias.double(), opened, in_open, residual.double(), act=act, **pair)
    if in_place:  # closed outputs stay in memory, without even an activation
        shut = ~opened.expand(batch, -1)
        exact[shut] = residual.double()[shut]
    scale = expected(
        x.double().abs(),
        weight.double().abs(),
        bias.double().abs(),
        opened,
        in_open,
        residual.double().abs(),
        act=0,
        **pair,
    )
    out, machine = convolution.run(
        form,
        x,
        weight,
        bias=bias,
        residual=residual.clone(memory_format=torch.preserve_format),
        out_open=out_open,
        in_open=in_open,
        act=act,
        tile=tile,
        in_place=in_place,
        last=last,
        architecture=architecture,
        **geometry,
        **options,
    )
    assert not machine.notes, dict(machine.notes)
    closed = ~opened.expand(batch, -1)
    assert torch.equal(out.double()[closed], exact.to(dtype).double()[closed])
    wrong = (out.double() - exact).abs() - LIMIT[form] * scale
    assert float(wrong.max()) <= 0, float(wrong.max())


def test_a_first_look():
    check("f16", (16, 16, 5, 3, 1, 1, 1), MASKS[0], (1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("architecture", [75, 80, 90])
def test_two_convolutions(form, architecture):
    if architecture < FORMATS[form][3]:
        pytest.skip(f"{form} needs compute capability {FORMATS[form][3] / 10}")
    check(form, SHAPES[4], MASKS[3], (1, 2), architecture)
    check(form, SHAPES[1], MASKS[4], (1, 4), architecture)
    if architecture == 90:
        check(form, SHAPES[3], MASKS[2], (2, 1))


@pytest.mark.slow
@pytest.mark.parametrize("act", [0, 2])
def test_activations(act):
    check("f16", SHAPES[6], MASKS[1], (1, 1), act=act)


def check_tile(form, tile, architecture=90):
    """Almost every instruction of a tile's kernel: whole vectors; lists of each sample; odd numbers of channels."""
    outputs = 8 * tile[1]
    check(form, (64, outputs, 4, 1, 2, 0, 1), (None, None, False, True), tile, architecture)
    check(form, (64, outputs, 4, 1, 2, 0, 1), ("sample", "sample", False, True), tile, architecture, act=2)
    check(form, (33, outputs + 4, 4, 3, 1, 1, 1), ("sample", "sample", False, False), tile, architecture)


@pytest.mark.slow
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_almost_every_instruction(tile):
    check_tile("f16", tile)


@pytest.mark.ptx_all
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("architecture", [75, 80, 90])
@pytest.mark.parametrize("form", FORMATS)
def test_almost_every_instruction_of_every_format(form, architecture, tile):
    if architecture < FORMATS[form][3]:
        pytest.skip(f"{form} needs compute capability {FORMATS[form][3] / 10}")
    check_tile(form, tile, architecture)


@pytest.mark.ptx_all
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_tile(form, tile):
    """Every shape and every kind of mask with every tile, though not each with each."""
    for at, (shape, masks) in enumerate(itertools.product(SHAPES, MASKS)):
        if at % len(TILES) == TILES.index(tile):
            check(form, shape, masks, tile, seed=at)


@pytest.mark.ptx_all
@pytest.mark.parametrize("form", FORMATS)
def test_every_mask(form):
    for at, (shape, masks) in enumerate(itertools.product(SHAPES, MASKS)):
        check(form, shape, masks, TILES[at * 3 % len(TILES)], seed=at)


def test_a_pooled_map_is_read_in_whole_vectors():
    """The strides (C, 1, 1, 1) of a mean are those of a dense map, whatever dimensions of size 1 say."""
    weight = torch.randn(8, 16, 1, 1).half()
    pooled = torch.randn(2, 16, 3, 3).half().mean((2, 3), keepdim=True)
    assert pooled.stride() == (16, 1, 1, 1)
    dense = torch.empty_strided(pooled.shape, (16, 1, 16, 16), dtype=pooled.dtype).copy_(pooled)
    runs = [convolution.run("f16", x, weight, tile=(1, 1)) for x in (pooled, dense)]
    assert runs[0][1].instructions == runs[1][1].instructions and torch.equal(runs[0][0], runs[1][0])


def test_a_kernel_below_its_architecture_traps():
    """An empty kernel would leave its output as it was, without an error."""
    from tests.ptx.memory import Fault

    x = torch.zeros(1, 16, 3, 3).bfloat16().contiguous(memory_format=torch.channels_last)
    with pytest.raises(Fault, match="trap"):
        convolution.run("bf16", x, torch.zeros(8, 16, 1, 1).bfloat16(), tile=(1, 1), architecture=75)
