import pytest
import torch
import torch.nn.functional as F

from gatedconv.ops import masked_conv2d, masked_conv2d_reference
from tests.tolerances import assert_close

OPEN = torch.ones(4, dtype=torch.bool)


def call(function, **changes):
    arguments = {
        "input": torch.randn(2, 3, 5, 5),
        "weight": torch.randn(4, 3, 3, 3),
        "bias": torch.randn(4),
        "out_open": OPEN,
        "in_open": None,
    }
    return function(**{**arguments, **changes})


BAD = {
    "input no tensor": ({"input": [[1.0]]}, TypeError, "input must be a tensor, got list"),
    "input of 3 dimensions": ({"input": torch.randn(3, 5, 5)}, ValueError, "input must be 4-D"),
    "weight of 5 dimensions": ({"weight": torch.randn(4, 3, 3, 3, 1)}, ValueError, "weight must be 4-D"),
    "integers": ({"input": torch.ones(2, 3, 5, 5, dtype=torch.int64)}, TypeError, "floating point"),
    "complex": ({"input": torch.ones(2, 3, 5, 5, dtype=torch.complex64)}, TypeError, "floating point"),
    "weight of another dtype": ({"weight": torch.randn(4, 3, 3, 3).double()}, TypeError, "input's dtype"),
    "bias of another dtype": ({"bias": torch.randn(4).half()}, TypeError, "input's dtype"),
    "weight on another device": ({"weight": torch.randn(4, 3, 3, 3, device="meta")}, ValueError, "device"),
    "mask on another device": ({"out_open": OPEN.to("meta")}, ValueError, "device"),
    "channel count": ({"weight": torch.randn(4, 2, 3, 3)}, ValueError, "expects input with 2 channels"),
    "groups": ({"groups": 3, "weight": torch.randn(4, 1, 3, 3)}, ValueError, "divisible by groups"),
    "groups of 0": ({"groups": 0}, ValueError, "groups must be at least 1"),
    "bias length": ({"bias": torch.randn(3)}, ValueError, r"bias must have shape \(4,\)"),
    "bias of 2 dimensions": ({"bias": torch.randn(4, 1)}, ValueError, "bias must be 1-D"),
    "mask length": ({"out_open": OPEN[:3]}, ValueError, r"out_open must have shape \(4,\) or \(2, 4\)"),
    "mask of another batch": ({"out_open": OPEN.expand(3, 4)}, ValueError, "out_open must have shape"),
    "mask of floats": ({"out_open": torch.ones(4)}, TypeError, "must be a bool tensor, got torch.float32"),
    "mask a list": ({"out_open": [True] * 4}, TypeError, "out_open must be a bool tensor, got list"),
    "in_open length": ({"in_open": OPEN}, ValueError, r"in_open must have shape \(3,\)"),
    "in_open of ints": ({"in_open": torch.ones(3, dtype=torch.int8)}, TypeError, "in_open must be a bool"),
    "residual shape": ({"residual": torch.randn(2, 4, 5, 5)}, ValueError, r"output's shape \(2, 4, 3, 3\)"),
    "residual dtype": ({"residual": torch.randn(2, 4, 3, 3).double()}, TypeError, "residual must have"),
    "kernel taller than the input": ({"input": torch.randn(2, 3, 2, 5)}, ValueError, "padded input height"),
    "dilated kernel too wide": ({"dilation": (1, 3)}, ValueError, "padded input width"),
    "stride 0": ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
    "stride of 64 bits": ({"stride": 2**63 - 1}, ValueError, "stride must be at most"),
    "strides beyond 64 bits": ({"stride": (1, 2**70)}, ValueError, "stride must be at most"),
    "padding of 63 bits": ({"padding": 2**62}, ValueError, "padding must be at most"),
    "stride a float": ({"stride": 1.5}, TypeError, "stride must be an int"),
    "stride of three": ({"stride": (1, 1, 1)}, ValueError, "stride must be an int or two"),
    "dilation -1": ({"dilation": (1, -1)}, ValueError, "dilation must be at least 1"),
    "negative padding": ({"padding": -1}, ValueError, "padding must be at least 0"),
    "padding of an unknown name": ({"padding": "full"}, ValueError, "'same', 'valid'"),
    "no rows": ({"input": torch.randn(2, 3, 0, 5), "padding": 2}, ValueError, "input height must be at least 1"),
    "no columns": ({"input": torch.randn(2, 3, 5, 0), "padding": 2}, ValueError, "input width must be at least 1"),
    "sparse input": ({"input": torch.randn(2, 3, 5, 5).to_sparse()}, TypeError, "input must be dense"),
    "sparse weight": ({"weight": torch.randn(4, 3, 3, 3).to_sparse()}, TypeError, "weight must be dense"),
    "sparse bias": ({"bias": torch.randn(4).to_sparse()}, TypeError, "bias must be dense"),
    "sparse residual": ({"residual": torch.randn(2, 4, 3, 3).to_sparse()}, TypeError, "residual must be dense"),
    "sparse mask": ({"out_open": OPEN.to_sparse()}, TypeError, "out_open must be dense"),
    "oneDNN's input": ({"input": torch.randn(2, 3, 5, 5).to_mkldnn()}, TypeError, "input must be dense"),
    "relu a tensor": ({"relu": torch.ones(4)}, TypeError, "relu must be a bool, got Tensor"),
    "relu a number": ({"relu": 1}, TypeError, "relu must be a bool, got int"),
    "same with a stride": ({"padding": "same", "stride": 2}, ValueError, "needs stride 1"),
}


