import json

import pandas as pd
import pytest

from experiments.analysis import verdict_table
from experiments.analysis.claims import (
    Arithmetic,
    Claim,
    Comparison,
    Cost,
    CurveBelow,
    Figure,
    Formula,
    Theory,
    load_claims,
)
from experiments.analysis.verdicts import COLUMNS, Evidence, judge, tally
from tests.experiments.cases.handwritten_records import HIT_1, HIT_2, HIT_3, HIT_4, MISS, SCALE, TASK, write, write_run

FEWER = Comparison(task=TASK, measure="epochs_to_target", optimizer="ngplus", against="sgd", better="less")
BELOW = CurveBelow(task=TASK, value="train_loss", optimizer="ngplus", against="sgd")


def found(results, check):
    return Evidence(results).judge(Claim(id="x", place="p", claim="c", paper="f", check=check))


def runs(results, name, courses, **changes):
    for seed, metrics in enumerate(courses, 1):
        write(results, name, seed, metrics, **changes)


def changed(check, **values):
    return type(check)(**{**vars(check), **values})


def test_a_difference_in_every_seed_reproduces_the_direction(tmp_path):
    runs(tmp_path, "ngplus", [HIT_1, HIT_1, HIT_1, HIT_2, HIT_1])
    runs(tmp_path, "sgd", [HIT_4, HIT_3, HIT_4, HIT_4, HIT_3])
    finding = found(tmp_path, FEWER)
    assert (finding.verdict, finding.scale, finding.seeds) == ("reproduced", SCALE, 5)
    assert finding.dataset == "Fashion-MNIST, 3,600 embedded images"
    assert finding.ours.startswith("1 against 4 (0.250×), difference -2.4 [")
    assert "paired t-test, 5 seeds, p = 0.0" in finding.why
    assert finding.optimizers == "ngplus, sgd"
    files = [f"{TASK}/{SCALE}/runs/{name}-seed{seed}.jsonl" for name in ("ngplus", "sgd") for seed in range(1, 6)]
    assert finding.records.split() == files


@pytest.mark.parametrize(
    ("name", "verdict"),
    [("ImageNet-1k", "reproduced"), ("ImageNet-1k, 900 images", "not run"), ("JPEG folder, 3 classes", "not run")],
)
def test_at_the_papers_scale_only_the_papers_data_count(name, verdict, tmp_path):
    data = {"name": name, "sha256": "ab" * 32, "licence": "MIT", "train_size": 3600, "eval_size": 1000}
    write(tmp_path, "ngplus", 1, HIT_2, scale="paper", dataset=data)
    (tmp_path / TASK / SCALE).rename(tmp_path / TASK / "paper")
    figure = Figure(task=TASK, optimizer="ngplus", measure="epochs_to_target", value=2.0)
    assert found(tmp_path, figure).verdict == verdict


def test_the_size_counts_where_the_paper_gives_one(tmp_path):
    runs(tmp_path, "ngplus", [HIT_1, HIT_1, HIT_1, HIT_2, HIT_1])
    runs(tmp_path, "sgd", [HIT_4, HIT_3, HIT_4, HIT_4, HIT_3])
    assert found(tmp_path, changed(FEWER, ratio=0.25)).verdict == "reproduced"
    short = found(tmp_path, changed(FEWER, ratio=0.2))
    assert short.verdict == "not reproduced"
    assert "the direction holds, the size (0.2×) does not" in short.why


def test_the_other_way_round_is_not_reproduced(tmp_path):
    runs(tmp_path, "ngplus", [HIT_4, HIT_3, HIT_4, HIT_4, HIT_3])
    runs(tmp_path, "sgd", [HIT_1, HIT_1, HIT_1, HIT_2, HIT_1])
    finding = found(tmp_path, FEWER)
    assert finding.verdict == "not reproduced"
    assert "goes the other way" in finding.why
    assert found(tmp_path, changed(FEWER, better="more")).verdict == "reproduced"


