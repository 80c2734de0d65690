import csv
import io

import pandas as pd
import pytest

from experiments.table_formats import FORMATS, render_frame, render_table

HEADER, ROWS = ["optimizer", "best"], [["a|b", "1.5 ± 0.1"], ["c,d", "50 %"]]


def test_csv_is_read_back_as_it_was():
    assert list(csv.reader(io.StringIO(render_table(HEADER, ROWS, "csv", title="t")))) == [HEADER, *ROWS]


def test_each_format_has_every_cell_and_says_what_it_shows():
    for format in set(FORMATS) - {"csv"}:
        text = render_table(HEADER, ROWS, format, title="what it shows", notes=["a note"])
        assert "what it shows" in text
        assert "a note" in text
        assert len([line for line in text.splitlines() if "1.5" in line or "50" in line]) == 2


def test_what_a_format_reads_itself_is_escaped():
    assert r"| a\|b | 1.5 ± 0.1 |" in render_table(HEADER, ROWS, "markdown")
    assert r"c,d & 50 \% \\" in render_table(HEADER, ROWS, "latex")


def test_a_frame_has_all_digits_as_csv_and_three_otherwise():
    frame = pd.DataFrame({"some_name": ["x"], "value": [1.23456]})
    assert render_frame(frame, "csv") == "some_name,value\nx,1.23456"
    assert "| x | 1.23 |" in render_frame(frame, "markdown")


def test_another_format_is_refused():
    with pytest.raises(ValueError, match="format = 'html': must be one of terminal, markdown, latex, csv"):
        render_table(HEADER, ROWS, "html")
