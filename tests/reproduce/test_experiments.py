from __future__ import annotations

import pytest

from gatedconv.train.config import make_config
from reproduce.experiments import PRUNED_SHARES, all_experiments, find_experiment
from reproduce.rows import recipe_settings

EXPERIMENTS = all_experiments()
SHORT = ("epochs", "small")  # of the paper's networks, in fewer epochs and one reading
PAPER = [e for e in EXPERIMENTS.values() if e.preset.startswith("paper-") and not e.name.startswith(SHORT)]

SHORT_R56 = "epochs40-r56-c10-paper-layer"


def members(shown: str) -> list[str]:
    return [each.name for each in EXPERIMENTS.values() if shown in each.shown and not each.name.endswith("-swapped")]


def test_the_headline_comes_first_then_table_4_1_cifar100_6_3_5() -> None:
    order = [name.split("-")[0] for name in EXPERIMENTS]
    firsts = [order.index(name) for name in ("headline", "table4", "table1", "ours", "table6", "table3", "table5")]
    assert firsts == sorted(firsts) and next(iter(EXPERIMENTS)) == "headline-r56-c10"
    assert order.index("cpu") > max(firsts) and order.index("cpu") < order.index("fast") < order.index("epochs40")


def test_short_trainings_keep_the_shares_of_the_schedule() -> None:
    """Milestones and λ switch at the same shares of 40 epochs as of 350; all else is the paper's."""
    short, paper = (make_config(recipe_settings(e)) for e in map(EXPERIMENTS.get, (SHORT_R56, "table1-c10-r56-ours")))
    assert short.epochs == 40 and paper.epochs == 350
    assert (short.lr, short.batch_size, short.polar_schedule) == (paper.lr, paper.batch_size, paper.polar_schedule)
    assert short.milestones == pytest.approx((125 / 350, 190 / 350, 250 / 350)) and short.estimator == "ste"


def test_every_arm_of_the_fast_network_is_there() -> None:
    kinds = [each.kind for each in EXPERIMENTS.values() if "fastc10" in each.shown]
    assert sorted(kinds) == sorted(
        ["gated"] * 2 + ["dense", "equal_macs", "fixed_at_init", "fixed_at_init", "taught_before"]
    )
    before, same = EXPERIMENTS["fast-c10-taught-before"], EXPERIMENTS["fast-c10-taught-fixed-at-init-taught"]
    assert before.sources == ("fast-c10-taught", "fast-c10-dense") and same.needs == "fast-c10-taught"
    assert (
        make_config(recipe_settings(same)).teacher_at
        == make_config(recipe_settings(EXPERIMENTS["fast-c10-taught"])).teacher_at
    )
    settings = recipe_settings(before)
    assert (settings["teacher_at"], settings["subnetwork"], settings["consensus_at"]) == (0.0, "even", 1.0)


def test_every_row_of_the_tables_of_the_paper_is_there() -> None:
    assert {"table1-c10-r56-ours", "table1-c10-r56-dense"} == set(members("table1"))
    table3 = {f"table3-c10-r110-{fc}fc-{where}" for fc in (1, 2) for where in ("before", "middle", "after")}
    table3 = table3 - {"table3-c10-r110-2fc-after"} | {"table4-c10-r110-dense", "table4-c10-r110-channel"}
    assert table3 == set(members("table3"))
    rows = {f"table4-{data}-r110-{kind}" for data in ("c10", "c100") for kind in ("dense", "layer", "channel")}
    controls = {f"{name}-{kind}" for name in rows for kind in ("equal-macs", "fixed-at-init") if "dense" not in name}
    assert rows | controls == set(members("table4"))
    assert {"ste", "gumbel", "batch_mean", "bernoulli"} == {
        EXPERIMENTS[name].settings.get("estimator", "ste") for name in members("table5")
    }
    lambdas = [EXPERIMENTS[name].settings.get("polar_weight") for name in members("table6")]
    assert lambdas == [None, None, 0.0, 1.0, 2.0, 3.0]  # dense, rising, and the constants
    assert len(members("figure6")) == 5


def test_the_naive_baselines_prune_what_the_paper_prunes() -> None:
    for kind in ("naive_dropout", "naive_layer"):
        rows = [each for each in EXPERIMENTS.values() if each.kind == kind and not each.name.endswith("-swapped")]
        assert [each.share for each in rows] == [20, 30, 50, 60, 80] == list(PRUNED_SHARES)


def test_every_run_of_the_paper_has_both_readings_of_the_milestones() -> None:
    printed = {each.name for each in PAPER if not each.name.endswith("-swapped")}
    assert {f"{name}-swapped" for name in printed} | printed == {each.name for each in PAPER}
    for name in printed:
        assert EXPERIMENTS[f"{name}-swapped"].preset == EXPERIMENTS[name].preset + "-swapped"


@pytest.mark.parametrize("name", ["headline-r56-c10", "ours-r56-c100", "ours-r110-c100", "cpu-r20-c10"])
def test_a_recipe_has_its_dense_net_and_both_controls(name: str) -> None:
    rows = [each for each in EXPERIMENTS.values() if each.name.startswith(name + "-")]
    kinds = {each.kind for each in rows if each.shown != ("ablations",)}
    assert kinds == {"dense", "equal_macs", "fixed_at_init"}
    gated = EXPERIMENTS[name]
    assert len(gated.seeds) >= (5 if "headline" in name else 3)
    for kind in ("equal-macs", "fixed-at-init"):
        control = EXPERIMENTS[f"{name}-{kind}"]
        assert control.needs == name and control.seeds == gated.seeds and control.preset == gated.preset


def test_an_unknown_name_gets_suggestions() -> None:
    with pytest.raises(ValueError, match="unknown experiment 'headline-r56'; did you mean headline-r56-c10"):
        find_experiment("headline-r56")


def test_what_an_experiment_needs_comes_before_it() -> None:
    names = list(EXPERIMENTS)
    for each in EXPERIMENTS.values():
        assert all(names.index(source) < names.index(each.name) for source in each.sources)
        assert each.trains != each.name.startswith("figure2-c10-r56-naive")
        assert each.shown and each.label


def test_the_table_is_made_once_and_never_changed() -> None:
    assert all_experiments() is EXPERIMENTS and find_experiment("headline-r56-c10") is EXPERIMENTS["headline-r56-c10"]
    with pytest.raises(TypeError):
        EXPERIMENTS["mine"] = EXPERIMENTS["headline-r56-c10"]  # type: ignore[index]
