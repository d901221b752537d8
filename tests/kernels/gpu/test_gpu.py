"""What only a GPU can show: launches, graphs, mixed precision, many repeats, the compiled operator."""

from __future__ import annotations

import copy

import pytest
import torch

import gatedconv
from benchmarks.harness import Machine
from gatedconv import ops
from tests.tolerances import assert_close

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


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


@pytest.mark.parametrize("estimator", ops.ESTIMATORS)
@pytest.mark.parametrize("hidden", [16, None])
@pytest.mark.parametrize("kind", ["layer", "channel", "flatten"])
def test_a_gate_takes_two_launches_forward_and_two_backward(kind, hidden, estimator):
    options = {"hidden": hidden, "estimator": estimator}
    if kind == "flatten":
        options |= {"pool": "flatten", "feature_size": 64}
    gate = (gatedconv.LayerGate if kind == "layer" else gatedconv.ChannelGate)(16, **options).cuda().train()
    x = torch.randn(256, 16, 8, 8, device="cuda", requires_grad=True)
    decision = gate(x)
    incoming = (torch.randn_like(decision), torch.randn_like(gate.open_rate))

    def one_step():
        decision = gate(x)
        torch.autograd.grad((decision, gate.open_rate), [x, *gate.parameters()], incoming)

    noise = estimator in ("gumbel", "bernoulli")  # drawn by PyTorch
    assert Machine().count_launches(one_step) == 4 + noise


@pytest.mark.parametrize("kind", ["layer", "channel"])
def test_ten_thousand_repeats_are_equal_bit_for_bit(kind):
    gate, x = gate_and_input(kind, batch=64)
    first = step(gate, x)
    differ = torch.zeros((), device="cuda")
    for _ in range(10_000):
        for got, expected in zip(step(gate, x), first, strict=True):
            differ += (got != expected).any()
    assert differ.item() == 0


def test_ten_thousand_block_ends_are_equal_bit_for_bit():
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, device="cuda").requires_grad_()  # noqa: E731
    leaves = [draw(64, 16, 8, 8), draw(64, 16, 8, 8), torch.ones(64, 1, device="cuda").requires_grad_(), draw(16)]
    gate = gatedconv.ChannelGate(16).cuda().train()
    bias, mean, var, batches = draw(16), torch.zeros(16).cuda(), torch.ones(16).cuda(), torch.tensor(0).cuda()
    weights = [torch.randn(64, 16, 8, 8, device="cuda"), torch.randn(64, 16, device="cuda")]

    def one_step():
        x, shortcut, layer, weight = leaves
        norm = ops.NormArguments(weight, bias, mean, var, batches)
        out = ops.gated_residual(x, shortcut, norm, layer, ops.InnerGate(*gate.arguments(64, x.dtype)))
        return [out.out, *torch.autograd.grad((out.out, out.pooled), [*leaves, *gate.parameters()], weights)]

    first = one_step()
    differ = torch.zeros((), device="cuda")
    for _ in range(10_000):
        for got, expected in zip(one_step(), first, strict=True):
            differ += (got != expected).any()
    assert differ.item() == 0


@pytest.mark.parametrize("estimator", ["ste", "batch_mean"])
@pytest.mark.parametrize("gate", ["layer", "channel", "both"])
def test_a_training_step_can_be_captured_and_replayed(gate, estimator):
    """A replayed graph moves weights and buffers exactly as eager steps do, one of them before the capture."""
    torch.backends.cudnn.deterministic = True
    eager, replayed = (trained(gate, estimator, graph) for graph in (False, True))
    for name, value in eager.items():
        assert_close(replayed[name], value, name=name)


