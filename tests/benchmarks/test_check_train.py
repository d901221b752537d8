"""The stage that checks training on a device: it passes on a CPU, and finds what it is there to find."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks.gpu import check_train
from benchmarks.gpu.session import Session, commit
from benchmarks.gpu.stages import find_stage, run_cases

VERSIONS = {"torch": "2.11.0", "triton": "3.6.0", "cuda": "13.0"}


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """The stage has a process of its own, and switches what it likes there."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = torch.get_num_threads(), cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before[0])
    cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32 = before[1:]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> check_train.Bench:
    return check_train.Bench(tmp_path_factory.mktemp("check"), dry=True)


@pytest.mark.timeout(300)
def test_every_case_passes_on_a_cpu(tmp_path: Path) -> None:
    found = find_stage("check-train")
    assert found is not None
    session = Session("dry", VERSIONS, tmp_path, dry=True)
    run_cases(session, found[0](session))
    notes = {row.case: row.note for row in session.rows}
    assert not any(row.failed for row in session.rows), notes
    assert list(notes) == [
        "packages", "interrupted and resumed", "cut", "evaluation", "ledger and archives", "captured step",
        "compiled step",
    ]  # fmt: skip
    assert notes["interrupted and resumed"] == "passed: equal, bit by bit"


def test_a_resumed_run_that_lost_its_momentum_is_found(
    bench: check_train.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gatedconv.train import loop

    real = loop.restore_state

    def without_momentum(state: dict[str, Any], *rest: Any) -> Any:
        for slots in state["optimizer"]["state"].values():
            slots["momentum_buffer"].zero_()
        return real(state, *rest)

    monkeypatch.setattr(loop, "restore_state", without_momentum)
    with pytest.raises(RuntimeError, match="off by .*, where doing it twice differs by 0.0e"):
        bench.resumed()


def test_a_cut_network_that_computes_something_else_is_found(
    bench: check_train.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = check_train.compact

    def wrong(*given: Any, **options: Any) -> Any:
        net = real(*given, **options)
        next(iter(net.parameters())).data[0] *= 1.01
        return net

    monkeypatch.setattr(check_train, "compact", wrong)
    with pytest.raises(RuntimeError, match="the cut network is off by"):
        bench.cut()


def test_a_top1_that_is_not_that_of_the_saved_network_is_found(bench: check_train.Bench) -> None:
    folder = bench.straight()
    summary = folder.read_summary()
    told = summary["frozen"]["top1"]
    try:
        summary["frozen"]["top1"] = abs(told - 50.0)
        folder.write_summary(summary)
        with pytest.raises(RuntimeError, match="the run tells"):
            bench.evaluation()
    finally:
        summary["frozen"]["top1"] = told
        folder.write_summary(summary)
    assert "passed" in bench.evaluation()


def test_rows_tell_the_commit_of_a_copy_without_history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.run", mock.Mock(side_effect=OSError))
    monkeypatch.setenv("GATEDCONV_COMMIT", "0123456789abcdef")
    assert commit() == "01234567"
    monkeypatch.delenv("GATEDCONV_COMMIT")
    assert commit() == "unknown"


def test_steps_that_differ_are_found(bench: check_train.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from gatedconv.train import captured

    real = captured.learning_rate
    monkeypatch.setattr(captured, "learning_rate", lambda *given: 1.01 * real(*given))
    with pytest.raises(RuntimeError, match="off by .*, where doing it twice differs by"):
        bench.captured()
