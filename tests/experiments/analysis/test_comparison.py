import json
import math

import pandas as pd
import pytest

from experiments.analysis.comparison import COLUMNS, compare
from experiments.errors import UserError
from tests.experiments.cases.handwritten_records import (
    HIT_1,
    HIT_2,
    HIT_3,
    HIT_4,
    MISS,
    SCALE,
    TASK,
    epoch,
    manifest,
    write,
)


def compared(results):
    return compare(results, TASK, SCALE).set_index("optimizer")


def test_all_hit(tmp_path):
    for seed, (ours, theirs) in enumerate([(HIT_1, HIT_2), (HIT_2, HIT_4), (HIT_1, HIT_4)], 1):
        write(tmp_path, "ngplus", seed, ours, seconds_per_epoch=3.0)
        write(tmp_path, "sgd", seed, theirs)
    table = compared(tmp_path)
    ngplus, sgd = table.loc["ngplus"], table.loc["sgd"]
    assert list(table.index) == ["sgd", "ngplus"]
    assert (ngplus.seeds, ngplus.reached, sgd.reached) == (3, 3, 3)
    assert (ngplus.epochs_to_target, sgd.epochs_to_target) == (1, 4)
    assert (ngplus.epochs_to_target_low, ngplus.epochs_to_target_high) == (1, 2)
    assert ngplus.interval_coverage == 0.75
    assert (ngplus.wall_time_to_target_s, sgd.wall_time_to_target_s) == (3, 8)
    assert (ngplus.time_per_epoch_s, sgd.time_per_epoch_s) == (3, 2)
    assert ngplus.epochs_vs_reference == 0.25
    assert ngplus.best_metric == 0.84
    assert ngplus.best_metric_std == pytest.approx(0.02 / math.sqrt(3))
    assert ngplus.peak_memory_mb == 104
    assert (ngplus.curvature_s_per_epoch, ngplus.inverse_s_per_epoch) == (0.5, 0.25)
    assert math.isnan(ngplus.apply_s_per_epoch)
    assert ngplus.p_test == "paired t-test, 3 seeds"
    assert 0 < ngplus.p_value < 1
    assert math.isnan(sgd.p_value)
    assert sgd.p_reason == "is the reference"


def test_all_miss(tmp_path):
    for seed in (1, 2, 3):
        write(tmp_path, "ngplus", seed, MISS)
        write(tmp_path, "sgd", seed, MISS)
    row = compared(tmp_path).loc["ngplus"]
    assert (row.seeds, row.reached) == (3, 0)
    assert row.epochs_to_target == row.wall_time_to_target_s == row.epochs_to_target_low == math.inf
    assert math.isnan(row.epochs_vs_reference)
    assert (math.isnan(row.p_value), row.p_reason) == (True, "tied in every seed")


def test_a_miss_that_was_over_sooner_is_no_less_a_miss(tmp_path):
    for seed, (metrics, pace) in enumerate([(MISS, 1.0), (MISS, 1.1), (HIT_2, 5.0)], 1):
        write(tmp_path, "ngplus", seed, metrics, seconds_per_epoch=pace)
        write(tmp_path, "sgd", seed, HIT_4)
    row = compared(tmp_path).loc["ngplus"]
    assert (row.reached, row.wall_time_to_target_s) == (1, math.inf)


def test_half_of_the_reference_reach_its_own_median_best(tmp_path):
    for seed, best in enumerate([0.5, 0.6, 0.7, 0.8], 1):
        write(tmp_path, "sgd", seed, [0.1, best, best, best, best], target="reference best")
    row = compared(tmp_path).loc["sgd"]
    assert (row.target, row.reached, row.epochs_to_target) == (0.6, 3, 1)


