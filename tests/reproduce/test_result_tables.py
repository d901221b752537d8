from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reproduce.experiments import all_experiments
from reproduce.result_tables import TITLES, interval, present_rows, replace_block, results_text
from tests.reproduce.ledger_rows import row


def cells(text: str, label: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {label} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_tables_without_a_run_are_listed_with_what_the_paper_prints() -> None:
    text = results_text({})
    assert text.startswith("### Not run yet") and text.count("###") == 1
    for shown, title in TITLES.items():
        members = [each for each in all_experiments().values() if shown in each.shown]
        assert cells(text, title)[1] == str(sum(len(each.seeds) for each in members))
    assert cells(text, TITLES["table1"])[2] == "unpruned: 93.43; ours, λ_act 0.5: 92.42 ± 0.14 at 58 %"


def test_an_experiment_that_waits_is_a_row_of_its_table() -> None:
    text = results_text({row().key: row()})
    assert cells(text, "ResNet-56 CIFAR-10 dense")[1:3] == ["not run yet", "0 of 5"]
    assert f"| {TITLES['headline']} |" not in text and f"| {TITLES['table4']} |" in text


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_distance_to_the_dense_network_and_its_cost_are_a_sentence(seeds: int) -> None:
    """Of two dense networks of the same images and epochs it is the one of the same recipe."""
    rows = {}
    for seed in range(seeds):
        for name, kind, top1, macs in (
            ("epochs40-r56-c10", "gated", 92.0 + 0.1 * seed, 6e7),
            ("epochs40-r56-c10-dense", "dense", 93.0, 1.2e8),
            ("epochs40-r56-c10-paper-dense", "dense", 50.0, 1.2e8),
            ("epochs40-r56-c10-paper-layer", "gated", 49.0, 1.2e8),
        ):
            each = row(name, seed, kind=kind, top1_last=top1, macs=macs, epochs=40, train_macs=macs * 1e6)
            rows[each.key] = each
    lines = [line for line in results_text(rows).splitlines() if line.startswith("- ")]
    ahead = "-1.00 points in 1 seed" if seeds == 1 else "-0.90 [-1.15, -0.65] points in 3 seeds"
    assert lines == [
        f"- ResNet-56 CIFAR-10 gated against dense: {ahead} at 50.0 % of the MACs, training at 0.50 times the MACs.",
        "- the paper: layer gates, λ rising against dense: "
        + ("-1.00 points in 1 seed" if seeds == 1 else "-1.00 [-1.00, -1.00] points in 3 seeds")
        + " at 100.0 % of the MACs, training at 1.00 times the MACs.",
    ]


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


@pytest.mark.parametrize(("ahead", "verdict"), [(2.0, "significant"), (0.2, "not significant"), (-2.0, "significant")])
def test_a_control_is_beaten_only_where_the_interval_excludes_0(ahead: float, verdict: str) -> None:
    """Paired by seed: the spread of the seeds themselves, here 10 points, does not count."""
    rows = {}
    for seed in range(3):
        for name, top1 in (("headline-r56-c10", 93.0 + ahead), ("headline-r56-c10-equal-macs", 93.0)):
            apart = 0.1 * (seed - 1) if name[-1] == "0" else 0.0
            each = row(
                name,
                seed,
                top1_last=top1 - 10 + 10 * seed / 2 + apart,
                kind="gated" if name[-1] == "0" else "equal_macs",
            )
            rows[each.key] = each
    (line,) = [line for line in results_text(rows).splitlines() if line.startswith("- ")]
    half = 4.303 * 0.1 / 3**0.5
    assert (
        f"against equal MACs: {ahead:+.2f} [{ahead - half:+.2f}, {ahead + half:+.2f}] points in 3 seeds, {verdict}"
        in line
    )


def test_the_interval_is_students() -> None:
    stats = pytest.importorskip("scipy.stats")
    for count in range(2, 11):
        values = [0.3 * (-1) ** i * i for i in range(count)]
        low, high = stats.t.interval(0.95, count - 1, loc=np.mean(values), scale=stats.sem(values))
        mean, half = interval(values)
        assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-3)
    assert interval([0.5]) == (0.5, None)
    with pytest.raises(ValueError, match="expected 1 to 10 differences, got 0"):
        interval([])


