"""The operator under torch's own tools: opcheck, compile, export, ahead-of-time packages."""

import pytest
import torch
from torch import nn

import gatedconv
from gatedconv.ops.plan import plan_times
from tests.engine.nets import Residual, settle


@pytest.fixture(scope="module")
def engine():
    torch.manual_seed(2)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1), Residual(8, 8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )
    return gatedconv.Engine(settle(net), torch.zeros(2, 3, 10, 12))


def test_opcheck(engine):
    plan = engine.plans[0]
    x = torch.randn(2, 3, 10, 12)
    torch.library.opcheck(torch.ops.gatedconv.plan_run.default, (x, plan.program, plan.weights, plan.shape))

    # Two runs take different times: what is checked is the shape, not the values.
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.gatedconv.plan_times.default, (x, plan.program, plan.weights), test_utils=checks)


def test_compile(engine):
    compiled = torch.compile(engine, fullgraph=True)
    for batch in (2, 3, 7):
        x = torch.randn(batch, 3, 10, 12)
        assert torch.equal(compiled(x), engine(x))


def test_export_for_any_batch_and_size(engine):
    x = torch.randn(2, 3, 10, 12)
    dims = {0: torch.export.Dim("n", max=64), 2: torch.export.Dim("h", min=2), 3: torch.export.Dim("w", min=2)}
    program = torch.export.export(engine, (x,), dynamic_shapes={"x": dims})
    other = torch.randn(5, 3, 17, 9)
    assert torch.equal(program.module()(other), engine(other))


@pytest.mark.slow
def test_ahead_of_time_package(engine, tmp_path):
    x = torch.randn(2, 3, 10, 12)
    program = torch.export.export(engine, (x,), dynamic_shapes={"x": {0: torch.export.Dim("n", max=64)}})
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "engine.pt2"))
    package = torch._inductor.aoti_load_package(path)
    other = torch.randn(9, 3, 10, 12)
    assert torch.equal(package(other), engine(other))


def test_a_damaged_program_is_refused(engine):
    plan = engine.plans[0]
    x = torch.zeros(1, 3, 10, 12)
    for program in (plan.program[:3], plan.program[:-3], plan.program + 1):
        with pytest.raises(RuntimeError, match="plan_run"):
            torch.ops.gatedconv.plan_run.default(x, program.contiguous(), plan.weights, plan.shape)
    with pytest.raises(RuntimeError, match="range"):
        torch.ops.gatedconv.plan_run.default(x, plan.program, plan.weights[:20].contiguous(), plan.shape)


def test_what_is_no_program_is_not_read(engine):
    program, size = engine.plans[0].program, [1, 3, 10, 12]
    for bad in (program.int(), program.double(), program.repeat_interleave(2)[::2]):
        with pytest.raises(RuntimeError, match="program must be int64 and contiguous"):
            torch.ops.gatedconv.plan_workspace.default(size, bad, 1)
        with pytest.raises(RuntimeError, match="program must be int64 and contiguous"):
            torch.ops.gatedconv.plan_passing.default(size, bad)


def test_times_of_every_step_that_computes():
    net = settle(nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 1)))
    x = torch.randn(5, 3, 9, 9)
    plan = gatedconv.Engine(net, x).plans[0]
    for threads in (1, 2):
        times = plan_times(x, plan.program, plan.weights, threads)
        assert times.dtype == torch.float64 and times.shape == (len([s for s in plan.steps if s.op != "view"]),)
        assert bool((times > 0).all())