def test_a_run_of_another_model_or_precision_is_left_out(tmp_path):
    recipe = {"task": {"model": {"dim": 8}}, "run": {"precision": "float32", "seeds": [1]}, "optimizer": {}}
    for seed in (1, 2, 3):
        write(tmp_path, "sgd", seed, HIT_1, recipe=recipe)
    for seed, table, own in ((4, "task", {"model": {"dim": 9}}), (5, "run", {"precision": "bf16"}), (6, "run", {})):
        write(tmp_path, "sgd", seed, HIT_1, recipe=recipe | {table: own})
    write(tmp_path, "sgd", 7, HIT_1, recipe=recipe, world_size=2)
    frame = compare(tmp_path, TASK, SCALE)
    warnings = "\n".join(frame.attrs["warnings"])
    for seed, name in ((4, "task.model.dim"), (5, "run.precision"), (7, "world_size")):
        assert (
            f"sgd-seed{seed}.jsonl: has other data, model, metric or target than most of its kind ({name})" in warnings
        )
    # Seed 6 is older than the choice of a precision, which then is no difference.
    assert frame.seeds[0] == 4


def test_a_copy_under_another_name_is_no_other_seed(tmp_path):
    path = write(tmp_path, "sgd", 1, HIT_1)
    path.with_name("sgd-seed2.jsonl").write_bytes(path.read_bytes())
    frame = compare(tmp_path, TASK, SCALE)
    assert frame.seeds[0] == 1
    assert "is the record of sgd, seed 1: must be called sgd-seed1.jsonl" in "".join(frame.attrs["warnings"])


def test_a_miss_is_later_than_every_hit_and_never_averaged_in(tmp_path):
    for seed, metrics in enumerate([HIT_1, MISS, HIT_3], 1):
        write(tmp_path, "ngplus", seed, metrics)
        write(tmp_path, "sgd", seed, MISS)
    table = compared(tmp_path)
    row = table.loc["ngplus"]
    assert (row.reached, row.epochs_to_target, row.epochs_to_target_high) == (2, 3, math.inf)
    assert row.wall_time_to_target_s == 6
    assert row.p_test == "sign-flip permutation test, 3 seeds"
    # A miss counts as the four epochs it was followed for: 1, 4 and 3 against 4.
    assert row.epochs_difference == pytest.approx((-3 + 0 - 1) / 3)
    assert row.epochs_to_target_restricted_mean == pytest.approx((1 + 4 + 3) / 3)
    assert (row.restricted_to_epochs, row.restricted_to_steps, row.restricted_to_s) == (4, 144, 8)
    assert math.isnan(row.epochs_vs_reference)  # the reference has no number of epochs
    assert table.loc["sgd"].epochs_to_target == math.inf


def test_what_fewer_than_half_reach_is_not_reached(tmp_path):
    for seed, metrics in enumerate([HIT_1, HIT_3, MISS, MISS], 1):
        write(tmp_path, "sgd", seed, metrics)
    assert compared(tmp_path).loc["sgd"].epochs_to_target == 3
    write(tmp_path, "sgd", 5, MISS)
    assert compared(tmp_path).loc["sgd"].epochs_to_target == math.inf


def test_steps_and_seconds_are_compared_like_epochs(tmp_path):
    pairs = [(HIT_1, HIT_2), (HIT_2, HIT_4), (HIT_1, HIT_4), (HIT_3, HIT_4)]
    for seed, (ours, theirs) in enumerate(pairs, 1):
        write(tmp_path, "ngplus", seed, ours, seconds_per_epoch=3.0)
        write(tmp_path, "sgd", seed, theirs)
    row = compared(tmp_path).loc["ngplus"]
    assert (row.steps_to_target, row.steps_to_target_low, row.steps_to_target_high) == (36, 36, 108)
    assert row.epochs_difference == (-1 - 2 - 3 - 1) / 4
    assert row.epochs_difference_low < row.epochs_difference < row.epochs_difference_high <= -1
    # 3, 6, 3 and 9 seconds against 4, 8, 8 and 8; the reference was followed for 8.
    assert (row.restricted_to_s, row.wall_time_difference_s) == (8, (-1 - 2 - 5 - 0) / 4)
    assert row.wall_time_p_test == "paired t-test, 4 seeds"
    assert row.best_metric_difference == pytest.approx((0.84 - 0.82 + 0.82 - 0.8 + 0.84 - 0.8 + 0.85 - 0.8) / 4)