def test_energy_that_was_not_measurable_is_said_and_no_zero() -> None:
    rows = [row(seed=0), row(seed=1), row(seed=2, energy_j=7200.0, energy_j_image=0.00125)]
    text = results_text({each.key: each for each in rows}).split("###")[1]
    assert "Energy not measured: no counter on the machine (2 of these 3 runs)." in text
    line = cells(text, "ResNet-56 CIFAR-10 gated")
    assert "2.00 (1 of 3)" in line and "0.00125 (1 of 3)" in line
    text = results_text({each.key: each for each in rows[:2]}).split("###")[1]
    assert "no counter on the machine (2 of these 2 runs)" in text and "Wh" not in text
    shared = row(energy_reason="other work ran on the device")
    text = results_text({shared.key: shared}).split("###")[1]
    assert "Energy not measured: other work ran on the device (1 of these 1 runs)." in text


def test_differences_of_seed_pairs_are_in_the_row_of_the_control() -> None:
    """Seeds that move both alike: the spread of the means hides what every pair shows."""
    tops = {"headline-r56-c10": (92.0, 93.0, 94.0), "headline-r56-c10-fixed-at-init": (91.6, 92.4, 93.5)}
    kinds = {"headline-r56-c10": "gated", "headline-r56-c10-fixed-at-init": "fixed_at_init"}
    rows = [row(name, seed, top1_last=top, kind=kinds[name]) for name in tops for seed, top in enumerate(tops[name])]
    rows.append(row("headline-r56-c10", 4, top1_last=50.0))  # without its partner
    text = results_text({each.key: each for each in rows}).split("###")[1]
    line = cells(text, "ResNet-56 CIFAR-10 gated, fixed at epoch 0")
    header = cells(text, "run")
    column = header.index("gated minus this, paired by seed [95 %]")
    assert line[column] == "+0.50 [+0.25, +0.75]"
    assert cells(text, "ResNet-56 CIFAR-10 gated")[column] == ""
    (verdict,) = [line for line in text.splitlines() if line.startswith("- ")]
    assert "+0.50 [+0.25, +0.75] points in 3 seeds, significant." in verdict


def test_a_control_pays_for_the_network_that_was_trained_to_teach_it() -> None:
    costs = {"": 150.0, "-taught": 250.0, "-taught-before": 140.0, "-dense": 160.0}
    kinds = {"-taught-before": "taught_before", "-dense": "dense"}
    rows = [
        row(f"fast-c10{end}", seed, kind=kinds.get(end, "gated"), train_macs=macs * 1e12, device="NVIDIA H200")
        for end, macs in costs.items()
        for seed in range(2)
    ]
    text = results_text({each.key: each for each in rows})
    untaught, taught = (line for line in text.splitlines() if line.startswith("- ") and "trained before: " in line)
    assert untaught.startswith("- VGG CIFAR-10 gated against equal MACs, taught by the dense network trained before: ")
    assert "Training took 0.50 times the control's MACs." in untaught
    assert "Training took 0.83 times the control's MACs." in taught
    assert "Trained on NVIDIA H200: 8 of these 8 runs." in text and "core-minutes" not in text
    unpaid = results_text({each.key: each for each in rows if each.kind != "dense"})
    assert "trained before: " in unpaid and "Training took" not in unpaid


def test_macs_without_norms_are_shown_where_rows_have_them() -> None:
    known = row(macs_conv=5.8e7, macs_conv_dense=1.16e8)
    text = results_text({known.key: known, ("headline-r56-c10", 1): row(seed=1)}).split("###")[1]
    line, header = cells(text, "ResNet-56 CIFAR-10 gated"), cells(text, "run")
    assert line[header.index("conv and fc alone")] == "50.0 % (1 of 2)"
    assert "conv and fc alone" not in results_text({("headline-r56-c10", 1): row(seed=1)})


