import pytest
import torch

from experiments.config.recipe import load_recipe
from experiments.data_io.checksum import DataFileError
from experiments.errors import UserError
from experiments.estimate import batches
from experiments.estimate.batches import choose_batch, load_task_or_stand_in
from experiments.estimate.measuring import make_clock
from experiments.estimate.timed_steps import Parts
from experiments.estimate.training_memory import MemoryUse

CPU = torch.device("cpu")
CLOCK = make_clock(CPU)


def largest(seconds=0.0, peak=100.0, available=None):
    """Of a recipe's batch of 256, after a look at 4."""
    return batches._largest(Parts(batch=seconds, update=0.0), MemoryUse(kept=0.0, peak=peak), 64.0, 4, 256, available)


def test_the_whole_batch_is_measured_where_it_fits():
    assert largest(seconds=0.1, available=64 * 100 / batches.MEMORY_SHARE) == 256


def test_a_smaller_one_is_measured_where_steps_would_take_too_long():
    step_s = batches.LIMIT_S / batches.STEPS
    assert largest(seconds=step_s / 8) == 32
    assert largest(seconds=1000.0) == 4


def test_a_smaller_one_is_measured_where_memory_is_short():
    assert largest(available=16 * 100 / batches.MEMORY_SHARE) == 64


def test_the_recipes_batch_is_the_measure_of_a_smaller_one(load, tmp_path):
    bench = choose_batch(load(), "sgd", tmp_path, CPU, CLOCK, size=2)
    assert (bench.size, bench.whole_size, bench.batches) == (2, 8, 6)
    assert bench.factor == 4.0
    assert bench.made_up is None
    assert bench.recipe.task_settings["batch_size"] == 2


@pytest.mark.parametrize("size", [0, 9])
def test_a_batch_out_of_range_is_refused(load, tmp_path, size):
    with pytest.raises(UserError, match=f"batch = {size}: must be from 1 to the recipe's batch_size = 8"):
        choose_batch(load(), "sgd", tmp_path, CPU, CLOCK, size=size)


def test_parameters_that_do_not_fit_are_refused_before_anything_is_made(load, tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "available_mib", lambda device: 1e-6)
    with pytest.raises(UserError, match="its parameters and the optimizer's state take"):
        choose_batch(load(), "sgd", tmp_path, CPU, CLOCK)


def test_data_that_nothing_stands_for_must_be_there(tmp_path):
    with pytest.raises(DataFileError, match="make data-fashion-mnist"):
        load_task_or_stand_in(load_recipe("resnet50-imagenet", "small"), tmp_path)
