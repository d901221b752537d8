from __future__ import annotations

from pathlib import Path

import pytest

from gatedconv.report.experiments import all_experiments
from gatedconv.report.results import TITLES, results_text, write_block
from tests.report.ledger_rows import row


def cells(text: str, label: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {label} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_experiment_has_a_row_and_says_that_it_was_not_run() -> None:
    text = results_text({})
    for title in TITLES.values():
        if title != TITLES["ablations"]:
            assert f"### {title}" in text
    labels = {each.label for each in all_experiments().values()}
    for label in labels:
        assert cells(next(part for part in text.split("###") if f"| {label} |" in part), label)[1] == "not run yet"


def test_mean_spread_and_shares_are_those_of_the_rows() -> None:
    rows = [row(seed=seed, top1_last=93.0 + seed, energy_j=3600.0) for seed in range(3)]
    text = results_text({each.key: each for each in rows}).split("###")[1]
    line = cells(text, "ResNet-56 CIFAR-10 gated")
    assert line[1:3] == ["94.00 ± 1.00", "3 of 5"]
    assert line[3:5] == ["60.00 ± 0.00", "50.0 %"]
    assert "1.00 ± 0.00" in line[5:]  # Wh
    assert "99.90 ± 0.00 %" in line[5:]


def test_one_run_has_no_spread() -> None:
    text = results_text({("headline-r56-c10", 4): row(seed=4)}).split("###")[1]
    assert cells(text, "ResNet-56 CIFAR-10 gated")[1:3] == ["93.50", "1 of 5"]


@pytest.mark.parametrize(("ahead", "verdict"), [(2.0, "a win"), (0.5, "a tie, within the spread"), (-2.0, "a loss")])
def test_a_control_is_beaten_only_by_more_than_the_spread(ahead: float, verdict: str) -> None:
    rows = {}
    for seed in range(3):
        for name, top1 in (("headline-r56-c10", 93.0 + ahead), ("headline-r56-c10-equal-macs", 93.0)):
            each = row(name, seed, top1_last=top1 + seed - 1, kind="gated" if name[-1] == "0" else "equal_macs")
            rows[each.key] = each
    (line,) = [line for line in results_text(rows).splitlines() if line.startswith("- ")]
    assert f"against equal MACs: {ahead:+.2f} points, 3 seeds, larger spread 1.00: {verdict}." in line


def test_energy_that_was_not_measurable_is_said_and_no_zero() -> None:
    rows = [row(seed=0), row(seed=1), row(seed=2, energy_j=7200.0, energy_j_image=0.00125)]
    text = results_text({each.key: each for each in rows}).split("###")[1]
    assert "Energy: not measurable on the machine of 2 of these 3 runs." in text
    line = cells(text, "ResNet-56 CIFAR-10 gated")
    assert "2.00" in line and "0.00125" in line
    text = results_text({each.key: each for each in rows[:2]}).split("###")[1]
    assert "not measurable on the machine of 2 of these 2 runs" in text and "Wh" not in text


def test_seeds_that_the_other_lacks_are_not_compared() -> None:
    rows = {each.key: each for each in (row(), row(seed=1), row("headline-r56-c10-equal-macs", 3, kind="equal_macs"))}
    assert "- ResNet" not in results_text(rows)


def test_a_block_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a: begin, written by docs/write.py -->\nold\n<!-- a: end -->\nafter\n")
    text = write_block(page, "a", lambda: "new")
    assert text == "before\n<!-- a: begin, written by docs/write.py -->\n\nnew\n\n<!-- a: end -->\nafter\n"
    with pytest.raises(ValueError, match="no block <!-- b"):
        write_block(page, "b", lambda: "new")
