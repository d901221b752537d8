"""The step that a GPU replays as one CUDA graph, run op by op on the CPU: the same numbers, and nothing that waits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gatedconv.gating import find_gates, pruner
from gatedconv.models.resnet import ResNet
from gatedconv.train import RunFolder, TrainConfig, cuda_graph_step, run
from gatedconv.train.cuda_graph_step import CudaGraphStepper, make_stepper, require_graphs
from gatedconv.train.device import mixed_dtype, tuned_convolutions
from gatedconv.train.distributed import Ranks
from gatedconv.train.metrics import EpochMeter
from gatedconv.train.presets import preset_settings
from gatedconv.train.step import Stepper
from tests.train.steps import make_steps

CPU = torch.device("cpu")
CONFIG = TrainConfig(epochs=4, batch_size=8, lr=0.05, gate="layer", warmup_epochs=1.0, device="cpu", skip_blocks=False)
CASES: dict[str, dict[str, Any]] = {
    "rank": {"gate": "channel", "position": "middle", "mac_control": "rank", "mac_ramp": (0.0, 0.6)},
    "price": {"gate": "both", "position": "middle", "mac_control": "price", "mac_ramp": (0.2, 0.6)},
    "weights": {"act_weight": 0.1, "mac_weight": 1.0, "gate_warmup": 0.5, "polar_schedule": "warmup"},
    "rising": {"gate": "channel", "position": "after", "pool": "flatten", "grad_clip": 1.0},
    "noise": {"gate": "both", "estimator": "gumbel", "label_smoothing": 0.1},
    "dense": {"gate": "none", "schedule": "staged", "momentum": 0.0, "nesterov": False},
    "bf16": {"amp": "bf16", "channels_last": True},
    "fp16": {"amp": "fp16"},
    "parts": {"gate": "channel", "position": "middle", "accumulate": 2, "mac_control": "rank", "mac_ramp": (0.0, 0.6)},
    "taught": {"teacher_at": 0.0},
}


class Operations(TorchDispatchMode):
    """Fails where an operation waits for what a device has computed, or copies from the host's own memory to it."""

    NAMES = frozenset(
        {
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "is_nonzero",
            "equal",
            "_unique2",
            "unique_dim",
            "bincount",
            "lift_fresh",
            "lift",
            "_pin_memory",
            "repeat_interleave",
        }
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.NAMES, f"{func} waits"
        indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        assert not any(index is not None and index.dtype == torch.bool for index in indices), f"{func} counts"
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    """The same of what no operation shows while all is on the CPU."""

    NAMES = frozenset({"tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__"})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        assert name not in self.NAMES, f"{name} waits"
        return func(*args, **(kwargs or {}))


@contextmanager
def no_wait() -> Iterator[None]:
    """Where the host would wait for a device, which ends the capture of a CUDA graph, there is an AssertionError."""
    with Functions(), Operations():
        yield


def network(config: TrainConfig) -> ResNet:
    torch.manual_seed(2)
    gate = None if config.gate == "none" else config.gate
    net = ResNet(8, 3, gate, config.position, estimator=config.estimator, pool=config.pool, input_size=(1, 8, 8))
    return net.train()


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(step)
    return torch.randn(8, 1, 8, 8, generator=draw), torch.arange(8) % 3, torch.randn(8, 3, generator=draw)


def trained(kind: type[Stepper], config: TrainConfig, *, steps: int = 8, **options: Any) -> tuple[Stepper, EpochMeter]:
    model = network(config)
    torch.manual_seed(3)
    given = (batch(step) for step in range(steps))
    batches = [
        (images, labels, taught if config.teacher_at < 1 else None, step / 2)
        for step, (images, labels, taught) in enumerate(given)
    ]
    return make_steps(kind, model, config, batches, evaluation=4, broken=5, **options)


def numbers(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.double().tolist()
    if isinstance(state, dict):
        return {key: numbers(value) for key, value in state.items()}
    return [numbers(value) for value in state] if isinstance(state, list) else state


@pytest.mark.parametrize("name", CASES)
def test_the_captured_function_makes_the_steps_of_the_plain_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruner, "EVERY", 2)
    config = dataclasses.replace(CONFIG, **CASES[name])
    (plain, expected), (other, found) = (trained(Stepper, config), trained(CudaGraphStepper, config, capture=False))
    assert int(plain.guard.skipped) == 1 and plain.macs.executed == other.macs.executed > 0
    assert plain.parts.keys() == other.parts.keys()
    for part in plain.parts:
        left, right = (numbers(stepper.parts[part].state_dict()) for stepper in (plain, other))
        assert left == right, part
    assert numbers(plain.guard.state_dict()) == numbers(other.guard.state_dict())
    assert torch.equal(expected._sums, found._sums) and int(found._sums[0]) == 7
    if plain.pruner is not None:
        assert bool(plain.pruner.pruned.any())


@pytest.mark.parametrize("name", CASES)
def test_nothing_in_it_waits_for_the_device(name: str) -> None:
    config = dataclasses.replace(CONFIG, **CASES[name])
    stepper, _ = trained(CudaGraphStepper, config, steps=4, capture=False)
    assert isinstance(stepper, CudaGraphStepper)
    with stepper.active(), no_wait():
        stepper._step()


@pytest.mark.parametrize(
    "wait",
    [
        lambda t: t.sum().item(),
        lambda t: t[t > 0],
        lambda t: t.new_tensor([1.0]),
        lambda t: t.tolist(),
        bool,
        lambda t: torch.tensor(1.0),
        lambda t: t.nonzero(),
        lambda t: float(t),
        lambda t: t.cpu(),
    ],
)
def test_the_trap_sees_what_waits(wait: Any) -> None:
    with pytest.raises(AssertionError, match="waits|counts"), no_wait():
        wait(torch.ones(1))


def test_it_reads_its_inputs_where_they_were_first() -> None:
    """Addresses of inputs, weights and metrics stay, and so do numbers in the optimizer's groups."""
    stepper, meter = trained(CudaGraphStepper, dataclasses.replace(CONFIG, mac_weight=1.0), capture=False)
    assert isinstance(stepper, CudaGraphStepper)

    def places() -> list[int]:
        tensors = [*stepper._inputs, *stepper.model.state_dict().values(), meter._sums, stepper.guard.skipped]
        momenta = [state["momentum_buffer"] for state in stepper.optimizer.state.values()]
        return [tensor.data_ptr() for tensor in [*tensors, *momenta]]

    before = places()
    meter.new_epoch()
    stepper(*batch(9)[:2], 3.9)
    assert places() == before
    assert all(type(group["lr"]) is float for group in stepper.optimizer.param_groups)
    assert stepper._rates[0].value.item() == pytest.approx(stepper.optimizer.param_groups[0]["lr"])


def test_another_shape_and_the_beginning_of_a_price_are_other_steps() -> None:
    config = dataclasses.replace(CONFIG, mac_control="price", mac_ramp=(0.5, 0.75))
    stepper = CudaGraphStepper(network(config), config, CPU, capture=False)
    images, labels, _ = batch(0)
    kinds = []
    for size, epoch in ((8, 0.0), (8, 1.0), (8, 2.0), (8, 3.0), (6, 3.0)):
        stepper(images[:size], labels[:size], epoch)
        kinds.append(stepper._kind)
    assert [kinds[i] == kinds[i + 1] for i in range(4)] == [True, False, True, False]


def test_what_gates_show_is_given_back_to_them_after_another_pass() -> None:
    from gatedconv.train.cuda_graph_step import _Replay

    model = network(CONFIG)
    model(batch(0)[0])
    shown = [(gate.logits, gate.open_rate) for gate in find_gates(model).values()]

    class Graph:
        replays = 0

        def replay(self) -> None:
            self.replays += 1

    graph, result = Graph(), object()
    replay = _Replay(graph, result, model)  # type: ignore[arg-type]
    model.eval()(batch(1)[0])
    assert all(gate.logits is not shown[0][0] for gate in find_gates(model).values())
    assert replay() is result and graph.replays == 1  # type: ignore[comparison-overlap]
    for gate, (logits, rate) in zip(find_gates(model).values(), shown, strict=True):
        assert gate.logits is logits and gate.open_rate is rate


def test_a_run_without_a_gpu_is_refused_before_it_claims_a_folder(
    tmp_path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = TrainConfig(data=f"npz:{archive}", batch_size=16, cuda_graph=True)
    with pytest.raises(ValueError, match="cuda_graph: expected a GPU, got device 'cpu'"):
        run(config, RunFolder(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_it_requires_a_gpu_and_one_process() -> None:
    config = dataclasses.replace(CONFIG, device="auto", cuda_graph=True)
    with pytest.raises(ValueError, match="cuda_graph: expected a GPU, got device 'cpu'"):
        make_stepper(network(CONFIG), config, CPU)
    with pytest.raises(ValueError, match="cuda_graph: expected one process, got 2"):
        require_graphs(torch.device("cuda"), Ranks(0, 2))
    require_graphs(torch.device("cuda"))
    assert type(make_stepper(network(CONFIG), CONFIG, CPU)) is Stepper


def test_auto_is_bf16_where_a_gpu_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, expected in (((7, 5), None), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert mixed_dtype("auto", torch.device("cuda")) is expected
    assert preset_settings("best-c10-r56")["amp"] == "auto"


def test_convolutions_are_tuned_where_their_precision_is_set_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch then refuses to return `allow_tf32`, for lack of one answer for all kinds of operators."""
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)  # tests ask for them
    cudnn = torch.backends.cudnn
    with cudnn.flags(enabled=True, benchmark=False, deterministic=False):
        before = cudnn.conv.fp32_precision
        try:
            cudnn.conv.fp32_precision = "ieee" if cudnn.rnn.fp32_precision == "tf32" else "tf32"
            with pytest.raises(RuntimeError):
                assert cudnn.allow_tf32
            with tuned_convolutions(torch.device("cuda")):
                assert cudnn.benchmark
            assert not cudnn.benchmark
        finally:
            cudnn.conv.fp32_precision = before


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("device", "fixed", "during"), [("cuda", False, True), ("cuda", True, False), ("cpu", False, False)]
)
def test_convolutions_are_tuned_in_steps_alone(
    device: str, fixed: bool, during: bool, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a program has frozen the flags that stay, as PyTorch's own test support does when it is imported."""
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)  # tests ask for them
    cudnn = torch.backends.cudnn
    with cudnn.flags(enabled=True, deterministic=fixed, fp32_precision="ieee"):
        monkeypatch.setitem(torch.backends.flags_frozen.__globals__, "__allow_nonbracketed_mutation_flag", not frozen)
        assert torch.backends.flags_frozen() is frozen
        with tuned_convolutions(torch.device(device)):
            assert cudnn.benchmark is during
            assert (cudnn.enabled, cudnn.deterministic, cudnn.fp32_precision) == (True, fixed, "ieee")
        assert cudnn.benchmark is False
        with pytest.raises(KeyError), tuned_convolutions(torch.device(device)):
            raise KeyError
        assert (cudnn.benchmark, cudnn.fp32_precision) == (False, "ieee")


def split(count: int) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    images, labels = torch.randn(count, 1, 8, 8, generator=draw), torch.arange(count) % 3
    return list(zip(images.split(4), labels.split(4), strict=True))


def test_a_step_that_cannot_be_captured_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(call: Any, *_: Any, retries: int = 1) -> Any:
        raise RuntimeError("not permitted when stream is capturing\nSearch for it")

    monkeypatch.setattr(cuda_graph_step, "capture", refuse)
    model = network(dataclasses.replace(CONFIG, gate="channel"))
    with pytest.raises(ValueError, match=r"cannot be captured; train without it \(not permitted when"):
        CudaGraphStepper(model, CONFIG, CPU, capture=False)._captured()


class Recorded:
    """A CUDA graph on the CPU: capturing changes nothing, a replay writes into the tensors of the capture."""

    replays = 0

    def __init__(self, call: Any, stepper: Stepper, meter: EpochMeter) -> None:
        self.call, self.stepper = call, stepper
        kept = [(tensor, tensor.clone()) for tensor in self.tensors(meter)]
        noise = torch.get_rng_state()
        self.result = call()
        with torch.no_grad():
            for tensor, before in kept:
                tensor.copy_(before)
        torch.set_rng_state(noise)
        self.shown = [(gate, gate.logits, gate.open_rate) for gate in find_gates(stepper.model).values()]

    def tensors(self, meter: EpochMeter) -> Iterator[Tensor]:
        for name, part in self.stepper.parts.items():
            if name not in ("optimizer", "scaler"):
                yield from (value for value in part.state_dict(keep_vars=True).values() if isinstance(value, Tensor))
        for state in self.stepper.optimizer.state.values():
            yield state["momentum_buffer"]
        yield from self.stepper.guard.state_dict().values()
        yield meter._sums

    def replay(self) -> None:
        Recorded.replays += 1
        counted = self.stepper.macs.executed
        found = self.call()
        self.stepper.macs.executed = counted
        with torch.no_grad():
            for mine, new in zip(self.result, found, strict=True):
                mine.copy_(new)
            for gate, logits, rate in self.shown:
                logits.data.copy_(gate.logits)
                rate.data.copy_(gate.open_rate)
                gate.logits, gate.open_rate = logits, rate


@pytest.mark.parametrize("name", ["rank", "price", "weights", "noise"])
def test_replays_make_the_steps_of_the_plain_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is written on the host around a capture; the graph is one of the CPU."""
    monkeypatch.setattr(pruner, "EVERY", 2)
    monkeypatch.setattr(Recorded, "replays", 0)
    meters: list[EpochMeter] = []
    monkeypatch.setattr(EpochMeter, "__init__", _remembering(EpochMeter.__init__, meters))

    class Replaying(CudaGraphStepper):
        def __init__(self, *given: Any, **options: Any) -> None:
            super().__init__(*given, capture=False, **options)
            self._capture = True

        def _step_on_stream(self) -> Any:
            return self._step()

    def capture(call: Any, *_: Any, retries: int = 1) -> Any:
        graph = Recorded(call, call.__self__, meters[-1])
        return graph, graph.result

    monkeypatch.setattr(cuda_graph_step, "capture", capture)
    config = dataclasses.replace(CONFIG, **CASES[name])
    (plain, expected), (other, found) = trained(Stepper, config), trained(Replaying, config)
    # The price begins in the third step, and takes a graph of its own.
    assert Recorded.replays == 8 - cuda_graph_step.WARM_UP - (2 if name == "price" else 0)
    assert plain.macs.executed == other.macs.executed and torch.equal(expected._sums, found._sums)
    for part in plain.parts:
        left, right = (numbers(stepper.parts[part].state_dict()) for stepper in (plain, other))
        assert left == right, part


def _remembering(make: Any, made: list[EpochMeter]) -> Any:
    def init(self: EpochMeter, *given: Any, **options: Any) -> None:
        make(self, *given, **options)
        made.append(self)

    return init