def test_p_values_are_corrected_for_the_number_of_optimizers(tmp_path):
    for seed, theirs in enumerate([HIT_3, HIT_4, HIT_4], 1):
        write(tmp_path, "sgd", seed, theirs)
        write(tmp_path, "ngplus", seed, [HIT_1, HIT_1, HIT_2][seed - 1])
        write(tmp_path, "adam", seed, [HIT_2, HIT_2, HIT_1][seed - 1])
    table = compared(tmp_path)
    ngplus, adam = table.loc["ngplus"], table.loc["adam"]
    assert ngplus.p_value_holm == pytest.approx(2 * min(ngplus.p_value, adam.p_value))
    assert adam.p_value_holm >= adam.p_value
    assert ngplus.p_value_exact == 0.25
    assert math.isnan(table.loc["sgd"].p_value_holm)


def test_one_seed(tmp_path):
    write(tmp_path, "ngplus", 1, HIT_1)
    write(tmp_path, "sgd", 1, HIT_2)
    row = compared(tmp_path).loc["ngplus"]
    assert (row.epochs_to_target, row.epochs_vs_reference) == (1, 0.5)
    assert math.isnan(row.best_metric_std)
    assert (math.isnan(row.p_value), row.p_reason) == (True, "fewer than 3 seeds in common")


def test_ties(tmp_path):
    for seed in (1, 2, 3):
        write(tmp_path, "ngplus", seed, HIT_2)
        write(tmp_path, "sgd", seed, HIT_2)
    row = compared(tmp_path).loc["ngplus"]
    assert (row.epochs_vs_reference, row.p_reason, row.best_metric_std) == (1, "tied in every seed", 0)


def test_unequal_seeds_are_paired_where_both_have_one(tmp_path):
    for seed in (1, 2, 3, 4, 5):
        write(tmp_path, "ngplus", seed, HIT_1 if seed % 2 else HIT_3)
    for seed in (3, 4, 5, 6):
        write(tmp_path, "sgd", seed, HIT_4)
    row = compared(tmp_path).loc["ngplus"]
    assert (row.seeds, row.p_test) == (5, "paired t-test, 3 seeds")


def test_lower_is_better_and_exact_equality_reaches(tmp_path):
    metric = {"name": "mae", "unit": "eV", "higher_is_better": False}
    write(tmp_path, "adam", 1, [2.0, 0.9, 0.5, 0.4, 0.45], metric=metric, target=0.5)
    row = compared(tmp_path).loc["adam"]
    assert (row.epochs_to_target, row.best_metric) == (2, 0.4)


def test_without_a_target_there_is_nothing_to_reach(tmp_path):
    for seed in (1, 2, 3):
        write(tmp_path, "sgd", seed, HIT_1, target=None)
        write(tmp_path, "ngplus", seed, HIT_3, target=None)
    row = compared(tmp_path).loc["ngplus"]
    assert row.reached == 0
    assert math.isnan(row.epochs_to_target)
    assert row.best_metric == 0.85


def test_a_diverged_run_counts_as_a_miss_with_the_metric_it_had(tmp_path):
    write(tmp_path, "sgd", 1, [0.1, 0.5, None], end="diverged")
    row = compared(tmp_path).loc["sgd"]
    assert (row.diverged, row.reached, row.best_metric) == (1, 0, 0.5)


def test_a_run_that_diverged_at_once_has_no_numbers(tmp_path):
    write(tmp_path, "sgd", 1, [None], end="diverged")
    row = compared(tmp_path).loc["sgd"]
    assert row.epochs_to_target == math.inf
    assert math.isnan(row.best_metric)
    assert math.isnan(row.time_per_epoch_s)