@pytest.mark.parametrize("function", [masked_conv2d, masked_conv2d_reference])
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_raise_one_clear_error(function, case):
    changes, error, words = BAD[case]
    with pytest.raises(error, match=words) as caught:
        call(function, **changes)
    assert str(caught.value).startswith("masked_conv2d: ")


@pytest.mark.parametrize("grad", [True, False])
def test_packed_of_another_type(grad):
    with torch.set_grad_enabled(grad), pytest.raises(TypeError, match="masked_conv2d: packed must be a PackedConv"):
        call(masked_conv2d, packed=torch.ones(3))


def test_a_batch_of_no_images_may_have_no_rows():
    assert call(masked_conv2d, input=torch.randn(0, 3, 0, 5), padding=2).shape == (0, 4, 2, 7)


def test_a_direct_call_of_the_operator_checks_too():
    call(masked_conv2d)  # loads the library
    operator = torch.ops.gatedconv.masked_conv2d.default
    x, w = torch.randn(1, 3, 5, 5), torch.randn(4, 3, 3, 3)
    numbers = ([1, 1], [0, 0, 0, 0], [1, 1], 1, False)
    for bad in (
        (x, w, None, OPEN[:2], None, None, *numbers),
        (x, w[:, :2], None, OPEN, None, None, *numbers),
        (x, w, torch.randn(3), OPEN, None, None, *numbers),
        (x, w, None, OPEN, OPEN, None, *numbers),
        (x, w, None, OPEN, None, torch.randn(1, 4, 5, 5), *numbers),
        (x[:, :, :2], w, None, OPEN, None, None, *numbers),
        (x, w, None, OPEN, None, None, [0, 1], *numbers[1:]),
        (x.long(), w.long(), None, OPEN, None, None, *numbers),
    ):
        with pytest.raises(RuntimeError, match="masked_conv2d: "):
            operator(*bad)


@pytest.mark.parametrize("padding", [[2, 0, 0, 0], [0, 3, 1, 2], [1, 1, 0, 2]])
def test_gradients_of_a_direct_call_with_a_padding_for_each_side(padding):
    call(masked_conv2d)  # loads the library
    top, bottom, left, right = padding
    x, w = torch.randn(2, 3, 5, 5, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    mask = torch.tensor([True, False, True, True])
    out = torch.ops.gatedconv.masked_conv2d.default(x, w, None, mask, None, None, [1, 1], padding, [1, 1], 1, False)
    expected = F.conv2d(F.pad(x, (left, right, top, bottom)), w) * mask[:, None, None]
    assert_close(out, expected)
    grad = torch.randn_like(out)
    for mine, theirs in zip(*(torch.autograd.grad(o, (x, w), grad) for o in (out, expected)), strict=True):
        assert_close(mine, theirs)
