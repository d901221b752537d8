"""The experiment table: in which order it is run, skipped when done, resumed when interrupted, refused when damaged."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gatedconv.measure.energy import SHARED
from gatedconv.train.build import build_model, load_images
from gatedconv.train.config import TrainConfig
from gatedconv.train.device import computes_in_bf16
from reproduce import runner
from reproduce.__main__ import main
from reproduce.experiments import all_experiments
from reproduce.ledger import read_ledger
from reproduce.paper_presets import paper_settings
from reproduce.workplace import Workplace
from tests.image_files import blobs, write_npz

EXPERIMENTS = all_experiments()


@pytest.mark.parametrize("name", sorted({each.preset for each in EXPERIMENTS.values()}))
def test_every_row_has_a_config_and_a_network_at_its_own_depth(name: str, tmp_path: Path) -> None:
    images, labels = blobs(6, side=32)  # as large as CIFAR's: `cifar_vgg` takes no smaller ones
    arrays = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}
    archive, built = write_npz(tmp_path / "blobs.npz", **arrays), set()
    data = load_images(TrainConfig(data=f"npz:{archive}"))
    for each in EXPERIMENTS.values():
        if each.preset == name:
            config = TrainConfig(**{**paper_settings(name), **each.settings})
            key = (config.gate, config.position, config.estimator, config.hidden)
            if key not in built:
                built.add(key)
                assert build_model(config, data).config["name"] == config.model


def test_what_is_done_is_skipped_and_what_was_interrupted_resumes(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "cpu-r20-c10"
    late = replace(workplace, deadline=0.0)
    assert runner.run_experiments(late, [(name, 0)], 1) == runner.TIME_LIMIT
    assert read_ledger(workplace.ledger) == {}
    real = runner.experiment_config

    def short(*arguments: Any) -> TrainConfig:
        return replace(real(*arguments), max_minutes=1e-9)

    monkeypatch.setattr(runner, "experiment_config", short)
    assert runner.run_experiments(workplace, [(name, 0)], 1) == runner.TIME_LIMIT
    monkeypatch.setattr(runner, "experiment_config", real)
    assert runner.run_experiments(workplace, [(name, 0)], 1) == runner.DONE
    before = workplace.ledger.read_bytes()
    capsys.readouterr()
    assert runner.run_experiments(workplace, [(name, 0)], 1) == runner.DONE
    assert "done already" in capsys.readouterr().out and workplace.ledger.read_bytes() == before
    # A row that was lost is made again from the finished run, without training.
    workplace.ledger.unlink()
    monkeypatch.setattr("gatedconv.train.trainer.run", None)
    assert runner.run_experiments(workplace, [(name, 0)], 1) == runner.DONE
    assert workplace.ledger.read_bytes() == before


def test_a_finished_run_of_another_recipe_is_refused(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "cpu-r20-c10-dense"
    assert runner.run_experiments(workplace, [(name, 0)], 1) == runner.DONE
    workplace.ledger.unlink()
    moved = workplace.folder(name, 0).read_config().data.replace("blobs.npz", "elsewhere/blobs.npz")
    elsewhere = replace(workplace, sources={key: moved for key in workplace.sources})
    assert runner.run_experiments(elsewhere, [(name, 0)], 1) == runner.DONE  # the same images: their name is the same
    workplace.ledger.unlink()
    real = runner.experiment_config
    monkeypatch.setattr(runner, "experiment_config", lambda *given: replace(real(*given), lr=0.07))
    told = "config.toml: a finished run, but not of cpu-r20-c10-dense as it is now.*: expected lr 0.07, found 0.05"
    with pytest.raises(ValueError, match=told):
        runner.run_one(workplace, name, 0)
    assert read_ledger(workplace.ledger) == {}


def test_machine_options_reach_the_training_and_its_processes(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, started = "cpu-r20-c10-dense", []
    assert runner.run_one(replace(workplace, amp="bf16"), name, 0) == runner.DONE
    assert read_ledger(workplace.ledger)[name, 0].amp == workplace.folder(name, 0).read_config().amp == "bf16"
    assert runner.run_one(workplace, name, 1) == runner.DONE and read_ledger(workplace.ledger)[name, 1].amp == "off"
    assert runner.run_one(replace(workplace, amp="auto"), name, 3) == runner.DONE
    chosen = "bf16" if computes_in_bf16(torch.device("cpu")) else "off"
    assert (
        workplace.folder(name, 3).read_config().amp == "auto" and read_ledger(workplace.ledger)[name, 3].amp == chosen
    )
    graphs = replace(workplace, cuda_graph=True, device="cuda", amp="off")
    experiment = EXPERIMENTS["headline-r56-c10"]
    config = runner.experiment_config(graphs, experiment, 0, {})
    assert config.cuda_graph and config.amp == "off"
    assert not runner.experiment_config(workplace, experiment, 0, {}).cuda_graph
    assert runner.experiment_config(workplace, experiment, 0, {}).amp == "auto"
    with pytest.raises(ValueError, match="cuda_graph: expected a GPU, got device 'cpu'"):
        runner.run_one(replace(workplace, cuda_graph=True), name, 2)
    monkeypatch.setattr(runner.subprocess, "Popen", lambda command, **_: started.extend(command))
    runner._start(graphs, (name, 0))
    assert started[started.index("--amp") + 1] == "off" and "--cuda-graph" in started
    workplaces: list[Workplace] = []
    monkeypatch.setattr(
        "reproduce.__main__.run_experiments", lambda workplace, keys, jobs: workplaces.append(workplace) or 0
    )
    assert main(started[started.index("run") :]) == 0
    assert (workplaces[0].amp, workplaces[0].cuda_graph, workplaces[0].device) == ("off", True, "cuda")


def test_a_control_without_its_run_is_refused_by_name(workplace: Workplace) -> None:
    with pytest.raises(ValueError, match="cpu-r20-c10-fixed-at-init: is derived from cpu-r20-c10, seed 0, which"):
        runner.run_one(workplace, "cpu-r20-c10-fixed-at-init", 0)


def test_what_a_run_is_made_from_is_run_first() -> None:
    keys = [("table4-c10-r110-layer-fixed-at-init", 1), ("figure2-c10-r56-naive-layers-20", 2)]
    queue = runner._plan(keys, {}, runner.Failures())
    assert queue == [
        ("table4-c10-r110-layer", 1),
        ("table4-c10-r110-layer-fixed-at-init", 1),
        ("table1-c10-r56-dense", 2),
        ("figure2-c10-r56-naive-layers-20", 2),
    ]


def test_patterns_choose_rows_in_the_order_of_the_table() -> None:
    assert [name for name, _ in runner.select(["table6-*", "headline-r56-c10"], [1])][:2] == [
        "headline-r56-c10",
        "table6-c10-r110-lambda-0",
    ]
    assert runner.select(["headline-r56-c10"], None) == [("headline-r56-c10", seed) for seed in range(5)]


def test_a_seed_is_run_once_by_those_that_have_it() -> None:
    assert runner.select(["headline-r56-c10", "headline-*c10"], [3, 0, 3]).count(("headline-r56-c10", 3)) == 1
    fourth = runner.select(["*"], [3])
    assert {name for name, _ in fourth} == {name for name, each in EXPERIMENTS.items() if 3 in each.seeds}
    with pytest.raises(ValueError, match="seed: table6-c10-r110-lambda-0 has the seeds 0, 1, 2, got 3"):
        runner.select(["table6-c10-r110-lambda-0"], [3])


def test_a_table_gets_seed_after_seed_with_its_controls_and_the_swapped_reading_last() -> None:
    found = runner.select(["*"], None)
    assert len(found) == len(set(found)) == sum(len(each.seeds) for each in EXPERIMENTS.values())
    assert found[:6] == [
        ("headline-r56-c10-dense", 0),
        ("headline-r56-c10", 0),
        ("headline-r56-c10-equal-macs", 0),
        ("headline-r56-c10-fixed-at-init", 0),
        ("headline-r56-c10-fixed-at-init-taught", 0),
        ("headline-r56-c10-dense", 1),
    ]
    groups = [EXPERIMENTS[name].shown[0] for name, _ in found]
    assert list(dict.fromkeys(groups))[:7] == ["headline", "table4", "table1", "cifar100", "table6", "table3", "table5"]
    assert sum(before != after for before, after in zip(groups, groups[1:], strict=False)) == len(set(groups)) - 1
    table4 = [key for key, group in zip(found, groups, strict=True) if group == "table4"]
    assert [name.endswith("-swapped") for name, _ in table4] == [False] * 42 + [True] * 42
    assert [seed for _, seed in table4] == 2 * [*[0] * 14, *[1] * 14, *[2] * 14]
    for name, seed in found:
        needs = EXPERIMENTS[name].needs
        assert not needs or found.index((needs, seed)) < found.index((name, seed))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "run: expected names of experiments, or --plan"),
        (["run", "headline-r56-c11"], "unknown experiment 'headline-r56-c11'; did you mean headline-r56-c10"),
        (["run", "headline-r56-c10", "--seed", "7"], "has the seeds 0, 1, 2, 3, 4, got 7"),
        ([], "the following arguments are required: VERB"),
        (["list", "--docs", "docs"], "unrecognized arguments: --docs docs"),
        (["run", "headline-r56-c10", "--other-runs", "-1"], "other-runs: expected at least 0, got -1"),
        (["run", "headline-r56-c10", "--jobs", "0"], "jobs: expected at least 1, got 0"),
        (["run", "*", "--seed", "0", "--seed", "5"], "seed: * has the seeds 0, 1, 2, 3, 4, got 5"),
        (["run", "headline-r56-c10", "--device", "foo"], "device: expected auto, cpu, cuda or cuda:N, got 'foo'"),
        (["run", "headline-r56-c10", "--threads", "-1"], "threads: expected at least 0 and at most 4096, got -1"),
        (["run", "headline-r56-c10", "--amp", "xyz"], "amp: expected one of off, auto, bf16, fp16, got 'xyz'"),
        (["run", "headline-r56-c10", "--device", "cuda:99"], "device: expected one that this machine has"),
        (["run", "headline-r56-c10", "--max-minutes", "-1"], "max_minutes: expected at least 0, got -1.0"),
        (["run", "headline-r56-c10", "--source", "cifar10"], "source: expected NAME=SOURCE, got 'cifar10'"),
        (["tables", "more"], "unrecognized arguments: more"),
        (["tables", "--docs", "nowhere"], "nowhere/results.md: expected the results page, found nothing there"),
    ],
)
def test_bad_input_is_reported_in_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*arguments]) == 2
    told = capsys.readouterr().err
    assert message in told and len(told.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_ledger_stops_the_run_before_it_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ledger.jsonl").write_text("{\n")
    arguments = ["run", "headline-r56-c10", "--results", str(tmp_path), "--runs", str(tmp_path / "runs")]
    assert main(arguments) == 2
    assert "ledger.jsonl: line 1 is damaged" in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_tables_and_list_from_a_ledger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "results.md"
    page.write_text("# R\n<!-- experiments: begin, written by docs/write.py -->\n<!-- experiments: end -->\n")
    assert main(["tables", "--results", str(tmp_path), "--docs", str(tmp_path)]) == 0
    assert "### Not run yet" in page.read_text() and page.read_text().startswith("# R\n")
    capsys.readouterr()
    assert main(["list", "--results", str(tmp_path)]) == 0
    assert "headline-r56-c10" in capsys.readouterr().out


@pytest.mark.slow
def test_processes_side_by_side_fill_one_ledger(tmp_path: Path) -> None:
    train, test = blobs(160, classes=10, side=20), blobs(20, classes=10, side=20)
    arrays = {"train_images": train[0], "train_labels": train[1], "test_images": test[0], "test_labels": test[1]}
    archive = write_npz(tmp_path / "blobs.npz", **arrays)
    names = ["cpu-r20-c10-dense", "cpu-r20-c10-ablation-recipe"]
    program = "import sys; from reproduce import checks; from reproduce.__main__ import main; "
    program += "checks.KNOWN_IMAGES.clear(); sys.exit(main(sys.argv[1:]))"
    sources = {"cifar10-16x16-25k": f"npz:{archive}"}
    workplace = Workplace(tmp_path / "runs", tmp_path / "results", sources, command=(sys.executable, "-c", program))
    assert runner.run_experiments(workplace, [(name, 0) for name in names], 2) == runner.DONE
    rows = read_ledger(tmp_path / "results" / "ledger.jsonl")
    assert {name for name, _ in rows} == set(names)
    for row in rows.values():
        assert (row.jobs, row.energy_j, row.energy_reason, row.energy_j_image) == (2, None, SHARED, None)