def test_noise_is_inconclusive(tmp_path):
    runs(tmp_path, "ngplus", [HIT_1, HIT_4, HIT_2, HIT_3, HIT_2])
    runs(tmp_path, "sgd", [HIT_2, HIT_3, HIT_2, HIT_2, HIT_3])
    finding = found(tmp_path, FEWER)
    assert finding.verdict == "inconclusive"
    assert "no difference that these seeds can show" in finding.why


def test_a_size_outside_the_interval_is_not_reproduced_though_no_direction_is_shown(tmp_path):
    runs(tmp_path, "ngplus", [HIT_3, HIT_4, HIT_3, HIT_4, HIT_3])
    runs(tmp_path, "sgd", [HIT_4, HIT_3, HIT_4, HIT_4, HIT_4])
    assert found(tmp_path, FEWER).verdict == "inconclusive"
    assert found(tmp_path, changed(FEWER, ratio=0.9)).verdict == "inconclusive"
    half = found(tmp_path, changed(FEWER, ratio=0.5))
    assert half.verdict == "not reproduced"
    assert "the size (0.5×) lies outside the interval" in half.why
    assert found(tmp_path, changed(FEWER, better="more", ratio=2.0)).verdict == "not reproduced"


def test_a_size_is_not_judged_by_runs_that_missed(tmp_path):
    runs(tmp_path, "ngplus", [HIT_3, HIT_4, HIT_3, HIT_4, MISS])
    runs(tmp_path, "sgd", [HIT_4, HIT_3, HIT_4, HIT_4, HIT_4])
    assert found(tmp_path, changed(FEWER, ratio=0.5)).verdict == "inconclusive"


def test_four_seeds_are_inconclusive_however_clear(tmp_path):
    runs(tmp_path, "ngplus", [HIT_1, HIT_1, HIT_1, HIT_2])
    runs(tmp_path, "sgd", [HIT_4] * 4)
    finding = found(tmp_path, FEWER)
    assert (finding.verdict, finding.why) == ("inconclusive", "4 seeds in common, 5 are needed")


def test_ties_are_inconclusive(tmp_path):
    runs(tmp_path, "ngplus", [HIT_2] * 5)
    runs(tmp_path, "sgd", [HIT_2] * 5)
    assert (found(tmp_path, FEWER).verdict, found(tmp_path, FEWER).why) == ("inconclusive", "tied in every seed")


def test_a_miss_is_not_averaged_in(tmp_path):
    runs(tmp_path, "ngplus", [HIT_1] * 5)
    runs(tmp_path, "sgd", [MISS] * 5)
    finding = found(tmp_path, FEWER)
    assert finding.ours.startswith("1 against missed, difference -3 [")
    assert finding.verdict == "inconclusive"
    assert "p = 0.062, the least that 5 seeds can show by this test" in finding.why


def test_seconds_are_compared_on_one_device(tmp_path):
    sooner = changed(FEWER, measure="seconds_to_target")
    for seed in range(1, 7):
        write(tmp_path, "ngplus", seed, HIT_1, device="A", seconds_per_epoch=1.0 + seed / 100)
        write(tmp_path, "sgd", seed, HIT_4, device="B" if seed == 6 else "A")
    assert (found(tmp_path, sooner).verdict, found(tmp_path, sooner).seeds) == ("reproduced", 5)
    assert found(tmp_path, FEWER).seeds == 6
    for seed in range(1, 6):
        write(tmp_path, "sgd", seed, HIT_4, device="B")
    other = found(tmp_path, sooner)
    assert other.verdict == "inconclusive"
    assert "no seed was trained with both on the same device" in other.why


def test_medians_are_over_the_seeds_that_both_have(tmp_path):
    runs(tmp_path, "ngplus", [HIT_3, HIT_2, HIT_3, HIT_3, HIT_2])
    runs(tmp_path, "sgd", [HIT_4, HIT_3, HIT_4, HIT_4, HIT_3, MISS, MISS, MISS, MISS, MISS, MISS])
    finding = found(tmp_path, changed(FEWER, ratio=0.7))
    assert finding.ours.startswith("3 against 4 (0.750×)")
    assert finding.verdict == "not reproduced"


