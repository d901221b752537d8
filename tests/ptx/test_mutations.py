"""Of mistakes in the sources (mutations.py), which are noticed: `-m ptx_all`, a few minutes of one core."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil

import pytest
import torch

from tests.kernels.interpreted import test_gate
from tests.ptx import convolution, resident, test_conv, test_resident
from tests.ptx.mutations import CONV, RESIDENT, TRITON
from tests.ptx.test_barriers import noticed

SHAPES, MASKS = test_conv.SHAPES, test_conv.MASKS
# Cases in the order in which they are tried, until one fails.
CASES = [
    (SHAPES[4], MASKS[3], (1, 2)),
    (SHAPES[2], MASKS[0], (1, 4)),
    (SHAPES[1], MASKS[4], (1, 4)),
    (SHAPES[7], MASKS[1], (1, 4)),
    (SHAPES[5], MASKS[2], (2, 1)),
    (SHAPES[3], MASKS[5], (1, 1)),
    ((16, 40, 9, 3, 1, 1, 1), MASKS[1], (2, 2)),
    ((40, 24, 14, 3, 1, 1, 1), MASKS[0], (1, 4)),
    ((48, 8, 5, 5, 1, 2, 1), MASKS[4], (2, 1)),
    ((16, 72, 9, 7, 1, 3, 1), MASKS[0], (1, 8)),
]


def check_conv(form, edit):
    for seed, (shape, masks, tile) in enumerate(CASES):
        torch.manual_seed(seed)
        test_conv.check(form, shape, masks, tile, None, seed=seed, edit=edit)


def check_resident(monkeypatch, ranks, edit):
    torch.manual_seed(0)
    network = test_resident.sanitized_network()
    test_resident.check(monkeypatch, network, torch.randn(1, 3, 12, 12), torch.float16, ranks, edit=edit)


@contextlib.contextmanager
def changed_source(mutation):
    """A Triton function with another source, for every kernel that calls it."""
    import gatedconv.kernels as kernels
    from triton.runtime.jit import JITCallable, JITFunction

    found = pkgutil.iter_modules(kernels.__path__)
    modules = [importlib.import_module(f"{kernels.__name__}.{info.name}") for info in found]
    functions = {n: f for module in modules for n, f in vars(module).items() if isinstance(f, JITCallable)}
    changed = functions[mutation.file]
    before = changed.src
    assert before.count(mutation.before) == 1, f"{mutation.file}: expected one {mutation.before!r}"

    def update(source):
        changed._unsafe_update_src(source)
        for function in functions.values():
            function.hash = None
            if isinstance(function, JITFunction):
                function.device_caches.clear()

    update(before.replace(mutation.before, mutation.after))
    try:
        yield
    finally:
        update(before)


def judge(mutation, run, ledger):
    """Record whether a mutation is noticed; one that is not fails the test."""
    found = noticed(run)
    kernels = {"conv": "conv_kernel", "resident": "resident_kernel", "triton": "training kernels"}[mutation.run]
    ledger.add_mutation("one mistake in a source", kernels, f"{mutation.file.split('/')[-1]}: {mutation.name}", found)
    assert found, f"not noticed: {mutation.name}"


@pytest.mark.ptx_all
def test_the_cases_pass_without_a_mistake(monkeypatch):
    for form in ("f16", "tf32", "fp32"):
        check_conv(form, None)
    for ranks in (1, 4):
        check_resident(monkeypatch, ranks, None)


@pytest.mark.ptx_all
@pytest.mark.parametrize("mutation", CONV, ids=lambda mutation: mutation.name)
def test_convolution(mutation, ledger):
    edit = (mutation.file, mutation.before, mutation.after)
    convolution.find_kernel(mutation.which, (1, 2), 90, edit)  # it compiles: that alone finds nothing
    judge(mutation, lambda: check_conv(mutation.which, edit), ledger)


@pytest.mark.ptx_all
@pytest.mark.parametrize("mutation", RESIDENT, ids=lambda mutation: mutation.name)
def test_resident_driver(mutation, ledger, monkeypatch):
    edit = (mutation.file, mutation.before, mutation.after)
    resident.find_kernel("f16", int(mutation.which) > 1, 90, edit)
    judge(mutation, lambda: check_resident(monkeypatch, int(mutation.which), edit), ledger)


def check_triton(which, monkeypatch):
    """The cases of a set; a note of the interpreter is a failure, too."""
    from tests.ptx import test_training
    from tests.ptx.triton_device import simulated

    cases = {
        "gate": test_training.GATES,
        "batch mean": [(test_gate.test_every_estimator, ("batch_mean", 16))],
        "residual": test_training.RESIDUALS[:2],
        "scale": test_training.RESIDUALS[4:],
    }[which]
    for test, arguments in cases:
        with simulated(90) as device:
            test_training.run(test, arguments, monkeypatch)
        assert not device.notes, dict(device.notes)


@pytest.mark.ptx_all
@pytest.mark.parametrize("mutation", TRITON, ids=lambda mutation: mutation.name)
def test_training_kernels(mutation, ledger, monkeypatch):
    pytest.importorskip("triton")
    with changed_source(mutation):
        judge(mutation, lambda: check_triton(mutation.which, monkeypatch), ledger)
