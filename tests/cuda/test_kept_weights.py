"""A mask of inputs for each sample, and weights that stay packed on a GPU: what of it works without one."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gatedconv
from gatedconv import ops
from gatedconv.ops import _masked_conv2d_native, _masked_conv2d_packed
from tests.tolerances import assert_close


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("per_sample_outputs", [False, True])
@pytest.mark.parametrize("name", ["masked_conv2d", "masked_conv2d_reference"])
def test_inputs_that_a_sample_closes_are_not_read(name, per_sample_outputs, groups):
    torch.manual_seed(0)
    x, weight = torch.randn(3, 6, 7, 5), torch.randn(8, 6 // groups, 3, 3)
    in_open = torch.tensor([[1, 0, 1, 1, 0, 0], [0] * 6, [1] * 6]).bool()
    out_open = torch.rand(3, 8) < 0.6 if per_sample_outputs else torch.rand(8) < 0.6
    given = x.masked_fill(~in_open[:, :, None, None], float("nan")).requires_grad_()
    kernel = weight.clone().requires_grad_()
    out = getattr(ops, name)(given, kernel, torch.ones(8), out_open, in_open, padding=1, groups=groups, relu=True)
    clean, plain = (x * in_open[:, :, None, None]).requires_grad_(), weight.clone().requires_grad_()
    expected = torch.relu(F.conv2d(clean, plain, torch.ones(8), padding=1, groups=groups))
    expected = expected * out_open.expand(3, -1)[:, :, None, None]
    assert_close(out, expected)
    grad = torch.randn(out.shape)
    mine = torch.autograd.grad(out, (given, kernel), grad)
    theirs = torch.autograd.grad(expected, (clean, plain), grad)
    assert_close(mine[1], theirs[1], algorithm="gradient")
    assert_close(mine[0], theirs[0] * in_open[:, :, None, None], algorithm="gradient")
    with torch.no_grad():
        torch.testing.assert_close(
            getattr(ops, name)(given, kernel, torch.ones(8), out_open, in_open, padding=1, groups=groups, relu=True),
            out,
        )


class OnDevice:
    """Keys as on a GPU, of tensors of the CPU, on a stream that the test names."""

    def __init__(self, monkeypatch) -> None:
        self.cuda_stream, self.tf32, self.packs = 0, False, 0
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self)
        monkeypatch.setattr(_masked_conv2d_packed._masked_conv2d_cuda, "allows_tf32", lambda: self.tf32)

    def key(self, *tensors, groups=1):
        return _masked_conv2d_packed._device_key(tensors, groups)


def test_a_key_changes_with_whatever_the_packed_weights_depend_on(monkeypatch):
    device = OnDevice(monkeypatch)
    weight, mask = nn.Parameter(torch.randn(4, 4, 3, 3)), torch.ones(4, dtype=torch.bool)
    key = device.key(weight, mask)
    assert key == device.key(weight, mask)
    assert key != device.key(weight, mask, mask) and key != device.key(weight, mask, groups=2)
    assert key != device.key(copy.deepcopy(weight), mask) and key != device.key(weight, mask.clone())
    device.cuda_stream = 7
    assert key != device.key(weight, mask), "on another stream they might not be packed yet"
    device.cuda_stream, device.tf32 = 0, True
    assert key != device.key(weight, mask)
    device.tf32 = False
    assert key == device.key(weight, mask)
    with torch.no_grad():
        weight.mul_(2)
    changed = device.key(weight, mask)
    assert key != changed
    mask[0] = False
    assert changed != device.key(weight, mask)


def test_a_tensor_that_is_gone_is_equal_to_nothing(monkeypatch):
    """Its memory, and its name in Python, may belong to another by now."""
    device = OnDevice(monkeypatch)
    mask = torch.ones(4, dtype=torch.bool)
    weight = torch.randn(4, 4, 3, 3)
    key = device.key(weight, mask)
    pointer = weight.data_ptr()
    del weight
    for _ in range(20):
        other = torch.randn(4, 4, 3, 3)
        assert key != device.key(other, mask)
        if other.data_ptr() == pointer:
            break


@torch.no_grad()
def test_a_layer_packs_once_until_its_weights_change(monkeypatch):
    """What a frozen layer does on a GPU, told by its keys."""
    OnDevice(monkeypatch)
    packs = []
    monkeypatch.setattr(_masked_conv2d_native, "pack", lambda *arguments: packs.append(arguments) or torch.zeros(1))
    monkeypatch.setattr(_masked_conv2d_packed, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    capturing = False
    conv, mask = gatedconv.Conv2d(4, 4, 3).half(), torch.ones(4, dtype=torch.bool)
    kept = conv._packed
    first = kept.tensor(conv.weight, mask, None, 1)
    assert first is not None and kept.tensor(conv.weight, mask, None, 1) is first and len(packs) == 1
    conv.load_state_dict(copy.deepcopy(conv).state_dict())
    assert kept.tensor(conv.weight, mask, None, 1) is not first and len(packs) == 2
    assert kept.tensor(conv.weight, mask.expand(2, 4), None, 1) is None
    assert kept.tensor(conv.weight, mask, mask.expand(2, 4), 1) is None
    capturing = True
    assert kept.tensor(conv.weight, mask, None, 1) is None, "a replay would not see new weights"
    capturing = False
    with torch.inference_mode():
        assert kept.tensor(torch.randn(4, 4, 3, 3), mask, None, 1) is None, "its changes are not counted"
    for forget in (conv.train, conv.eval, lambda: conv.to(torch.float32)):
        kept.tensor(conv.weight, mask, None, 1)
        assert kept._kept is not None
        forget()
        assert kept._kept is None


def test_the_mask_that_is_open_everywhere_is_no_inference_tensor():
    kept = _masked_conv2d_packed.PackedConv()
    with torch.inference_mode():
        mask = kept.everything(4, torch.device("cpu"))
    assert not mask.is_inference() and bool(mask.all()) and kept.everything(4, torch.device("cpu")) is mask