def test_a_diverged_run_is_a_miss_for_all_the_time_that_others_were_followed(tmp_path):
    for seed in (1, 2, 3):
        write(tmp_path, "sgd", seed, HIT_2)
        write(tmp_path, "ngplus", seed, [0.1, None], end="diverged")
    row = compared(tmp_path).loc["ngplus"]
    assert (row.diverged, row.reached, row.epochs_to_target) == (3, 0, math.inf)
    assert (row.epochs_to_target_restricted_mean, row.wall_time_to_target_s_restricted_mean) == (4, 8)
    assert (row.epochs_difference, row.wall_time_difference_s) == (2, 4)
    assert row.p_test == "sign-flip permutation test, 3 seeds"


def test_the_reference_is_sgd_or_the_first_baseline(tmp_path):
    for name in ("ngplus", "lars", "ngplus-adam"):
        write(tmp_path, name, 1, HIT_1)
    assert set(compare(tmp_path, TASK, SCALE).reference) == {"lars"}
    write(tmp_path, "sgd", 1, HIT_1)
    frame = compare(tmp_path, TASK, SCALE)
    assert set(frame.reference) == {"sgd"}
    assert list(frame.optimizer) == ["sgd", "lars", "ngplus", "ngplus-adam"]


def named_reference(name: str) -> dict:
    return {"task": {}, "run": {"reference": name}, "optimizer": {"lr": 0.1}}


def test_the_reference_is_the_one_that_the_recipe_names(tmp_path):
    for name in ("ngplus", "adam", "sgd"):
        write(tmp_path, name, 1, HIT_1, recipe=named_reference("adam"))
    frame = compare(tmp_path, TASK, SCALE)
    assert set(frame.reference) == {"adam"}
    assert list(frame.optimizer) == ["adam", "ngplus", "sgd"]


def test_a_named_reference_that_was_not_run_is_replaced(tmp_path):
    for name in ("ngplus", "sgd"):
        write(tmp_path, name, 1, HIT_1, recipe=named_reference("adam"))
    assert set(compare(tmp_path, TASK, SCALE).reference) == {"sgd"}


def test_the_target_may_be_what_the_reference_reaches(tmp_path):
    asked = {"target": "reference best", "recipe": named_reference("adam")}
    for seed, (ours, theirs) in enumerate([(HIT_1, HIT_4), (HIT_3, HIT_2), (MISS, MISS)], 1):
        write(tmp_path, "ngplus", seed, ours, **asked)
        write(tmp_path, "adam", seed, theirs, **asked)
    table = compared(tmp_path)
    # Adam's best values are .8, .82 and .79.
    assert (set(table.target), set(table.target_rule)) == ({0.8}, {"reference best"})
    assert (table.loc["adam"].reached, table.loc["adam"].epochs_to_target) == (2, 4)
    assert (table.loc["ngplus"].reached, table.loc["ngplus"].epochs_to_target) == (2, 3)


def test_a_reference_without_a_number_leaves_no_target(tmp_path):
    write(tmp_path, "sgd", 1, [None], end="diverged", target="reference best")
    write(tmp_path, "ngplus", 1, HIT_1, target="reference best")
    assert math.isnan(compared(tmp_path).loc["ngplus"].target)


def test_only_ngplus(tmp_path):
    write(tmp_path, "ngplus", 1, HIT_1)
    assert compared(tmp_path).loc["ngplus"].p_reason == "is the reference"


def test_what_does_not_belong_is_named_and_the_rest_goes_on(tmp_path):
    for seed in (1, 2, 3):
        write(tmp_path, "sgd", seed, HIT_1)
    runs = tmp_path / TASK / SCALE / "runs"
    (runs / "a-foreign.jsonl").write_text('{"hello": 1}\n')
    (runs / "b-empty.jsonl").write_text("")
    (runs / "c-binary.jsonl").write_bytes(b"\xff\x00\x80\n")
    write(tmp_path, "adam", 1, HIT_1, task="schnet-qm9")
    write(tmp_path, "ngplus", 1, HIT_1, end=None)
    write(tmp_path, "sgd", 4, HIT_1, target=0.9)
    other = {"run": {}, "optimizer": {"lr": 0.3}}
    write(tmp_path, "sgd", 5, HIT_1, recipe=other)
    frame = compare(tmp_path, TASK, SCALE)
    assert list(frame.optimizer) == ["sgd"]
    assert frame.seeds[0] == 3
    warnings = "\n".join(frame.attrs["warnings"])
    for name in ("a-foreign", "b-empty", "c-binary"):
        assert f"{name}.jsonl" in warnings
    assert "adam-seed1.jsonl: is a run of schnet-qm9" in warnings
    assert "ngplus-seed1.jsonl: is unfinished" in warnings
    assert (
        "sgd-seed4.jsonl: has other data, model, metric or target than most of its kind (target); left out" in warnings
    )
    assert "sgd-seed5.jsonl: has other optimizer settings than most of its kind (lr); left out" in warnings