def test_a_run_without_a_figure_is_inconclusive(tmp_path):
    runs(tmp_path, "ngplus", [HIT_1] * 4)
    write(tmp_path, "ngplus", 5, [None], end="diverged")
    runs(tmp_path, "sgd", [HIT_4, HIT_3, HIT_2, HIT_4, HIT_3])
    finding = found(tmp_path, changed(FEWER, measure="best_metric", better="more"))
    assert (finding.verdict, finding.why) == (
        "inconclusive",
        "no figure at seed 5: the run diverged before it had one",
    )


def test_one_side_alone_was_not_run(tmp_path):
    runs(tmp_path, "ngplus", [HIT_1])
    assert found(tmp_path, FEWER).verdict == "not run"
    assert found(tmp_path / "empty", FEWER).why == f"ngplus and sgd were not both run on {TASK}"


def test_the_larger_scale_with_enough_seeds_speaks(tmp_path):
    for seed in range(1, 6):
        for name, metrics in (("ngplus", HIT_1), ("sgd", HIT_2)):
            write(tmp_path, name, seed, metrics)
    move(tmp_path, "tiny", "small")
    runs(tmp_path, "ngplus", [HIT_3] * 2)
    runs(tmp_path, "sgd", [HIT_4] * 2)
    assert (found(tmp_path, FEWER).scale, found(tmp_path, FEWER).seeds) == ("small", 5)


def test_the_wider_search_speaks_but_for_seconds(tmp_path):
    """Its runs shared their processors with other programs."""
    for scale in ("small", "small-wide"):
        runs(tmp_path, "ngplus", [HIT_1] * 5)
        runs(tmp_path, "sgd", [HIT_2] * 5)
        move(tmp_path, "tiny", scale)
    seconds = changed(FEWER, measure="seconds_to_target")
    assert [found(tmp_path, check).scale for check in (FEWER, seconds)] == ["small-wide", "small"]


def move(results, old, new):
    for path in sorted((results / TASK / old / "runs").iterdir()):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines[0]["scale"] = new
        target = results / TASK / new / "runs" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("".join(json.dumps(line) + "\n" for line in lines))
        path.unlink()


def with_losses(results, name, seed, losses):
    path = write(results, name, seed, [0.1] * (len(losses) + 1))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line["event"] == "epoch" and line["epoch"]:
            line["train_loss"] = losses[line["epoch"] - 1]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        ([[0.9, 0.8, 0.7, 0.6]] * 5, "reproduced"),
        ([[0.9, 0.8, 0.7, 0.6]] * 4 + [[0.9, 0.8, 0.7, 0.9]], "inconclusive"),
        ([[1.1, 0.8, 0.7, 0.6]] * 5, "not reproduced"),
        ([[0.9, 0.8, None, None]] * 5, "not reproduced"),
        ([[0.9, 0.8, 0.7, 0.6]] * 4, "inconclusive"),
    ],
)
def test_a_curve_is_below_after_every_epoch_or_it_is_not(tmp_path, ours, verdict):
    for seed, losses in enumerate(ours, 1):
        with_losses(tmp_path, "ngplus", seed, losses)
        with_losses(tmp_path, "sgd", seed, [1.0, 0.9, 0.8, 0.7])
    assert found(tmp_path, BELOW).verdict == verdict


def test_a_further_figure_is_taken_where_the_metric_is_best(tmp_path):
    for seed in range(1, 6):
        for name, bleu in (("ngplus", 30.0 + seed), ("sgd", 29.0 + 0.9 * seed)):
            path = write(tmp_path, name, seed, [0.1, 0.7, 0.6], epochs=2)
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            for number, line in enumerate(lines[1:-1]):
                line["others"] = {"BLEU": bleu if number == 1 else 99.0}
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    finding = found(tmp_path, changed(FEWER, measure="others.BLEU", better="more"))
    assert finding.ours.startswith("33 against 31.7")
    assert finding.verdict == "reproduced"