def trained(gate, estimator, graph):
    """State of a small network after nine steps, the first of them eager and on the default stream."""
    torch.manual_seed(0)
    model = gatedconv.models.ResNet(8, 3, gate, input_size=(3, 8, 8), estimator=estimator).cuda().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, labels = torch.randn(8, 3, 8, 8, device="cuda"), torch.arange(8, device="cuda") % 3

    def train():
        loss = torch.nn.functional.cross_entropy(model(x), labels)
        loss = loss + gatedconv.polarization_loss(model) + gatedconv.mac_target_loss(model)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    train()
    run = Machine().captured(train) if graph else train
    for _ in range(5 if graph else 8):  # capturing runs three steps first
        run()
    torch.cuda.synchronize()
    return model.state_dict()


def test_noise_of_a_replayed_graph_is_fresh_every_time():
    gate = gatedconv.ChannelGate(8, estimator="bernoulli").cuda().train()
    x = torch.randn(64, 8, 4, 4, device="cuda")
    run = Machine().captured(lambda: gate(x).detach())
    first, second = run().clone(), run().clone()
    assert not torch.equal(first, second) and 0 < first.mean() < 1


def test_a_captured_step_in_mixed_precision_with_a_scaler():
    """The scaler finds nothing infinite, and what is replayed is what eager steps do."""
    states = []
    for graph in (False, True):
        torch.manual_seed(0)
        model = gatedconv.models.ResNet(8, 3, "both", input_size=(3, 8, 8)).cuda().train()
        x, labels = torch.randn(8, 3, 8, 8, device="cuda"), torch.arange(8, device="cuda") % 3
        scaler = torch.amp.GradScaler("cuda", init_scale=256.0)

        def backward(model=model, x=x, labels=labels, scaler=scaler):
            with torch.autocast("cuda", torch.float16):
                loss = torch.nn.functional.cross_entropy(model(x).float(), labels)
            for parameter in model.parameters():
                parameter.grad = None
            scaler.scale(loss + gatedconv.polarization_loss(model)).backward()
            return [parameter.grad for parameter in model.parameters()]

        run = Machine().captured(backward) if graph else backward
        grads = [grad.clone() for grad in run()]
        assert all(grad.isfinite().all() for grad in grads)
        states.append(grads)
    # Gradients of the scaled loss; those that cancel are still of terms of a few hundredths of the scale.
    assert_close(states[1], states[0], dtype=torch.float16, algorithm="training", scale=0.02 * 256.0)


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


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_operator_equals_eager(mode):
    """Graphs of the compiler's own included: five steps of each, on other inputs every time."""
    gate, x = gate_and_input("channel")
    inputs = [torch.randn_like(x).requires_grad_() for _ in range(5)]
    state = {name: value.clone() for name, value in gate.state_dict().items()}
    eager = [[grad.clone() for grad in step(gate, x)] for x in inputs]
    moved = gate.norm.running_mean.clone()
    gate.load_state_dict(state)

    @torch.compile(fullgraph=True, mode=mode)
    def forward(x):
        return gate(x), gate.open_rate

    for x, expected in zip(inputs, eager, strict=True):
        torch.compiler.cudagraph_mark_step_begin()
        decision, rate = forward(x)
        ones = (torch.ones_like(decision), torch.ones_like(rate))
        grads = torch.autograd.grad((decision, rate), [x, *gate.parameters()], ones)
        for got, want in zip(grads, expected, strict=True):
            torch.testing.assert_close(got, want)
    torch.testing.assert_close(gate.norm.running_mean, moved)


def test_a_compiled_network_equals_an_eager_one():
    torch.manual_seed(0)
    model = gatedconv.models.ResNet(8, 3, "both", input_size=(3, 8, 8)).cuda().train()
    other = copy.deepcopy(model)
    compiled, x = torch.compile(other), torch.randn(8, 3, 8, 8, device="cuda")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for _ in range(3):
            outs = model(x), compiled(x)
        assert_close(*outs, algorithm="gradient")
    for out, net in zip(outs, (model, other), strict=True):
        (out.sum() + gatedconv.polarization_loss(net)).backward()
    found, expected = ([parameter.grad for parameter in net.parameters()] for net in (other, model))
    assert_close(found, expected, algorithm="training", scale=1.0)


def test_gates_run_on_several_streams_at_once():
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
