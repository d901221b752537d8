"""How a convolution of ours becomes one of torch.nn."""

import pytest
import torch
from torch.nn.utils import spectral_norm, weight_norm

import gatedconv
from gatedconv.deploy.slicing import plain_conv


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
@pytest.mark.parametrize("learns", [True, False])
def test_computed_weights_are_of_the_present_parameters(norm, learns):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 5)
    conv, other = (norm(gatedconv.Conv2d(3, 4, 3)).eval().requires_grad_(learns) for _ in range(2))
    conv.register_forward_hook(lambda module, args, output: 2 * output)
    conv.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    conv.load_state_dict(other.state_dict())
    plain = plain_conv(conv)
    assert type(plain) is torch.nn.Conv2d
    torch.testing.assert_close(plain(x), 2 * other(x + 1))
    assert [p.requires_grad for p in plain.parameters()] == [learns, learns]
