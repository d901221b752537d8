"""What only a GPU can show: launches, graphs, mixed precision, many repeats, the compiled operator."""

from __future__ import annotations

import pytest
import torch

import gatedconv
from gatedconv import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def gate_and_input(kind="layer", batch=16, channels=16, size=8, dtype=torch.float32):
    torch.manual_seed(0)
    make = gatedconv.LayerGate if kind == "layer" else gatedconv.ChannelGate
    gate = make(channels).cuda().train()
    torch.nn.init.normal_(gate.fc2.weight, std=0.5)
    return gate, torch.randn(batch, channels, size, size, device="cuda", dtype=dtype, requires_grad=True)


def step(gate, x):
    decision = gate(x)
    rate = gate.open_rate
    return torch.autograd.grad(
        (decision, rate), [x, *gate.parameters()], (torch.ones_like(decision), torch.ones_like(rate))
    )


@pytest.mark.parametrize("kind", ["layer", "channel"])
def test_a_small_step_runs(kind):
    gate, x = gate_and_input(kind, batch=4, channels=5, size=3)
    assert all(grad.isfinite().all() for grad in step(gate, x))
    model = gatedconv.models.ResNet(8, 3, "both", input_size=(3, 8, 8)).cuda().train()
    model(torch.randn(4, 3, 8, 8, device="cuda")).sum().backward()
    torch.cuda.synchronize()


@pytest.mark.parametrize("kind", ["layer", "channel"])
def test_a_gate_takes_at_most_four_launches(kind):
    from benchmarks.gpu.timing import count_launches

    gate, x = gate_and_input(kind, batch=256)
    decision = gate(x)
    incoming = (torch.randn_like(decision), torch.randn_like(gate.open_rate))

    def one_step():
        decision = gate(x)
        torch.autograd.grad((decision, gate.open_rate), [x, *gate.parameters()], incoming)

    assert count_launches(one_step) <= 4


@pytest.mark.parametrize("kind", ["layer", "channel"])
def test_ten_thousand_repeats_are_equal_bit_for_bit(kind):
    gate, x = gate_and_input(kind, batch=64)
    first = step(gate, x)
    differ = torch.zeros((), device="cuda")
    for _ in range(10_000):
        for got, expected in zip(step(gate, x), first, strict=True):
            differ += (got != expected).any()
    assert differ.item() == 0


@pytest.mark.parametrize("gate", ["layer", "channel", "both"])
def test_a_training_step_can_be_captured_and_replayed(gate):
    """A replayed graph moves weights and buffers exactly as eager steps do."""
    torch.backends.cudnn.deterministic = True
    eager, replayed = (trained(gate, graph) for graph in (False, True))
    for name, value in eager.items():
        torch.testing.assert_close(replayed[name], value, rtol=1e-5, atol=1e-6, msg=name)


def trained(gate, graph):
    """State of a small network after eight steps."""
    from benchmarks.gpu.timing import captured

    torch.manual_seed(0)
    model = gatedconv.models.ResNet(8, 3, gate, input_size=(3, 8, 8)).cuda().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, labels = torch.randn(8, 3, 8, 8, device="cuda"), torch.arange(8, device="cuda") % 3

    def train():
        loss = torch.nn.functional.cross_entropy(model(x), labels)
        loss = loss + gatedconv.polarization_loss(model) + gatedconv.mac_target_loss(model)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    run = captured(train) if graph else train
    for _ in range(5 if graph else 8):  # capturing runs three steps first
        run()
    torch.cuda.synchronize()
    return model.state_dict()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_decides_in_float32(dtype):
    model = gatedconv.models.ResNet(8, 3, "both", input_size=(3, 8, 8)).cuda().train()
    with torch.autocast("cuda", dtype):
        model(torch.randn(8, 3, 8, 8, device="cuda")).float().sum().backward()
    for gate in gatedconv.gates(model).values():
        assert gate.logits.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_step_allocates_outputs_and_what_backward_needs():
    gate, x = gate_and_input(batch=256, channels=16, size=32)
    step(gate, x)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = step(gate, x)
    # The gradient of x is a view of (N, C): nothing of the size of x is written.
    assert torch.cuda.max_memory_allocated() - before < x.numel() * x.element_size() / 8
    assert grads[0].shape == x.shape


def test_compiled_operator_equals_eager():
    gate, x = gate_and_input("channel")
    eager = step(gate, x)
    moved = gate.norm.running_mean.clone()
    gate.norm.reset_running_stats()
    gate.running_open_rate.fill_(1)

    @torch.compile(fullgraph=True)
    def forward(x):
        return gate(x), gate.open_rate

    decision, rate = forward(x)
    compiled = torch.autograd.grad(
        (decision, rate), [x, *gate.parameters()], (torch.ones_like(decision), torch.ones_like(rate))
    )
    for got, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gate.norm.running_mean, moved)
    assert ops.kernels_run_on(x)


def test_streams_do_not_share_a_counter():
    """The one-launch forward on two streams at once: each stream has a counter of its own."""
    gates = [gate_and_input(batch=256)[0] for _ in range(2)]
    x = gate_and_input(batch=256)[1].detach()
    expected = [gate(x) for gate in gates]
    streams = [torch.cuda.Stream() for _ in gates]
    torch.cuda.synchronize()
    for _ in range(200):
        results = []
        for gate, stream in zip(gates, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(gate(x))
        torch.cuda.synchronize()
        assert all(torch.equal(got, want) for got, want in zip(results, expected, strict=True))
