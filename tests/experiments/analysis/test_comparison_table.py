from io import StringIO

import pandas as pd
import pytest

from experiments.analysis.comparison import compare
from experiments.analysis.comparison_table import render
from tests.experiments.cases.handwritten_records import (
    HIT_1,
    HIT_2,
    HIT_3,
    HIT_4,
    MISS,
    SCALE,
    TASK,
    add_others,
    write,
    write_run,
)


@pytest.fixture
def frame(tmp_path):
    for seed, metrics in enumerate([HIT_1, HIT_3, MISS], 1):
        write(tmp_path, "ngplus", seed, metrics)
        write(tmp_path, "sgd", seed, HIT_4 if seed > 1 else HIT_2)
        write(tmp_path, "ngplus-adam", seed, MISS)
    (tmp_path / TASK / SCALE / "runs" / "junk.jsonl").write_text("junk\n")
    return compare(tmp_path, TASK, SCALE)


def test_the_terminal_table_fits_100_columns_and_names_the_data_first(frame):
    lines = render(frame).splitlines()
    tabular = [line for line in lines if not line.startswith("Left out")]
    assert max(map(len, tabular)) <= 100
    assert "Fashion-MNIST, 3,600 embedded images" in " ".join(lines[:2])
    assert "junk.jsonl" in "".join(lines)


def test_a_task_that_the_paper_does_not_have_says_so(tmp_path):
    for task in (TASK, "gpt-text"):
        write_run(tmp_path, "adamw", 1, HIT_4, task=task)
        said = "(beyond the paper)" in " ".join(render(compare(tmp_path, task, SCALE)).split())
        assert said == (task == "gpt-text")


def test_no_cell_is_cut_where_names_and_numbers_are_long(tmp_path):
    metric = {"name": "accuracy", "unit": "fraction", "higher_is_better": True}
    for seed, metrics in enumerate([HIT_1, HIT_3, MISS], 1):
        for name in ("adagrad", "ngplus-adagrad-batch"):
            write(tmp_path, name, seed, metrics, metric=metric, seconds_per_epoch=1234.5)
    lines = render(compare(tmp_path, TASK, SCALE)).splitlines()
    assert "…" not in "".join(lines)
    assert max(map(len, lines)) <= 100


def test_misses_are_words_not_numbers(frame):
    text = render(frame)
    row = next(line for line in text.splitlines() if line.strip().startswith("ngplus-adam"))
    assert "missed" in row
    assert "inf" not in row
    assert "nan" not in text.lower()


@pytest.mark.parametrize("format", ["markdown", "latex"])
def test_every_row_has_as_many_cells_as_the_header(frame, format):
    separator, count = {"markdown": ("|", 3), "latex": ("&", 3)}[format]
    rows = [line for line in render(frame, format).splitlines() if separator in line]
    rows = [row for row in rows if "---" not in row]
    assert len(rows) == 1 + count
    assert len({row.count(separator) for row in rows}) == 1


def test_markdown_shows_the_numbers(frame):
    text = render(frame, "markdown")
    assert "| ngplus | 2/3 | 3 [1, ∞] | 6.00 | 2.00 |" in text
    assert "**resnet50-imagenet, scale tiny: Fashion-MNIST, 3,600 embedded images; target top1 0.8, 4 epochs**" in text
    assert "sign-flip permutation test, 3 seeds" in text


def test_latex_escapes_what_latex_reads(frame):
    text = render(frame, "latex")
    body = text[text.index(r"\begin{tabular}") :]
    assert "±" not in body
    assert "∞" not in body
    assert r"$\pm$" in body


def test_an_unknown_format_is_named(frame):
    with pytest.raises(ValueError, match="format = 'html': must be one of terminal, markdown, latex"):
        render(frame, "html")


def test_one_seed_is_not_said_to_cover_anything(tmp_path):
    write(tmp_path, "sgd", 1, HIT_1)
    assert "cover the true median" not in render(compare(tmp_path, TASK, SCALE))


def test_the_notes_name_the_device_and_who_ran_on_another(frame, tmp_path):
    assert "Device: cpu." in render(frame)
    write(tmp_path, "lars", 1, HIT_1, device="one")
    write(tmp_path, "lars", 2, HIT_1, device="two")
    text = " ".join(render(compare(tmp_path, TASK, SCALE), "markdown").split())
    assert "Devices: cpu (sgd, ngplus, ngplus-adam); one and two (lars). Seconds are tested only between" in text


def test_a_standard_error_that_the_task_records_is_said(tmp_path):
    for seed in (1, 2, 3):
        add_others(write(tmp_path, "sgd", seed, HIT_2), "top1 standard error", [0.5, 0.4, 0.3, 0.2, 0.0021])
    frame = compare(tmp_path, TASK, SCALE)
    assert frame.metric_standard_error.tolist() == [0.0021]  # of the best epoch, the last
    assert "gives one run's top1 a standard error of 0.0021" in " ".join(render(frame).split())


def test_no_standard_error_is_said_where_none_is_recorded(frame):
    assert frame.metric_standard_error.isna().all()
    assert "standard error" not in render(frame)


def test_csv_has_every_column_of_the_comparison(frame):
    read = pd.read_csv(StringIO(render(frame, "csv")))
    assert list(read.columns) == list(frame.columns)
    assert list(read.optimizer) == ["sgd", "ngplus", "ngplus-adam"]