def test_runs_by_an_earlier_recipe_are_left_out_and_that_is_said() -> None:
    rows = [row(recipe="new"), row(seed=1, recipe="old", top1_last=50.0), row(seed=2, top1_last=93.5)]
    text = results_text({each.key: each for each in rows}, {"headline-r56-c10": "new"}).split("###")[1]
    assert cells(text, "ResNet-56 CIFAR-10 gated")[1:3] == ["93.50 ± 0.00", "2 of 5"]
    assert "ResNet-56 CIFAR-10 gated: 1 runs by an earlier recipe are left out." in text
    assert "Recipe: not recorded for 1 of these 2 runs, which are older than the field." in text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"seed": 17}, "of seeds that are not in the table"),
        ({"kind": "dense"}, "of kind dense (not gated)"),
        ({"evaluated_on": "val"}, "evaluated on val (not test)"),
    ],
)
def test_rows_that_do_not_fit_the_table_are_left_out_and_that_is_said(changes: dict[str, Any], reason: str) -> None:
    rows = [row(seed=1, top1_last=93.5), row(top1_last=50.0, **changes)]
    text = results_text({each.key: each for each in rows}).split("###")[1]
    assert cells(text, "ResNet-56 CIFAR-10 gated")[1:3] == ["93.50", "1 of 5"]
    assert f"ResNet-56 CIFAR-10 gated: 1 runs {reason} are left out." in text


def test_runs_on_held_out_images_are_in_their_own_table() -> None:
    name = "cpu-r20-c10-ablation-recipe"
    rows = {(name, 0): row(name, evaluated_on="val")}
    assert cells(results_text(rows), "recipe")[1:3] == ["93.50", "1 of 1"] and "left out" not in results_text(rows)
    assert "recipe: 1 runs evaluated on test (not val) are left out." in results_text({(name, 0): row(name)})


def test_rows_of_unknown_experiments_are_reported() -> None:
    rows = [row(), row("future-thing"), row("future-thing", 1)]
    text = results_text({each.key: each for each in rows})
    assert text.endswith("\n\nLeft out, of experiments that are not in the table (runs): future-thing (2).")
    assert present_rows({each.key: each for each in rows}, {}) == {rows[0].key: rows[0]}


def test_runs_from_sources_with_changes_are_counted() -> None:
    rows = [row(commit="aa+changes"), row(seed=1, commit="aa"), row(seed=2), row(seed=9, commit="aa+changes")]
    text = results_text({each.key: each for each in rows}).split("###")[1]
    assert "Source: 1 of these 3 runs are from sources with changes." in text
    assert "Source:" not in results_text({rows[1].key: rows[1]})


def test_figures_are_linked_where_they_are_drawn() -> None:
    rows = {each.key: each for each in (row("table1-c10-r56-ours"), row("table6-c10-r110-lambda-0"))}
    text = results_text(
        rows, images=["overview.png", "figure3.png", "figure6-table6-c10-r110-lambda-0.png", "cpu-bench.png"]
    )
    assert "![Figure 3](images/figure3.png)" in text and "images/figure2.png" not in text
    assert "![Figure 6, λ 0](images/figure6-table6-c10-r110-lambda-0.png)" in text and "cpu-bench" not in text
    assert text.startswith("![Top-1 over MACs")
    text = results_text(rows)
    assert "overview" not in text
    assert "Figure 2 and Figure 3: not drawn yet." in text and "Figure 6: not drawn yet." in text


def test_seeds_that_the_other_lacks_are_not_compared() -> None:
    rows = {each.key: each for each in (row(), row(seed=1), row("headline-r56-c10-equal-macs", 3, kind="equal_macs"))}
    assert "- ResNet" not in results_text(rows)


def test_a_block_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a: begin, written by docs/write.py -->\nold\n<!-- a: end -->\nafter\n")
    text = replace_block(page, "a", "new")
    assert text == "before\n<!-- a: begin, written by docs/write.py -->\n\nnew\n\n<!-- a: end -->\nafter\n"
    assert replace_block(page, "a", "newer", text) == text.replace("new", "newer")
    with pytest.raises(ValueError, match="page.md: expected the block <!-- b: begin"):
        replace_block(page, "b", "new")