def test_an_absolute_figure_needs_runs_at_its_own_scale(tmp_path):
    figure = Figure(task=TASK, optimizer="ngplus", measure="epochs_to_target", value=2.0)
    runs(tmp_path, "ngplus", [HIT_2])
    assert found(tmp_path, figure).verdict == "not run"
    assert found(tmp_path, changed(figure, scale=SCALE)).verdict == "reproduced"
    off = found(tmp_path, changed(figure, scale=SCALE, value=4.0))
    assert (off.verdict, off.why, off.ours) == ("not reproduced", "off by 50%", "2 (median of 1)")
    runs(tmp_path, "ngplus", [MISS])
    assert found(tmp_path, changed(figure, scale=SCALE)).verdict == "not reproduced"


def test_a_cost_is_read_from_its_bench(tmp_path):
    (tmp_path / "bench").mkdir()
    rows = [{"optimizer": "sgd", "device": "cpu", "s": 2.0}, {"optimizer": "ngplus", "device": "cpu", "s": 3.0}]
    pd.DataFrame(rows).to_csv(tmp_path / "bench" / "steps.csv", index=False)
    cost = Cost(file="steps.csv", row={"optimizer": "ngplus"}, over={"optimizer": "sgd"}, column="s", at_most=1.5)
    assert (found(tmp_path, cost).verdict, found(tmp_path, cost).ours) == ("reproduced", "1.5×")
    assert found(tmp_path, changed(cost, at_most=1.49)).verdict == "not reproduced"
    assert found(tmp_path, changed(cost, row={"optimizer": "lars"})).why == "bench/steps.csv has no such row"
    assert found(tmp_path, changed(cost, file="none.csv")).verdict == "not run"


def test_a_theory_row_speaks_for_itself(tmp_path):
    folder = tmp_path / "theory" / "regret"
    folder.mkdir(parents=True)
    row = {
        "claim": "T5",
        "ours": "0.3",
        "verdict": "reproduced",
        "why": "w",
        "scale": "theory",
        "dataset": "d",
        "seeds": 8,
    }
    pd.DataFrame([row]).to_csv(folder / "verdicts.csv", index=False)
    finding = found(tmp_path, Theory(part="regret", row="T5"))
    assert (finding.verdict, finding.ours, finding.seeds) == ("reproduced", "0.3", 8)
    assert found(tmp_path, Theory(part="regret", row="T6")).why == "theory/regret has no row 'T6'"


@pytest.mark.parametrize(("wrong", "verdict"), [(True, "not reproduced"), (False, "reproduced")])
def test_a_formula_is_judged_as_printed(tmp_path, wrong, verdict):
    (tmp_path / "theory").mkdir()
    row = {"place": "(14)", "measure": "error", "printed": 0.5, "corrected": 0.0}
    row |= {"printed_is_wrong": wrong, "corrected_is_right": True}
    pd.DataFrame([row]).to_csv(tmp_path / "theory" / "errata.csv", index=False)
    finding = found(tmp_path, Formula(place="(14)"))
    assert (finding.verdict, finding.ours) == (verdict, "error: 0.5 as printed, 0 corrected")


def test_arithmetic(tmp_path):
    hours = Arithmetic(times=(40.0, 600.0), over=(3600.0,), value=6.7)
    assert (found(tmp_path, hours).verdict, found(tmp_path, hours).ours) == ("reproduced", "40 × 600 / 3,600 = 6.667")
    assert found(tmp_path, changed(hours, value=8.0)).verdict == "not reproduced"


