"""Leaving out one barrier or one wait must be noticed: what shows that the checks see what they should."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.ptx import convolution, resident, test_conv, test_resident
from tests.ptx.machine import Machine
from tests.ptx.memory import Fault
from tests.ptx.parser import Kernel

SHAPE, MASKS = (40, 24, 7, 3, 1, 1, 1), ("batch", None, False, True)


def sites(kernel: Kernel, machine: Machine) -> list[tuple[str, Kernel]]:
    """The kernel without each barrier or wait that ran: (which, changed kernel)."""
    found = []
    for at, one in enumerate(kernel.instructions):
        if not machine.covered[at]:
            continue
        left_out = [at]
        if one.opcode.startswith("barrier.cluster.wait"):
            left_out.append(max(i for i in range(at) if kernel.instructions[i].opcode.startswith("barrier.cluster.a")))
        elif not one.opcode.startswith(("bar.sync", "barrier.sync", "cp.async.wait")):
            continue
        found.append((f"{at}: {one.text}", kernel.without(*left_out)))
    return found


def noticed(run) -> str:
    """What a run is noticed by, "" if by nothing."""
    try:
        run()
    except Fault as error:
        return f"fault: {error}"[:60]
    except AssertionError as error:
        return f"check: {error}"[:60]
    return ""


def leave_out(kernel, machine, run, limit=None):
    """Run without each site; returns those that were not noticed."""
    missed = []
    for text, changed in sites(kernel, machine)[:limit]:
        found = next((by for seed in (1, 2) if (by := noticed(lambda c=changed, s=seed: run(c, s)))), "")
        missed += [] if found else [text]
    return missed


@pytest.mark.slow
def test_convolution():
    kernel = convolution.find_kernel("f16", (1, 2), 90)

    def run(changed, seed):
        test_conv.check("f16", SHAPE, MASKS, (1, 2), kernel=changed, seed=seed)

    weight = torch.randn(24, 40, 3, 3).half()
    x = torch.randn(3, 40, 7, 7).half().contiguous(memory_format=torch.channels_last)
    _, machine = convolution.run("f16", x, weight, padding=1, tile=(1, 2), kernel=kernel)
    run(kernel, 0)
    assert len(sites(kernel, machine)) >= 3
    assert not leave_out(kernel, machine, run)


def driver_run(monkeypatch, ranks):
    def run(kernel, seed):
        torch.manual_seed(0)
        return test_resident.check(
            monkeypatch,
            test_resident.sanitized_network(),
            torch.randn(1, 3, 12, 12),
            torch.float16,
            ranks,
            kernel=kernel,
            seed=seed,
        )

    return run


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 4])
def test_resident_driver(ranks, monkeypatch):
    kernel, run = resident.find_kernel("f16", ranks > 1), driver_run(monkeypatch, ranks)
    (machine,) = run(kernel, 0).machines
    assert len(sites(kernel, machine)) >= 5
    assert not leave_out(kernel, machine, run, limit=3 if ranks > 1 else None)


@pytest.mark.ptx_all
def test_cluster(monkeypatch):
    kernel, run = resident.find_kernel("f16", True), driver_run(monkeypatch, 4)
    (machine,) = run(kernel, 0).machines
    assert not leave_out(kernel, machine, run)


@pytest.mark.slow
def test_training_kernels(monkeypatch):
    """Barriers of each kernel are left out in turn, from the middle outwards, until one is missed; some are spare."""
    pytest.importorskip("triton")
    from tests.ptx import test_training
    from tests.ptx.triton_device import _kernels, simulated

    for test, arguments in (test_training.GATES[0], test_training.RESIDUALS[0]):
        run = functools.partial(test_training.run, test, arguments, monkeypatch)
        with simulated(90) as device:
            run()
        for name, key in sorted(device.variants):
            count = len(_sites(_kernels[key]))
            by = ""
            for which in sorted(range(count), key=lambda at, middle=count // 2: abs(at - middle)):
                with simulated(90) as changed:
                    changed.edit = functools.partial(_without, name, which)
                    by = noticed(run) or next(iter(changed.notes), "")
                if by:
                    break
            assert by or not count, f"{name}: none of {count} barriers is missed"


def _sites(kernel: Kernel) -> list[int]:
    names = ("bar.sync", "barrier.sync")
    return [at for at, one in enumerate(kernel.instructions) if one.opcode.startswith(names)]


def _without(name: str, which: int, launched: str, kernel: Kernel) -> Kernel | None:
    at = _sites(kernel)
    return kernel.without(at[which]) if launched == name and which < len(at) else None
