"""Costs and savings of training at scale, measured: ``python -m benchmarks.scaling STAGE...``, one file each.

Stages: skipping, compile, checkpoint, collectives, kills; the results go to benchmarks/results/scaling-STAGE.json. What
is compared is timed interleaved, in one process, and given as ratios: the machine may be busy.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import gatedconv
from benchmarks.harness import RESULTS, machine_header, write_result
from gatedconv.measure.latency import Interleaved
from gatedconv.models import resnet20, resnet56
from gatedconv.report.tables import markdown_table
from gatedconv.train import TrainConfig
from gatedconv.train.checkpoint import save_checkpoint
from gatedconv.train.distributed import current, synchronized_norms
from gatedconv.train.recipe import gate_loss, gate_weights, task_loss
from gatedconv.train.step import Stepper

_ABSENT = "Not run yet."
CPU = torch.device("cpu")


def interleaved(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, Any]:
    """Seconds of two calls, round by round: their medians and minima, and the ratio of the first to the second."""
    timing = Interleaved(calls, sample_ms=0.0, warmup=1, lead_in=0, wait=False)
    for _ in range(rounds):
        timing.round()
    first, second = calls
    spreads = {name: timing.spread(name) for name in calls}
    return {
        "seconds": {name: {"median": at.median / 1e3, "least": at.least / 1e3} for name, at in spreads.items()},
        "ratio": f"{first} / {second}",
        "ratio_median": timing.ratio(first, second).median,
        "ratio_of_least": spreads[first].least / spreads[second].least,
        "rounds": rounds,
    }


def stepping(config: TrainConfig, model: torch.nn.Module, images: torch.Tensor) -> Callable[[], object]:
    """A call that makes one training step."""
    model = model.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    stepper = Stepper(model, config, CPU)
    labels = torch.arange(len(images)) % 10

    def step() -> object:
        with stepper.active():
            return stepper(images, labels, 0.5)

    return step


def skipping() -> dict[str, Any]:
    """ResNet-56, every other gate saturated closed: a training step with and without skipping their blocks."""
    images = torch.randn(32, 3, 32, 32).to(memory_format=torch.channels_last)
    config = TrainConfig(batch_size=32, lr=1e-4, gate="layer", mac_weight=1.0)
    calls, nets = {}, {}
    for name, skip in (("computed", False), ("skipped", True)):
        torch.manual_seed(0)
        nets[name] = net = resnet56(gate="layer")
        for number, gate in enumerate(gatedconv.gates(net).values()):
            torch.nn.init.constant_(gate.get_parameter("fc2.bias"), -20.0 if number % 2 else 0.5)
        calls[name] = stepping(TrainConfig(**{**vars(config), "skip_blocks": skip}), net, images)
    found = interleaved(calls, 9)
    weights = [{name: p.detach() for name, p in net.named_parameters()} for net in nets.values()]
    worst = max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0])
    return {"model": "resnet56", "batch": 32, "gates_closed": 13, "gates": 27, **found, "largest_difference": worst}


def compiled() -> dict[str, Any]:
    """ResNet-20, gates of layers and of channels: an eager against a compiled training step."""
    rows = []
    for gate, position in (("layer", "after"), ("channel", "middle")):
        images = torch.randn(32, 3, 32, 32).to(memory_format=torch.channels_last)
        calls = {}
        for name in ("eager", "compiled"):
            config = TrainConfig(batch_size=32, lr=1e-4, gate=gate, skip_blocks=False, compile=name == "compiled")
            torch.manual_seed(0)
            calls[name] = stepping(config, resnet20(gate=gate, position=position), images)
        rows.append({"model": "resnet20", "gate": gate, "position": position, "batch": 32, **interleaved(calls, 9)})
    return {"rows": rows}


def checkpoint() -> dict[str, Any]:
    """Writing a checkpoint of ResNet-56 against an epoch of CIFAR-10 (391 steps of 128), on the CPU."""
    model, images = resnet56(gate="layer"), torch.randn(128, 3, 32, 32)
    config = TrainConfig(batch_size=128, lr=1e-4, gate="layer")
    step = stepping(config, model, images.to(memory_format=torch.channels_last))
    step()
    stepper = Stepper(model, config, CPU)
    state = {name: part.state_dict() for name, part in stepper.parts.items()}
    writes, steps = [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(5):
            began = time.perf_counter()
            save_checkpoint(Path(folder) / "gated.pt", state)
            writes.append(time.perf_counter() - began)
            began = time.perf_counter()
            step()
            steps.append(time.perf_counter() - began)
        size = (Path(folder) / "gated.pt").stat().st_size
    epoch = 391 * min(steps)
    return {
        "model": "resnet56",
        "bytes": size,
        "write_s": {"median": statistics.median(writes), "most": max(writes)},
        "step_s_least": min(steps),
        "epoch_s": epoch,
        "share_of_an_epoch": max(writes) / epoch,
    }


NETWORKS = [(depth, gate) for depth in (20, 56) for gate in ("layer", "channel")]


def collectives() -> dict[str, Any]:
    """Count the messages and launches of a network's gates in a step, and time the messages of two processes."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(folder,), nprocs=2)  # type: ignore[attr-defined]
        return {"rows": json.loads((Path(folder) / "rows.json").read_text())}


