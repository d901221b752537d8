"""Weights that stay packed between calls: used, renewed, and never stale."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings

import gatedconv
from gatedconv.ops import PackedConv, _masked_conv2d_native, masked_conv2d
from tests.ops.test_masked_conv2d import SCALE, cases, masked_conv2d_oracle
from tests.tolerances import assert_close, relative_error, tolerance

MASK = torch.tensor([1, 0, 0, 1, 1, 0, 1, 1, 1, 1, 1, 1]).bool()


@pytest.fixture
def packs(monkeypatch):
    """Counts how often weights are packed to be kept."""
    assert _masked_conv2d_native.ready()
    calls, pack = [], _masked_conv2d_native.pack

    def counted(*arguments):
        calls.append(arguments)
        return pack(*arguments)

    monkeypatch.setattr(_masked_conv2d_native, "pack", counted)
    return calls


def frozen_conv(**arguments):
    torch.manual_seed(0)
    conv = gatedconv.Conv2d(5, 12, 3, padding=1, gate="channel", **arguments)
    return gatedconv.freeze(torch.nn.Sequential(conv), masks={"0.gate": MASK})[0].eval()


def check(conv, x):
    mask = conv.gate.mask
    expected = F.conv2d(x, conv.weight, conv.bias, padding=1) * mask.to(x.dtype)[:, None, None]
    out = conv(x)
    assert_close(out, expected, terms=45)
    assert torch.equal(out[:, ~mask], torch.zeros_like(out[:, ~mask]))


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_packed_equals_the_definition_at_every_call(case):
    tensors, numbers = case
    assume(tensors[0].shape[0] > 0)
    packed = PackedConv()
    with torch.no_grad():
        for _ in range(2):
            out = masked_conv2d(*tensors, **numbers, packed=packed)
            assert relative_error(out, masked_conv2d_oracle(*tensors, **numbers), SCALE) <= tolerance()


@torch.no_grad()
def test_weights_are_packed_once(packs):
    conv, x = frozen_conv(), torch.randn(2, 5, 7, 8)
    for size in (7, 5, 7):
        check(conv, x[:, :, :size])
    assert len(packs) == 1


@torch.no_grad()
def test_what_is_kept_is_what_the_kernel_reads():
    conv, x = frozen_conv(), torch.randn(2, 5, 7, 8)
    before = conv(x)
    conv._packed._kept[1][-1] += 1000.0  # a weight of the last tile
    assert not torch.allclose(conv(x), before)


def step(conv):
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.5)
    with torch.enable_grad():
        conv(torch.randn(2, 5, 7, 8)).square().sum().backward()
    optimizer.step()


def replace_through_data(conv):
    for _ in range(4):  # so that memory comes back at an old address
        conv.weight.data = torch.randn_like(conv.weight)


def swap_parameter(conv):
    conv.weight = torch.nn.Parameter(torch.randn_like(conv.weight))


CHANGES = {
    "optimizer step": step,
    "load_state_dict": lambda conv: conv.load_state_dict(
        {name: torch.randn_like(v) if v.is_floating_point() else v for name, v in conv.state_dict().items()}
    ),
    "data assignment": replace_through_data,
    "in place through data": lambda conv: conv.weight.data.mul_(-2),
    "in place through numpy": lambda conv: conv.weight.detach().numpy().fill(0.5),
    "copy_": lambda conv: conv.weight.copy_(torch.randn_like(conv.weight)),
    "one number": lambda conv: conv.weight[-1, -1, -1].fill_(7.0),
    "another parameter": swap_parameter,
    "another mask": lambda conv: conv.gate.mask.copy_(~conv.gate.mask),
    "another mask through data": lambda conv: conv.gate.mask.data.logical_not_(),
    "channels_last": lambda conv: conv.to(memory_format=torch.channels_last),
    "to float64 and back": lambda conv: conv.double().float(),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_change_is_seen_at_the_next_call(change):
    conv, x = frozen_conv(), torch.randn(2, 5, 7, 8)
    check(conv, x)
    CHANGES[change](conv)
    check(conv, x)
    check(conv, x)


def test_inference_tensors_have_no_version_and_are_not_stale():
    with torch.inference_mode():
        conv, x = copy.deepcopy(frozen_conv()), torch.randn(2, 5, 7, 8)
        assert conv.weight.is_inference()
        check(conv, x)
        conv.weight.mul_(-2)
        check(conv, x)


@torch.no_grad()
def test_packed_weights_are_no_part_of_the_module(packs):
    conv, x = frozen_conv(), torch.randn(2, 5, 7, 8)
    check(conv, x)
    assert {"weight", "bias"} == {name for name in conv.state_dict() if not name.startswith("gate.")}
    buffer = io.BytesIO()
    torch.save(conv, buffer)
    buffer.seek(0)
    copies = (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv)), torch.load(buffer, weights_only=False))
    for other in copies:
        assert other._packed is not conv._packed and other._packed._kept is None
        check(other, x)
    assert conv.double()._packed._kept is None
    assert len(packs) == 4


@torch.no_grad()
def test_packed_of_other_weights_is_left_alone():
    x, w = torch.randn(2, 4, 6, 5), torch.randn(5, 4, 3, 3)
    mask, everything = torch.tensor([1, 0, 1, 1, 0]).bool(), torch.ones(5, dtype=torch.bool)
    op, pack = torch.ops.gatedconv.masked_conv2d.default, torch.ops.gatedconv.masked_conv2d_pack.default
    numbers = ([1, 1], [0, 0, 0, 0], [1, 1], 1, False)
    right = op(x, w, None, mask, None, None, *numbers)
    assert torch.equal(op(x, w, None, mask, None, None, *numbers, pack(w, mask, None, 1)), right)
    others = [pack(w + 1, mask, None, 1), pack(w, everything, None, 1), pack(w[:, :2], mask, None, 1)]
    others += [pack(w, mask, torch.tensor([1, 1, 0, 1]).bool(), 1), right.flatten(), torch.zeros(0)]
    for other in others:
        assert torch.equal(op(x, w, None, mask, None, None, *numbers, other), right)
    with pytest.raises(RuntimeError, match="as masked_conv2d_pack makes it"):
        op(x, w, None, mask, None, None, *numbers, torch.zeros(4, dtype=torch.int32))


def test_opcheck_with_packed_weights():
    assert _masked_conv2d_native.ready()
    x, w = torch.randn(2, 4, 6, 5, requires_grad=True), torch.randn(5, 4, 3, 3, requires_grad=True)
    mask = torch.tensor([1, 0, 1, 1, 0]).bool()
    packed = _masked_conv2d_native.pack(w, mask, None, 1)
    arguments = (x, w, None, mask, None, None, [1, 1], [0, 0, 0, 0], [1, 1], 1, True, packed)
    torch.library.opcheck(torch.ops.gatedconv.masked_conv2d.default, arguments)


def test_opcheck_of_packing():
    weight, mask = torch.randn(5, 9, 3, 3), torch.tensor([1, 0, 1, 1, 0]).bool()
    op = torch.ops.gatedconv.masked_conv2d_pack.default
    assert _masked_conv2d_native.ready()
    torch.library.opcheck(op, (weight, mask, None, 1))
    torch.library.opcheck(op, (weight, mask, torch.arange(9) > 3, 1))


def test_with_gradients_and_under_vmap_nothing_is_kept(packs):
    conv, x = frozen_conv(), torch.randn(3, 2, 5, 7, 8)
    conv(x[0]).sum().backward()
    with torch.no_grad():
        weights = torch.stack([conv.weight, conv.weight * 2])

        def run(weight):
            return torch.func.functional_call(conv, {"weight": weight, "bias": torch.zeros(12)}, (x[0],))

        out = torch.func.vmap(run)(weights)
        assert_close(out[1], 2 * out[0], terms=45)
    assert not packs


@torch.no_grad()
def test_a_frozen_block_packs_each_gated_convolution_once(packs):
    for position, expected in (("before", 1), ("middle", 2), ("after", 1)):
        packs.clear()
        net = gatedconv.models.resnet20(gate="channel", position=position, input_size=(3, 8, 8)).eval()
        masks = {name: torch.arange(g.num_gates) % 2 == 0 for name, g in gatedconv.gates(net).items()}
        frozen = gatedconv.freeze(net, masks=masks)
        first, second = frozen(torch.zeros(2, 3, 8, 8)), frozen(torch.zeros(2, 3, 8, 8))
        assert torch.equal(first, second)
        assert len(packs) == 9 * expected