def test_every_claim_of_the_paper_gets_a_verdict_and_a_reason(tmp_path):
    for seed in range(1, 6):
        write_run(tmp_path, "ngplus", seed, HIT_1)
        write_run(tmp_path, "sgd", seed, HIT_2)
    frame = judge(tmp_path)
    assert tuple(frame.columns) == COLUMNS
    assert frame["why"].str.len().min() > 0
    assert sum(tally(frame).values()) == len(frame) > 100
    again = pd.read_csv(tmp_path / "verdicts.csv", keep_default_na=False)
    assert list(again["verdict"]) == list(frame["verdict"])
    assert again.set_index("id").loc["epochs-sgd", "seeds"] == "5"


def test_a_damaged_table_is_named_and_the_rest_goes_on(tmp_path):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "rows.csv").write_bytes(b"a,b\n\xff\xfe\x00\n")
    frame = judge(tmp_path).set_index("id")
    assert frame.loc["embedding-10-million", "verdict"] == "not run"
    assert "rows.csv: cannot be read" in frame.loc["embedding-10-million", "why"]
    assert frame.loc["table1-sgd-adds-up", "verdict"] == "reproduced"


def test_a_foreign_table_has_no_such_row(tmp_path):
    folder = tmp_path / "theory" / "regret"
    folder.mkdir(parents=True)
    pd.DataFrame([{"claim": "T5", "price": 3}]).to_csv(folder / "verdicts.csv", index=False)
    assert found(tmp_path, Theory(part="regret", row="T5")).verdict == "not run"


@pytest.mark.parametrize("format", ["terminal", "markdown"])
def test_the_table_shows_every_claim_and_counts(tmp_path, format):
    frame = judge(tmp_path)
    text = verdict_table.render(frame, format)
    assert text.splitlines()[-1] == verdict_table.summary(frame)
    assert text.count("not run") > 50
    assert max(map(len, verdict_table.render(frame).splitlines())) <= verdict_table.WIDTH


def test_markdown_has_one_line_a_claim(tmp_path):
    frame = judge(tmp_path)
    lines = [line for line in verdict_table.render(frame, "markdown").splitlines() if line.startswith("|")]
    assert len(lines) == len(frame) + 2
    assert {line.replace(r"\|", "").count("|") for line in lines} == {9}


def test_another_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be one of terminal, markdown"):
        verdict_table.render(judge(tmp_path), "html")


def test_the_short_table_has_the_headlines_and_counts_all(tmp_path):
    frame = judge(tmp_path)
    text = verdict_table.render(frame, "markdown", short=True)
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert len(rows) == sum(claim.headline for claim in load_claims()) < 25
    assert text.splitlines()[-1].startswith(f"{len(frame)} claims: ")


def test_a_figure_may_be_a_bound_on_the_first_epoch_below_a_loss(tmp_path):
    # Losses evaluated after epochs 0 to 4 are 2, 1, 2/3, 1/2 and 2/5.
    runs(tmp_path, "ngplus", [MISS] * 3)
    figure = Figure(
        task=TASK,
        optimizer="ngplus",
        measure="epochs_to_target",
        value=3.0,
        bound="at most",
        eval_loss=0.5,
        scale=SCALE,
    )
    assert found(tmp_path, figure).ours == "3 (median of 3)"
    assert found(tmp_path, figure).verdict == "reproduced"
    assert found(tmp_path, changed(figure, value=2.0)).verdict == "not reproduced"
    assert found(tmp_path, changed(figure, value=2.0, bound="at least")).verdict == "reproduced"
    assert found(tmp_path, changed(figure, eval_loss=0.1)).ours == "missed (median of 3)"
    assert found(tmp_path, changed(figure, measure="seconds_to_target")).ours == "6 (median of 3)"


@pytest.mark.parametrize("cell", ["", "out of memory", "inf"])
def test_a_cost_that_was_not_measured_is_not_run(tmp_path, cell):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "steps.csv").write_text(f"optimizer,device,s\nsgd,cpu,2.0\nngplus,cpu,{cell}\n")
    cost = Cost(file="steps.csv", row={"optimizer": "ngplus"}, column="s", at_most=2.0, over={"optimizer": "sgd"})
    assert (found(tmp_path, cost).verdict, found(tmp_path, cost).ours) == ("not run", "")
