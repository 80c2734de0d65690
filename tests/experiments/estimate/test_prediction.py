import pytest

from experiments.estimate.measuring import Costs, Measured
from experiments.estimate.prediction import Shape, epoch, predict
from experiments.estimate.timed_steps import Parts
from experiments.estimate.training_memory import MemoryUse

PLAIN, REFRESH = Parts(batch=1.0, update=0.25), Parts(batch=2.0, update=3.0)
COSTS = Costs(plain=PLAIN, refresh=REFRESH)


def shape(**changes):
    return Shape(**{"batches": 10, "accumulate": 1, "epochs": 3, "update_every": 4, "factor": 1.0} | changes)


@pytest.mark.parametrize("every", [1, 4, 7, 30, 100])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_epochs_add_up_to_a_run_taken_step_by_step(every, accumulate):
    chosen = shape(update_every=every, accumulate=accumulate, factor=8.0)
    seconds = 0.0
    for number in range(chosen.epochs * chosen.steps):
        step = REFRESH if number % every == 0 else PLAIN
        seconds += sum(8.0 * step.batch for _ in range(accumulate)) + step.update
    assert chosen.epochs * epoch(COSTS, chosen) == pytest.approx(seconds)


def test_an_optimizer_that_refreshes_nothing_takes_plain_steps():
    assert epoch(Costs(plain=PLAIN, refresh=PLAIN), shape(update_every=None)) == pytest.approx(12.5)


def test_a_prediction_adds_the_start_of_the_epoch_and_scales_what_grows_with_the_batch():
    measured = Measured(
        seconds=COSTS,
        steps=8,
        epoch_start_s=5.0,
        loading_s=0.1,
        memory=MemoryUse(kept=100.0, peak=150.0),
        operations=COSTS,
    )
    found = predict("ngplus", measured, shape(factor=2.0, epochs=1, update_every=10))
    assert (found.plain_s, found.refresh_s) == (2.25, 7.0)
    assert found.epoch_s == pytest.approx(5.0 + 9 * 2.25 + 7.0)
    assert found.memory_mib == pytest.approx(200.0)
    assert found.hours_at(found.epoch_operations / 3600) == pytest.approx(1.0)
    assert found.hours == pytest.approx(found.epoch_s / 3600)
