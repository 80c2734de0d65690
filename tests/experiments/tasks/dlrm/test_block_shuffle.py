import numpy as np
import pytest

from experiments.tasks.dlrm.block_shuffle import block_batches


def rows(size, batch_size, **options):
    return [batch.tolist() for batch in block_batches(size, batch_size, **({"seed": 1, "epoch": 0} | options))]


@pytest.mark.parametrize(("size", "batch_size"), [(100, 7), (64, 16), (5, 5), (33, 32)])
def test_every_row_comes_once_but_for_the_incomplete_batch(size, batch_size):
    batches = rows(size, batch_size, block=8, window=3)
    assert [len(batch) for batch in batches] == [batch_size] * (size // batch_size)
    seen = [row for batch in batches for row in batch]
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(range(size))


def test_the_order_depends_on_seed_and_epoch_alone():
    first = rows(100, 10)
    np.random.seed(5)  # noqa: NPY002 - the global generator is what must not matter
    assert rows(100, 10) == first
    assert rows(100, 10, seed=2) != first
    assert rows(100, 10, epoch=1) != first


@pytest.mark.parametrize("world_size", [2, 5])
def test_ranks_get_consecutive_parts_of_the_joint_batch(world_size):
    joint = rows(95, 10, block=4, window=5)
    ranks = [rows(95, 10, block=4, window=5, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert [[row for part in parts for row in part] for parts in zip(*ranks, strict=True)] == joint


def test_a_window_holds_whole_blocks_and_is_left_before_the_next():
    seen = np.concatenate([np.array(batch) for batch in rows(80, 5, block=5, window=2)])
    for window in seen.reshape(8, 10):  # two blocks of five rows each
        blocks, counts = np.unique(window // 5, return_counts=True)
        assert counts.tolist() == [5, 5]
        assert sorted(window) == [5 * block + i for block in blocks for i in range(5)]


def test_within_one_window_every_row_is_as_likely_anywhere():
    places = np.zeros((6, 6))
    for seed in range(1200):
        order = rows(6, 6, seed=seed, block=2, window=3)[0]
        places[order, np.arange(6)] += 1
    # Each cell is binomial with mean 200 and deviation 12.9: five deviations in 36 cells happen once in 50,000.
    assert np.abs(places - 200).max() < 65


@pytest.mark.parametrize(
    ("size", "batch_size", "world_size", "message"),
    [(10, 11, 1, "batch_size=11 exceeds the 10"), (10, 5, 2, "batch_size=5 cannot be cut into world_size=2")],
)
def test_batches_that_cannot_be_are_refused(size, batch_size, world_size, message):
    with pytest.raises(ValueError, match=message):
        rows(size, batch_size, world_size=world_size)
