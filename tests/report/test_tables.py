from __future__ import annotations

from gatedconv.report import comparison_table, figures_table, runs_table

DENSE = {"top1": 99.5, "macs": 2_500_000, "params": 272_000, "latency_ms": {"1": 4.0, "32": 20.0}}
FROZEN = {"top1": 99.25, "macs": 1_000_000, "params": 136_000, "latency_ms": {"1": 2.0, "32": 25.0}}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_comparison_prints_gains_and_losses_alike() -> None:
    lines = comparison_table({"dense": DENSE, "frozen": FROZEN, "agreement": 0.9975}).splitlines()
    assert cells(lines[0]) == ["dense", "compact", "change"]
    assert [cells(line) for line in lines[2:]] == [
        ["top-1 (%)", "99.50", "99.25", "-0.25"],
        ["MACs (M)", "2.50", "1.00", "-60.0 %"],
        ["parameters (k)", "272.0", "136.0", "-50.0 %"],
        ["latency, batch 1 (ms)", "4.00", "2.00", "-50.0 %"],
        ["latency, batch 32 (ms)", "20.00", "25.00", "+25.0 %"],
        ["agreement (%)", "-", "99.75"],
    ]


def test_comparison_shows_the_engine_where_it_ran() -> None:
    frozen = {**FROZEN, "engine_latency_ms": {"1": 0.5}}
    lines = comparison_table({"dense": {**DENSE, "engine_latency_ms": {"1": 1.0}}, "frozen": frozen, "agreement": 1.0})
    assert cells(lines.splitlines()[7]) == ["latency, batch 1, engine (ms)", "1.00", "0.50", "-50.0 %"]


def test_comparison_without_baseline_or_without_gates() -> None:
    alone = comparison_table({"frozen": {k: v for k, v in FROZEN.items() if k != "latency_ms"}, "agreement": 1.0})
    assert "latency" not in alone and cells(alone.splitlines()[2]) == ["top-1 (%)", "-", "99.25"]
    assert "agreement" not in comparison_table({"dense": DENSE})


def test_runs_table_has_a_row_per_network() -> None:
    text = runs_table({"runs/a": {"dense": DENSE, "frozen": FROZEN, "agreement": 0.5}, "runs/b": {"dense": DENSE}})
    rows = [cells(line) for line in text.splitlines()[2:]]
    assert rows == [
        ["runs/a", "dense", "99.50", "2.50", "272.0", "-"],
        ["runs/a", "compact", "99.25", "1.00", "136.0", "50.00"],
        ["runs/b", "dense", "99.50", "2.50", "272.0", "-"],
    ]


def test_figures_table() -> None:
    assert cells(figures_table({"compact": FROZEN}).splitlines()[2]) == ["compact", "99.25", "1.00", "136.0"]


def test_energy_without_a_counter_is_never_zero() -> None:
    side = {"top1": 90.0, "macs": 1e6, "params": 1e3}
    told = comparison_table({"dense": side, "energy_j": None})
    assert "not measurable here" in told
    told = comparison_table({"dense": {**side, "energy_j": {"1": 0.25, "32": None}}, "energy_j": 1234.4})
    assert "1,234" in told and "0.25" in told and "not measurable" not in told and "batch 32" not in told
    told = comparison_table({"dense": side, "energy_j": 0.0312})
    assert cells(told.splitlines()[-1])[-1] == "0.0312"


def test_the_energy_of_an_image_is_shown_or_called_unmeasurable() -> None:
    spent = [{"top1": 90.0, "macs": 1e6, "params": 1e3, "energy_j_image": joules} for joules in (0.002, 0.0005, None)]
    lines = comparison_table({"dense": spent[0], "frozen": spent[1], "agreement": 1.0}).splitlines()
    assert cells(lines[5]) == ["energy of an image (J)", "0.002", "0.0005", "-75.0 %"]
    lines = comparison_table({"dense": spent[2], "frozen": spent[2], "agreement": 1.0}).splitlines()
    assert cells(lines[5]) == ["energy of an image (J)", "not measurable here"]
