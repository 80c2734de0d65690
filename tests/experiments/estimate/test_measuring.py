import time
from importlib import import_module

import pytest
import torch
from torch import nn

from experiments import tasks
from experiments.estimate import measuring
from experiments.estimate.measuring import make_clock, measure, measure_briefly, measure_loading, round_length
from experiments.estimate.timed_steps import Parts, has_refresh, make_training, take_steps
from ngplus.curvature.update import LayerCurvature

CPU = torch.device("cpu")
CLOCK = make_clock(CPU)


class Sleeper:
    """2 ms to load a batch and 100 ms more for an epoch's first, 4 ms a forward."""

    name = "sleeper"

    def build_model(self):
        return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))

    def steps_per_epoch(self):
        return 5

    def train_batches(self, epoch, seed, *, rank=0, world_size=1):
        time.sleep(0.1)
        for _ in range(5):
            time.sleep(0.002)
            yield torch.ones(2, 3)

    def loss(self, model, batch):
        time.sleep(0.004)
        return model(batch).mean()

    def to_device(self, batch, device):
        return batch


@pytest.fixture
def recipe(load):
    return load("optimizers.ngplus.update_every=4")


@pytest.fixture
def toy_task(recipe):
    return tasks.TASKS["toy"](recipe.task_settings, scale="tiny", data_dir=None)


def test_loading_is_timed_apart_from_the_start_of_an_epoch():
    start, batch = measure_loading(Sleeper(), CLOCK)
    assert 0.002 <= batch < 0.05 < start


def test_what_grows_with_the_batch_is_told_from_the_update(recipe, monkeypatch):
    monkeypatch.setattr(import_module("torch.optim.sgd"), "sgd", lambda *_, **__: time.sleep(0.1))
    step, _ = measure_briefly(recipe, "sgd", Sleeper(), CPU, CLOCK)
    assert 0.006 <= step.batch < 0.1 <= step.update


def test_a_refresh_step_is_told_from_a_plain_one(recipe, toy_task, monkeypatch):
    update = LayerCurvature.update

    def slow(self, *arguments):
        time.sleep(0.1)
        return update(self, *arguments)

    monkeypatch.setattr(LayerCurvature, "update", slow)
    found = measure(recipe, "ngplus", toy_task, CPU, clock=CLOCK, round_length=4, steps=12)
    assert found.steps == 12
    assert found.seconds.plain.update < 0.1 <= found.seconds.refresh.update


def test_an_optimizer_is_measured_at_most_at_its_own_interval(recipe, toy_task, monkeypatch):
    built = []
    training = measuring.make_training
    monkeypatch.setattr(measuring, "make_training", lambda *given: built.append(given[-1]) or training(*given))
    measure(recipe, "ngplus", toy_task, CPU, clock=CLOCK, round_length=50, steps=1)
    assert built == [4]


def test_plain_steps_are_measured_though_every_step_refreshes(load, toy_task):
    found = measure(
        load("optimizers.ngplus.update_every=1"), "ngplus", toy_task, CPU, clock=CLOCK, round_length=50, steps=2
    )
    assert found.seconds.plain.update > 0


def test_only_optimizers_with_an_interval_refresh(recipe):
    assert [name for name in recipe.optimizers if has_refresh(recipe, name)] == ["ngplus"]


def test_operations_are_counted_by_what_a_step_multiplies(recipe, toy_task):
    found = measure(recipe, "sgd", toy_task, CPU, clock=CLOCK, round_length=2, steps=2, count_operations=True)
    # 8 samples through 5-4-1: forward, the weights' gradients, and the hidden layer's.
    assert found.operations.plain.batch == 2 * 8 * (5 * 4 + 4 * 1) * 2 + 2 * 8 * 4
    assert found.operations.plain.update == 0
    ngplus = measure(recipe, "ngplus", toy_task, CPU, clock=CLOCK, round_length=2, steps=2, count_operations=True)
    assert ngplus.operations.refresh.batch + ngplus.operations.refresh.update > found.operations.plain.batch
    # (6): a 4 × 4 inverse times the 4 × 6 gradient, a 1 × 1 inverse times the 1 × 5 one; the bias is a column.
    assert ngplus.operations.plain.update == 2 * (4 * 4 * 6 + 1 * 1 * 5)


def test_low_ranks_products_in_place_are_counted(load, toy_task):
    recipe = load("optimizers.ngplus.solver=low_rank", "optimizers.ngplus.max_samples=1")
    ngplus = measure(recipe, "ngplus", toy_task, CPU, clock=CLOCK, round_length=2, steps=2, count_operations=True)
    # (14): W, of 4 × 1 and of 1 × 1, times the gradient's 4 × 6 and 1 × 5 elements, twice; the bias is a column.
    assert ngplus.operations.plain.update == 2 * 2 * (4 * 1 * 6 + 1 * 1 * 5)


def test_processor_time_does_not_count_what_is_waited_for():
    clock = make_clock(CPU, cpu_time=True)
    start = clock()
    time.sleep(0.2)
    assert clock() - start < 0.1


def test_a_round_lasts_long_enough_for_a_disturbance_to_be_spread():
    assert round_length(0.001) == 250
    assert round_length(10.0) == 2


def test_schedules_go_by_the_true_length_of_an_epoch(load, toy_task):
    training = make_training(load(), "sgd", toy_task, CPU, every=2)
    rates = []
    take_steps(training, CLOCK, lambda steps: rates.append(training.optimizer.param_groups[0]["lr"]) or len(steps) == 9)
    assert max(rates) > 0.09  # the warm-up to 0.1 lasts half an epoch of six steps


def test_parts_are_averaged_apart():
    mean = measuring._mean_parts([Parts(batch=1.0, update=2.0), Parts(batch=3.0, update=4.0)], measuring.fmean)
    assert mean == Parts(batch=2.0, update=3.0)


def test_a_round_far_off_does_not_count():
    assert measuring._midmean([1.0, 1.0, 1.0, 100.0]) == 1.0
