import math

import numpy as np
import pytest

from experiments.tasks.dlrm.criteo_lines import LineError, parse
from tests.experiments.cases.criteo_text import make_lines, text_of


@pytest.mark.parametrize("ending", ["\n", ""])
def test_lines_are_read_as_one_at_a_time(ending):
    lines = make_lines(200)
    lines[-1][-1] = "00bf2a1e"
    found = parse(text_of(lines).rstrip(b"\n") + ending.encode())
    assert found.labels.tolist() == [int(fields[0]) for fields in lines]
    dense = [[math.log1p(max(int(field or 0), 0)) for field in fields[1:14]] for fields in lines]
    assert found.dense.dtype == np.float32
    assert np.allclose(found.dense, dense, rtol=1e-6)
    categories = [[int(field or "0", 16) for field in fields[14:]] for fields in lines]
    assert found.categories.T.tolist() == categories


def test_the_largest_numbers_that_fit_are_read():
    (line,) = make_lines(1)
    line[1], line[2], line[14], line[15] = "2147483647", "-2147483648", "ffffffff", "00000000"
    found = parse(text_of([line]))
    assert found.dense[0, :2].tolist() == [pytest.approx(31 * math.log(2)), 0]
    assert found.categories[:2, 0].tolist() == [2**32 - 1, 0]


def test_zeros_before_a_number_change_nothing_and_are_no_fault():
    lines = make_lines(3)
    lines[1][0], lines[1][4], lines[1][20] = "001", "007", "00000000001"
    found = parse(text_of(lines))
    assert (found.labels[1], found.categories[6, 1]) == (1, 1)
    assert found.dense[1, 3] == pytest.approx(math.log(8))
    lines[2][20] = "nothex"
    with pytest.raises(LineError, match=r"^line 3: category 7 = 'nothex'"):
        parse(text_of(lines))


@pytest.mark.parametrize("last", ["00bf2a1", "bf", "0", ""])
def test_a_last_category_that_may_be_cut_is_refused_and_with_a_line_feed_it_is_taken(last):
    lines = make_lines(12)
    lines[-1][-1] = last
    assert parse(text_of(lines)).categories[-1, -1] == int(last or "0", 16)
    with pytest.raises(LineError, match=rf"^line 12: category 26 = '{last}', where the file ends: it may be cut in it"):
        parse(text_of(lines)[:-1])


def test_a_last_category_of_eight_digits_needs_no_line_feed():
    """Any cut of it is refused; in another line a short one stays what it was."""
    lines = make_lines(12)
    lines[3][-1], lines[-1][-1] = "7", "00bf2a1e"
    found = parse(text_of(lines)[:-1])
    assert found.categories[-1, [3, -1]].tolist() == [7, 0xBF2A1E]
    for less in range(2, 10):
        with pytest.raises(LineError, match=r"^line 12: category 26 = "):
            parse(text_of(lines)[:-less])


def changed(column, value):
    def change(line):
        line[column] = value

    return change


def cut(line):
    del line[7]


def lengthen(line):
    line.append("68fd1e64")


def empty(line):
    line.clear()


FAULTS = [
    (cut, "has 39 columns, must have 40 between tabs"),
    (lengthen, "has 41 columns, must have 40"),
    (empty, "has 1 columns, must have 40"),
    (changed(0, "2"), "label = '2': must be 0 or 1"),
    (changed(0, ""), "label = '': must be 0 or 1"),
    (changed(3, "2147483648"), "integer 3 = '2147483648': must be empty or an integer of 32 bits"),
    (changed(3, "-2147483649"), "integer 3 = '-2147483649'"),
    (changed(13, "99999999999999999999999"), "integer 13 = '99999999999999999999999'"),
    (changed(1, "1.5"), "integer 1 = '1.5'"),
    (changed(1, " 7"), "integer 1 = ' 7'"),
    (changed(1, "+7"), r"integer 1 = '\+7'"),
    (changed(1, "1-2"), "integer 1 = '1-2'"),
    (changed(1, "-"), "integer 1 = '-'"),
    (changed(1, "a"), "integer 1 = 'a'"),
    (changed(14, "68fd1g64"), "category 1 = '68fd1g64': must be empty or one to eight hexadecimal digits"),
    (changed(39, "168fd1e64"), "category 26 = '168fd1e64'"),
    (changed(20, "-1"), "category 7 = '-1'"),
    (changed(20, "0x1f"), "category 7 = '0x1f'"),
    (changed(20, '"1f"'), "category 7 = '\"1f\"'"),
    (changed(20, "é"), "category 7 = 'é'"),
    (changed(39, "68fd1e64\r"), "ends as on Windows, with a carriage return"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS)
@pytest.mark.parametrize("at", [0, 6, 11])
def test_a_wrong_line_is_named_with_its_number_and_what_is_wrong(change, message, at):
    lines = make_lines(12)
    change(lines[at])
    with pytest.raises(LineError, match=rf"^line {at + 1}: {message}"):
        parse(text_of(lines))


def test_a_missing_and_an_extra_column_do_not_cancel():
    lines = make_lines(12)
    cut(lines[4])
    lengthen(lines[8])
    with pytest.raises(LineError, match=r"^line 5: has 39 columns"):
        parse(text_of(lines))


def test_bytes_that_are_no_text_are_refused():
    with pytest.raises(LineError, match=r"^line 1: has 1 columns"):
        parse(bytes(range(128, 256)) * 4)
