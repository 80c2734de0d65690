import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.data_io.atoms.structure_splits import composition_groups, cut, draw_order, one_a_group
from tests.experiments.cases import molecules

GROUPS = np.random.default_rng(0).integers(0, 60, 200)


def parts(groups=GROUPS, **sizes):
    return cut(draw_order(groups), groups, **({"train_size": None, "validation_size": 20, "test_size": 30} | sizes))


def test_the_order_is_a_permutation_that_keeps_groups_together_and_is_always_the_same():
    order = draw_order(GROUPS)
    assert sorted(order) == list(range(len(GROUPS)))
    borders = np.count_nonzero(np.diff(GROUPS[order]))
    assert borders == len(np.unique(GROUPS)) - 1
    assert order.tolist() == draw_order(GROUPS).tolist()
    assert order.tolist() != np.argsort(GROUPS, kind="stable").tolist()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.integers(0, 60), st.integers(0, 60))
def test_no_group_lies_in_two_parts_whatever_the_sizes(groups, validation_size, test_size):
    groups = np.array(groups)
    try:
        split = parts(groups, validation_size=validation_size, test_size=test_size)
    except ValueError:
        return
    assert (len(split.validation), len(split.test)) == (validation_size, test_size)
    indices = np.concatenate([split.train, split.validation, split.test])
    assert sorted(indices) == list(range(len(groups)))
    sides = [set(groups[part]) for part in (split.train, split.validation, split.test)]
    assert sum(map(len, sides)) == len(set.union(*sides))


def test_single_structures_can_be_cut_at_any_size():
    split = parts(np.arange(50), train_size=13, validation_size=7, test_size=9)
    assert [len(part) for part in (split.train, split.validation, split.test)] == [13, 7, 9]
    assert len(set(split.train) | set(split.validation) | set(split.test)) == 29


def test_the_test_split_depends_on_its_size_alone_and_training_sets_are_nested():
    groups = np.arange(200)
    small, large = parts(groups, train_size=50), parts(groups, train_size=100)
    assert small.test.tolist() == large.test.tolist()
    assert small.validation.tolist() == large.validation.tolist()
    assert large.train[:50].tolist() == small.train.tolist()
    assert parts(groups, validation_size=60).test.tolist() == small.test.tolist()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"test_size": 201}, r"test_size \+ validation_size \+ train_size = 221: there are 200 structures only"),
        ({"train_size": 151}, r"= 201: there are 200 structures only"),
    ],
)
def test_sizes_larger_than_the_data_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        parts(**sizes)


def test_a_size_that_whole_groups_cannot_fill_is_refused():
    with pytest.raises(ValueError, match=r"test_size = 3: whole groups of one composition fill 2 of them only"):
        parts(np.array([0, 0, 1, 1, 2, 2]), validation_size=2, test_size=3)


def test_compositions_are_compared_in_lowest_terms():
    entries = molecules.crystals(3)
    a, b, c = ([26, 26, 8, 8, 8], [26, 26, 26, 26, 8, 8, 8, 8, 8, 8], [26, 8])
    structures = molecules.collect_entries(
        [
            type(entry)(
                name=entry.name,
                numbers=np.array(numbers),
                positions=np.random.default_rng(0).random((len(numbers), 3)),
                target=0.0,
                cell=entry.cell,
            )
            for entry, numbers in zip(entries, (a, b, c), strict=True)
        ]
    )
    groups = composition_groups(structures)
    assert groups[0] == groups[1] != groups[2]
    assert one_a_group(structures).tolist() == [0, 1, 2]
