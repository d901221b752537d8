"""Triton's PTX of the training kernels, executed behind the kernels' own tests, forward and backward."""

from __future__ import annotations

import inspect
import itertools
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from gatedconv import ops
from tests.kernels.interpreted import test_gate, test_gated_residual
from tests.kernels.interpreted.compare import Case, assert_close, leaf
from tests.ptx.triton_device import simulated

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def large_maps(device):
    """Maps of several tiles of positions, through the gate, the block's end and the gated scale."""
    x, shortcut, layer = test_gated_residual.draw(device, 2, 3, 24, 30)
    test_gate.check(x, *test_gate.make(device, 3, 16, 4), ops.GateOptions("ste"), None)
    test_gated_residual.check(x, shortcut, layer, None)
    results = []
    for function, exact in ((ops.gated_scale_reference, True), (ops.gated_scale, False)):
        leaves = leaf(x, exact), leaf(torch.tensor([[1.0, 0, 1], [0, 0.5, 1]]), exact)
        out = function(*leaves)
        (out * shortcut).sum().backward()
        results.append(Case({"out": out}, {"x": leaves[0].grad, "gate": leaves[1].grad}, {}))
    assert_close(results[1], results[0])


# Each kernel at least once.
GATES = [
    (test_gate.test_every_estimator, ("ste", 16)),
    (test_gate.test_every_estimator, ("gumbel", None)),
    (test_gate.test_layouts, ("channels_last", False)),
    (test_gate.test_large_maps_are_split_by_channels, ()),
    (test_gate.test_many_features_are_split, ()),
    (test_gate.test_eval_and_frozen_norm, ("batch_mean",)),
]
RESIDUALS = [
    (test_gated_residual.test_every_combination_of_gates, (True, "2fc")),
    (test_gated_residual.test_layouts_may_differ, ((True, False),)),
    (test_gated_residual.test_half_precision_maps, (torch.bfloat16,)),
    (test_gated_residual.test_gated_scale, (torch.channels_last,)),
    (large_maps, ()),
]


def run(test, arguments, monkeypatch):
    """Call a test of the kernels, on CPU tensors."""
    names = list(inspect.signature(test).parameters)
    given = {"device": CPU, "monkeypatch": monkeypatch}
    rest = iter(arguments)
    torch.manual_seed(0)
    test(**{name: given[name] if name in given else next(rest) for name in names})


def check_device(device):
    """Something ran, and nothing was noted."""
    assert device.launches
    assert not device.notes, dict(device.notes)


def kernels():
    """The kernels that are launched, by the sources."""
    text = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    return set(re.findall(r"^\s+(\w+)\[.*\]\($", text, re.M)) | set(re.findall(r"^\s+(\w+)\[\(.*?\)\]\(", text, re.M))


@pytest.mark.slow
def test_every_kernel(monkeypatch):
    launched = set()
    for test, arguments in GATES + RESIDUALS:
        with simulated(90) as device:
            run(test, arguments, monkeypatch)
        check_device(device)
        launched |= set(device.launches)
    assert launched == kernels()


@pytest.mark.slow
@pytest.mark.parametrize("capability", [75, 80])
def test_other_architectures(capability, monkeypatch):
    for test, arguments in (GATES[0], RESIDUALS[0]):
        with simulated(capability) as device:
            run(test, arguments, monkeypatch)
        check_device(device)


def variants(module):
    """Every test of a module with every set of its parameters."""
    for name, test in inspect.getmembers(module, inspect.isfunction):
        if not name.startswith("test_"):
            continue
        marks = [mark.args for mark in reversed(getattr(test, "pytestmark", [])) if mark.name == "parametrize"]
        names = [key.split(",") if isinstance(key, str) else list(key) for key, _ in marks]
        for values in itertools.product(*(choices for _, choices in marks)):
            flat = {}
            for keys, value in zip(names, values, strict=True):
                flat |= dict(zip(map(str.strip, keys), value if len(keys) > 1 else [value], strict=True))
            order = [key for key in inspect.signature(test).parameters if key in flat]
            yield pytest.param(test, tuple(flat[key] for key in order), id=f"{name}-{list(flat.values())}")


@pytest.mark.ptx_all
@pytest.mark.parametrize(("test", "arguments"), [*variants(test_gate), *variants(test_gated_residual)])
def test_all(test, arguments, monkeypatch):
    with simulated(90) as device:
        run(test, arguments, monkeypatch)
    assert not device.notes, dict(device.notes)


def test_sums_of_fused_products_are_noted(monkeypatch):
    """With fused multiply-adds, lanes that hold copies of one sum disagree and store them to one address."""
    import triton

    original = triton.runtime.jit.JITFunction.run
    monkeypatch.setattr(
        triton.runtime.jit.JITFunction,
        "run",
        lambda self, *args, **options: original(self, *args, **options | {"enable_fp_fusion": True}),
    )
    with simulated(90) as device:
        run(test_gate.test_every_estimator, ("ste", 16), monkeypatch)
    assert any("different values to one address" in note or "race" in note for note in device.notes)
