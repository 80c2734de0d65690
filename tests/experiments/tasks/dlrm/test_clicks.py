from collections import Counter

import numpy as np
import pytest

from experiments.estimate.stand_ins.criteo_log import VALUES
from experiments.tasks.dlrm.clicks import Clicks, Frequent, Hashed, Vocabulary, invert_order, rank_categories

TRAIN = slice(2, 40)


@pytest.fixture
def columns():
    return np.random.default_rng(0).integers(0, [4, 30, 100_000], (60, 3)).astype(np.uint32)


def test_ranks_order_the_values_by_their_count_in_the_training_part(columns):
    ranks, vocabulary = rank_categories(columns, TRAIN)
    assert vocabulary.sizes().tolist() == [len(set(column)) for column in columns.T.tolist()]
    for j, column in enumerate(columns.T.tolist()):
        counter = Counter(column[TRAIN])
        expected = sorted(set(column), key=lambda value: (-counter[value], value))
        values, counts = vocabulary.column(j)
        assert values.tolist() == expected
        assert counts.tolist() == [counter[value] for value in expected]
        assert [expected[rank] for rank in ranks[:, j]] == column


@pytest.mark.parametrize("min_count", [0, 1, 2, 5, 1000])
def test_a_frequent_value_has_a_row_of_its_own_and_the_others_share_row_0(columns, min_count):
    ranks, vocabulary = rank_categories(columns, TRAIN)
    chosen = Frequent(vocabulary, min_count)
    rows = chosen.to_rows(ranks)
    assert rows.dtype == np.int64
    for j, column in enumerate(columns.T.tolist()):
        counter = Counter(column[TRAIN])
        frequent = {value for value in column if counter[value] >= min_count}
        assert chosen.sizes[j] == len(frequent) + 1
        row_of = dict(zip(column, rows[:, j].tolist(), strict=True))
        assert all(row_of[value] == 0 for value in set(column) - frequent)
        assert sorted(row_of[value] for value in frequent) == list(range(1, len(frequent) + 1))


def number_as_the_dlrm(column, max_ind_range):
    """Rows of a table and of each value: values are numbered as they come, and the numbers taken modulo the range."""
    numbers = {value: number for number, value in enumerate(dict.fromkeys(column))}
    return min(len(numbers), max_ind_range), {value: number % max_ind_range for value, number in numbers.items()}


@pytest.mark.parametrize("number", [1, 7, 30, 10**6])
def test_hashed_tables_are_as_long_as_the_dlrms_and_as_many_values_share_a_row(columns, number):
    ranks, vocabulary = rank_categories(columns, TRAIN)
    hashed = Hashed(vocabulary, number)
    rows = hashed.to_rows(ranks)
    assert rows.dtype == np.int64
    for j, column in enumerate(columns.T.tolist()):
        size, expected = number_as_the_dlrm(column, number)
        assert hashed.sizes[j] == size
        row_of = dict(zip(column, rows[:, j].tolist(), strict=True))
        assert set(row_of.values()) == set(range(size))
        assert Counter(row_of.values()) == Counter(expected.values())


def test_hashed_tables_of_criteo_have_33_million_rows():
    empty = np.empty(0, np.uint32)
    vocabulary = Vocabulary(values=empty, counts=empty, offsets=np.concatenate([[0], np.cumsum(VALUES)]))
    sizes = Hashed(vocabulary, 10**7).sizes
    assert sizes == [min(values, 10**7) for values in VALUES]
    assert sum(sizes) == 33_762_577 - 131_227  # one column has 10,131,227 values
    assert sum(sizes) * 16 * 4 / 1e9 == pytest.approx(2.152, abs=1e-3)  # GB of float32, 16 a row


def test_hashing_is_by_the_number_of_a_value_whatever_the_value():
    ranks, vocabulary = rank_categories(np.array([[0xFFFFFFFF], [0], [7], [7]], np.uint32), slice(0, 4))
    hashed = Hashed(vocabulary, 10**7)
    assert hashed.sizes == [3]
    assert hashed.to_rows(ranks).tolist() == [[2], [1], [0], [0]]


def test_rank_of_is_the_inverse():
    order = np.random.default_rng(0).permutation(20)
    assert invert_order(order)[order].tolist() == list(range(20))


def test_columns_that_do_not_fit_together_are_refused():
    def made(**changes):
        vocabulary = Vocabulary(values=np.zeros(2, np.uint32), counts=np.zeros(2, np.uint32), offsets=np.array([0, 2]))
        whole = {"dense": np.zeros((3, 1)), "categories": np.zeros((3, 1), np.int32), "labels": np.zeros(3, np.uint8)}
        return Clicks(**(whole | changes), vocabulary=vocabulary, parts={})

    with pytest.raises(ValueError, match=r"columns of different lengths: \[2, 3\]"):
        made(labels=np.zeros(2, np.uint8))
    with pytest.raises(ValueError, match="2 columns of categories, but a vocabulary of 1"):
        made(categories=np.zeros((3, 2), np.int32))
