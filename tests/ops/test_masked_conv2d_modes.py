"""masked_conv2d on the meta device and under forward-mode differentiation."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

import gatedconv
from gatedconv.ops import masked_conv2d

OPEN = torch.tensor([True, False, True, True])


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("mask", [OPEN, OPEN.expand(2, 4)], ids=["one mask", "a mask a sample"])
def test_on_the_meta_device_it_has_the_shape_and_strides_of_the_cpu(grad, mask):
    x = torch.empty(2, 3, 7, 6, device="meta").to(memory_format=torch.channels_last)
    weight = torch.empty(4, 3, 3, 3, device="meta")
    with torch.set_grad_enabled(grad):
        out = masked_conv2d(x, weight, None, mask.to("meta"), stride=2, padding=1, relu=True)
    # Not conv2d's on meta, which forgets the memory format.
    expected = F.conv2d(torch.empty_like(x, device="cpu"), torch.empty(4, 3, 3, 3), None, 2, 1)
    assert out.device.type == "meta" and (out.shape, out.stride()) == (expected.shape, expected.stride())


def test_a_frozen_layer_on_the_meta_device():
    layer = torch.nn.Sequential(gatedconv.Conv2d(3, 4, 3, gate="channel"))
    frozen = gatedconv.freeze(layer.eval(), masks={"0.gate": OPEN}).to("meta")
    assert frozen(torch.empty(2, 3, 5, 5, device="meta")).shape == (2, 4, 3, 3)


@pytest.mark.parametrize("grad", [True, False])
def test_a_forward_mode_derivative_is_refused_and_never_lost(grad):
    x, weight = torch.randn(1, 3, 5, 5), torch.randn(4, 3, 3, 3)
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="jvp"):
            masked_conv2d(dual, weight, None, OPEN)