def test_a_cut_off_last_line_leaves_the_run_unfinished_and_named(tmp_path):
    write(tmp_path, "sgd", 1, HIT_1)
    cut = write(tmp_path, "ngplus", 1, HIT_1)
    cut.write_text(cut.read_text()[:-10])
    frame = compare(tmp_path, TASK, SCALE)
    assert list(frame.optimizer) == ["sgd"]
    assert any("ngplus-seed1.jsonl" in each and "unfinished" in each for each in frame.attrs["warnings"])


def test_a_resumed_run_counts_once(tmp_path):
    lines = [manifest("sgd", 1, epochs=2), epoch(0, 0.1), epoch(1, 0.5)]
    lines += [{"event": "resumed", "epoch": 1, "step": 36, "seconds": 2.0, "at": "2026-01-01T00:00:00Z"}]
    lines += [epoch(2, 0.9), {"event": "end", "reason": "finished", "seconds": 4.0}]
    path = tmp_path / TASK / SCALE / "runs" / "sgd-seed1.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = compared(tmp_path).loc["sgd"]
    assert (row.seeds, row.epochs_to_target, row.wall_time_to_target_s) == (1, 2, 4)


def test_no_finished_run_is_an_error_that_says_why(tmp_path):
    with pytest.raises(UserError, match="no finished run"):
        compare(tmp_path, TASK, SCALE)
    write(tmp_path, "sgd", 1, HIT_1, end=None)
    with pytest.raises(UserError, match=r"sgd-seed1\.jsonl: is unfinished"):
        compare(tmp_path, TASK, SCALE)


def test_the_file_holds_the_same_table(tmp_path):
    for seed, metrics in enumerate([HIT_1, MISS, MISS], 1):
        write(tmp_path, "ngplus", seed, metrics)
        write(tmp_path, "sgd", seed, HIT_2)
    frame = compare(tmp_path, TASK, SCALE)
    folder = tmp_path / TASK / SCALE
    read = pd.read_csv(folder / "comparison.csv", keep_default_na=False, na_values=[""])
    assert tuple(read.columns) == COLUMNS
    assert read.epochs_to_target.tolist() == frame.epochs_to_target.tolist() == [2, math.inf]
    assert [path.name for path in folder.iterdir() if path.is_file()] == ["comparison.csv"]


def test_seconds_of_two_devices_are_shown_and_not_tested(tmp_path):
    for seed in (1, 2, 3):
        write(tmp_path, "sgd", seed, HIT_4, device="A")
        write(tmp_path, "ngplus", seed, HIT_1, device="A" if seed < 3 else "B", seconds_per_epoch=1.0 + seed)
        write(tmp_path, "lars", seed, HIT_2, device="B", seconds_per_epoch=0.001)
    table = compared(tmp_path)
    ngplus, lars = table.loc["ngplus"], table.loc["lars"]
    assert (table.loc["sgd"].device, ngplus.device, lars.device) == ("A", "A; B", "B")
    assert lars.wall_time_to_target_s == 0.002
    assert math.isnan(lars.wall_time_p_value)
    assert math.isnan(lars.wall_time_difference_s)
    assert lars.restricted_to_s == 8  # seconds on B do not cut the time that those on A were followed for
    assert ngplus.wall_time_difference_s == (2 - 8 + 3 - 8) / 2  # the two seeds on A
    assert (lars.epochs_difference, ngplus.epochs_difference) == (-2, -3)
