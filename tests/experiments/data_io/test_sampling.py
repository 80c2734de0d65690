import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.data_io.sampling import draw_balanced, epoch_batches, hold_out

LABELS = np.repeat(np.arange(5), 20)[np.random.default_rng(3).permutation(100)]


def test_a_balanced_subset_has_equally_many_of_each_class_and_no_index_twice():
    chosen = draw_balanced(LABELS, 7, seed=1)
    assert np.bincount(LABELS[chosen]).tolist() == [7] * 5
    assert len(set(chosen)) == 35


def test_subsets_of_a_seed_are_nested_and_seeds_differ():
    small, large = (set(draw_balanced(LABELS, size, seed=1)) for size in (4, 9))
    assert small < large
    assert small != set(draw_balanced(LABELS, 4, seed=2))


def test_too_few_of_a_class_is_an_error():
    with pytest.raises(ValueError, match="21 samples of class 0 asked for, there are 20"):
        draw_balanced(LABELS, 21, seed=1)


def test_validation_is_held_out_and_does_not_depend_on_the_training_size():
    train, validation = hold_out(LABELS, train_size=None, validation_size=25)
    assert sorted([*train, *validation]) == list(range(100))
    fewer, same = hold_out(LABELS, train_size=40, validation_size=25)
    assert same.tolist() == validation.tolist()
    assert set(fewer) < set(train)
    assert np.bincount(LABELS[fewer]).tolist() == [8] * 5


def test_nothing_held_out_leaves_everything():
    train, validation = hold_out(LABELS, train_size=None, validation_size=0)
    assert (len(train), len(validation)) == (100, 0)


@pytest.mark.parametrize(
    ("train_size", "validation_size", "message"),
    [
        (None, 7, "validation_size = 7: must be a multiple of the number of classes, 5"),
        (95, 25, "train_size = 95: 19 samples of class 0 asked for, there are 15"),
    ],
)
def test_a_size_that_cannot_be_had_is_named(train_size, validation_size, message):
    with pytest.raises(ValueError, match=message):
        hold_out(LABELS, train_size=train_size, validation_size=validation_size)


@given(
    size=st.integers(8, 60),
    share=st.integers(1, 4),
    world_size=st.integers(1, 4),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 100),
)
def test_the_ranks_together_see_the_joint_batches(size, share, world_size, seed, epoch):
    batch = share * world_size
    if batch > size:
        return
    joint = list(epoch_batches(size, batch, seed=seed, epoch=epoch))
    parts = [
        list(epoch_batches(size, batch, seed=seed, epoch=epoch, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert len(joint) == size // batch
    for whole, *pieces in zip(joint, *parts, strict=True):
        assert np.concatenate(pieces).tolist() == whole.tolist()
        assert {len(piece) for piece in pieces} == {share}
    seen = np.concatenate(joint)
    assert len(set(seen)) == len(seen)


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        return np.concatenate(list(epoch_batches(50, 10, seed=seed, epoch=epoch))).tolist()

    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(*each)) for each in [(1, 2), (2, 1), (1, 3), (0, 0)]}) == 4


def test_a_batch_that_cannot_be_cut_or_filled_is_an_error():
    with pytest.raises(ValueError, match="batch_size=10 cannot be cut into world_size=3 equal parts"):
        next(epoch_batches(50, 10, seed=0, epoch=0, world_size=3))
    with pytest.raises(ValueError, match="batch_size=51 exceeds the 50 training samples"):
        next(epoch_batches(50, 51, seed=0, epoch=0))