def _rank(index: int, folder: str) -> None:
    torch.set_num_threads(1)
    alone = {(depth, gate): _launches(depth, gate, "off") for depth in (20, 56) for gate in (None, "layer", "channel")}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=index, world_size=2)
    rows = []
    for depth, gate in NETWORKS:
        for norms in ("off", "gates"):
            launches = {
                "launches_without_gates": alone[depth, None],
                "launches_alone": alone[depth, gate],
                "launches_together": _launches(depth, gate, norms),
            }
            rows.append({**_sent(depth, gate, norms), **launches})
    if index == 0:
        (Path(folder) / "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def _network(depth: int, gate: str | None) -> torch.nn.Module:
    torch.manual_seed(0)
    builder = resnet20 if depth == 20 else resnet56
    return builder(gate=gate, position="middle", input_size=(3, 16, 16)).train()


def _launches(depth: int, gate: str | None, norms: str) -> int:
    """Launches of a GPU for forward, losses and backward of a step, recorded from the library's calls without one."""
    from tests.kernels.recording import recorded

    model, images, labels = _network(depth, gate), torch.randn(4, 3, 16, 16), torch.zeros(4, dtype=torch.int64)
    config = TrainConfig(batch_size=8, gate=gate or "none", mac_weight=1.0 if gate else 0.0, act_weight=0.1)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        loss = task_loss(model(images), labels) + gate_loss(model, config, gate_weights(config, 0.5))[0]
        loss.backward()

    with synchronized_norms(model, norms):
        for _ in range(2):  # the first one makes what is made once
            with recorded() as recording:
                step()
    count: int = recording.count
    return count


def _sent(depth: int, gate: str, norms: str) -> dict[str, Any]:
    model = _network(depth, gate)
    config = TrainConfig(batch_size=8, lr=1e-4, gate=gate, mac_weight=1.0, act_weight=0.1, sync_norm=norms)
    stepper, sent, spent = Stepper(model, config, CPU, current()), [], [0.0]
    real = dist.all_reduce

    def counting(tensor: torch.Tensor) -> None:
        began = time.perf_counter()
        real(tensor)
        spent[0] += time.perf_counter() - began
        sent.append(tensor.numel() * tensor.element_size())

    images, labels, times = torch.randn(4, 3, 16, 16), torch.zeros(4, dtype=torch.int64), []
    with stepper.active():
        for number in range(8):
            dist.barrier()
            if number == 2:
                dist.all_reduce = counting  # type: ignore[assignment]
                sent.clear()
            began = time.perf_counter()
            stepper(images, labels, 0.5)
            times.append(time.perf_counter() - began)
    dist.all_reduce = real
    gates = gatedconv.gates(model).values()
    gradients, of_gates = (
        sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
        for modules in ([model], gates)
    )
    return {
        "model": f"resnet{depth}",
        "gate": gate,
        "sync_norm": norms,
        "gates": sum(g.num_gates for g in gates),
        "messages_per_step": len(sent) // 6,
        "bytes_per_step": sum(sent) // 6,
        "gate_gradient_bytes_per_step": of_gates,
        "gradient_bytes_per_step": gradients,
        "step_ms": 1e3 * statistics.median(times[2:]),
        "messages_ms": 1e3 * spent[0] / 6,
    }


def kills() -> dict[str, Any]:
    """Fifty runs, alternating two recipes, each killed at random until it ends, against undisturbed runs."""
    from tests.image_files import write_npz
    from tests.train.kills import RECIPES, differences, killed_round, outcome, run_in_child, small_config

    draw, rounds = random.Random(2024), []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        archive, straight = write_npz(base / "blobs.npz"), {}
        for name, changes in RECIPES.items():
            began = time.monotonic()
            run_in_child(small_config(archive, **changes), base / name)
            straight[name] = outcome(base / name), time.monotonic() - began
        for number in range(50):
            name = list(RECIPES)[number % len(RECIPES)]
            expected, seconds = straight[name]
            target = base / f"run{number}"
            calls = 80 if RECIPES[name] else 45  # of fsync and replace, about as many as such a run makes
            counts = killed_round(small_config(archive, **RECIPES[name]), target, seconds, draw, calls=calls)
            rounds.append({"recipe": name, **counts, "differences": differences(expected, outcome(target))})
    return {
        "recipes": list(RECIPES),
        "rounds": len(rounds),
        "killed_at_a_time": sum(found["at_a_time"] for found in rounds),
        "killed_in_a_write": sum(found["in_a_write"] for found in rounds),
        "rounds_with_differences": sum(bool(found["differences"]) for found in rounds),
        "rows": rounds,
    }


STAGES = {
    "skipping": skipping,
    "compile": compiled,
    "checkpoint": checkpoint,
    "collectives": collectives,
    "kills": kills,
}


_NORMS = {"off": "own", "gates": "synchronized"}


def collectives_table() -> str:
    """Messages and launches of the gates in a step, with what two processes of gloo took for the messages."""
    found = _read("collectives")
    if found is None:
        return _ABSENT
    lines = []
    for row in found["rows"]:
        own, gradients, together = _gate_bytes(row), row["gradient_bytes_per_step"], row["launches_together"]
        lines.append(
            [
                _named(row),
                _NORMS[row["sync_norm"]],
                str(row["messages_per_step"]),
                *(f"{count:,}" for count in (row["bytes_per_step"], row["gate_gradient_bytes_per_step"], gradients)),
                f"{own / (row['bytes_per_step'] + gradients):.2%}",
                f"{together - row['launches_without_gates']} of {together}",
                str(together - row["launches_alone"]),
                f"{row['messages_ms']:.2f}",
                f"{row['step_ms']:.1f}",
            ]
        )
    header = ["network", "norms of gates", "messages", "their bytes", "gradients of gates, bytes", "of all, bytes"]
    header += ["gates' share of bytes", "launches for gates", "of these, for several GPUs"]
    return markdown_table([*header, "2 processes: messages (ms)", "step (ms)"], lines)


def skipping_table() -> str:
    """A training step with half of the gates closed, with and without skipping their blocks."""
    found = _read("skipping")
    if found is None:
        return _ABSENT
    header = ["network", "gates closed", "batch", f"speed-up, median of {found['rounds']} rounds"]
    cells = [found["model"], f"{found['gates_closed']} of {found['gates']}", str(found["batch"])]
    cells += [f"{found['ratio_median']:.2f}x", f"{found['ratio_of_least']:.2f}x", f"{found['largest_difference']:.1e}"]
    return markdown_table([*header, "of the least times", "largest difference of a weight"], [cells])


def compiled_table() -> str:
    """Eager against compiled training steps on the CPU."""
    found = _read("compile")
    if found is None:
        return _ABSENT
    lines = []
    for row in found["rows"]:
        ratios = [f"{row[key]:.2f}" for key in ("ratio_median", "ratio_of_least")]
        lines.append([f"{row['model']}, {row['gate']} gates", str(row["batch"]), *ratios])
    return markdown_table(["network", "batch", "eager / compiled, median", "of the least times"], lines)


def survival() -> str:
    """Kill-and-resume rounds, and the cost of a checkpoint."""
    found, written, lines = _read("kills"), _read("checkpoint"), []
    if found is not None:
        lines.append(
            f"- {found['rounds']} runs of ResNet-20 (alternating: {'; '.join(found['recipes'])}; 48 images of 8 x 8, a "
            f"checkpoint after every step), killed {found['killed_at_a_time']} times at a random moment and "
            f"{found['killed_in_a_write']} times inside a write: {found['rounds_with_differences']} ended with any "
            "difference, to the last bit, in weights, optimizer, random numbers, metrics or summary."
        )
    if written is not None:
        lines.append(
            f"- A checkpoint of {written['model']} ({written['bytes'] / 1e6:.1f} MB) took at most "
            f"{written['write_s']['most']:.2f} s, {written['share_of_an_epoch']:.3%} of a CPU epoch of CIFAR-10."
        )
    return "\n".join(lines) or _ABSENT


SECTIONS: dict[str, Callable[[], str]] = {
    "collectives": collectives_table,
    "skipping": skipping_table,
    "compile": compiled_table,
    "survival": survival,
}
"""The parts of docs/scaling.md."""


def _named(row: dict[str, Any]) -> str:
    return f"{row['model']}, {row['gate']}"


def _gate_bytes(row: dict[str, Any]) -> int:
    """Bytes that a step sends for gates: their messages, and the gradients of their parameters."""
    total: int = row["bytes_per_step"] + row["gate_gradient_bytes_per_step"]
    return total


def _file(stage: str) -> Path:
    return RESULTS / f"scaling-{stage}.json"


def _read(stage: str) -> dict[str, Any] | None:
    path = _file(stage)
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
    return found


def main(stages: list[str]) -> None:
    """Measure some stages."""
    torch.set_num_threads(1)
    for name in stages:
        write_result(_file(name), {"machine": machine_header(1), "stage": name, **STAGES[name]()})
        print(f"written: {_file(name)}", file=sys.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="+", choices=STAGES)
    main(parser.parse_args().stages)
