import io
import math

import pytest
import torch
from torch import nn

from ngplus.schedules import (
    ExponentialDamping,
    SchNetLR,
    WarmupCosineLR,
    WarmupInverseSqrtLR,
    WarmupPolynomialLR,
)


def sgd(*lrs: float) -> torch.optim.SGD:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs])


def damped(*dampings: float) -> torch.optim.SGD:
    optimizer = sgd(*[0.1] * len(dampings))
    for group, damping in zip(optimizer.param_groups, dampings, strict=True):
        group["damping"] = damping
    return optimizer


def rates(scheduler, steps: int) -> list[float]:
    """The rates of steps 0 to `steps`."""
    seen = [scheduler.get_last_lr()[0]]
    for _ in range(steps):
        scheduler.optimizer.step()
        scheduler.step()
        seen.append(scheduler.get_last_lr()[0])
    return seen


def test_polynomial_against_values_worked_out_by_hand():
    seen = rates(WarmupPolynomialLR(sgd(0.5), max_epoch=4, exponent=2, steps_per_epoch=2), 10)
    # 0.5 (1 − k/8)²
    by_hand = [0.5, 0.3828125, 0.28125, 0.1953125, 0.125, 0.0703125, 0.03125, 0.0078125, 0.0, 0.0, 0.0]
    assert seen == pytest.approx(by_hand, abs=1e-15)


def test_the_papers_ngplus_schedule_at_epoch_10():
    scheduler = WarmupPolynomialLR(sgd(0.18), max_epoch=52, exponent=5, steps_per_epoch=3, warmup_epochs=5)
    assert rates(scheduler, 30)[30] == pytest.approx(0.18 * (42 / 52) ** 5)


def test_goyal_warm_up_starts_at_lr_over_the_number_of_warm_up_steps():
    scheduler = WarmupPolynomialLR(sgd(0.4), max_epoch=10, exponent=1, steps_per_epoch=2, warmup_epochs=2)
    seen = rates(scheduler, 4)
    # start 0.1, then a quarter of the remaining 0.3 a step; at step 4 the decay's own (1 − 2/10)
    assert seen == pytest.approx([0.1, 0.175, 0.25, 0.325, 0.32])


def test_warm_up_from_a_given_rate():
    scheduler = WarmupCosineLR(sgd(1.3), max_epoch=50, steps_per_epoch=4, warmup_epochs=1, warmup_lr=0.1)
    assert rates(scheduler, 3) == pytest.approx([0.1, 0.4, 0.7, 1.0])


def test_a_warm_up_of_a_fraction_of_an_epoch():
    scheduler = WarmupCosineLR(sgd(1.0), max_epoch=9, steps_per_epoch=10, warmup_epochs=0.2, warmup_lr=0.0)
    assert rates(scheduler, 1) == pytest.approx([0.0, 0.5])


def test_cosine_against_values_worked_out_by_hand():
    seen = rates(WarmupCosineLR(sgd(0.101), max_epoch=2, steps_per_epoch=2), 6)
    half = 0.001 + 0.05 * (1 + math.sqrt(0.5))
    assert seen == pytest.approx([0.101, half, 0.051, 0.102 - half, 0.001, 0.001, 0.001])


def test_inverse_sqrt_against_values_worked_out_by_hand():
    scheduler = WarmupInverseSqrtLR(sgd(0.4), warmup_updates=4, warmup_init_lr=0.2)
    seen = rates(scheduler, 16)
    assert seen[:5] == pytest.approx([0.2, 0.25, 0.3, 0.35, 0.4])
    assert seen[16] == pytest.approx(0.2)  # √(4/16)


def test_schnet_holds_then_decays():
    seen = rates(SchNetLR(sgd(2e-4), steps_per_epoch=2), 28)
    assert seen[:23] == pytest.approx([2e-4] * 23)  # up to epoch 11
    assert seen[28] == pytest.approx(1e-4)  # epoch 14: 4^−½


def test_every_group_keeps_its_own_rate():
    optimizer = sgd(1.0, 0.5)
    scheduler = WarmupPolynomialLR(optimizer, max_epoch=2, exponent=1, steps_per_epoch=1)
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == [0.5, 0.25]


def test_a_tensor_rate_stays_a_tensor():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=torch.tensor(0.5))
    rates(WarmupCosineLR(optimizer, max_epoch=2, steps_per_epoch=2, warmup_epochs=0.5), 4)
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(0.001)


def test_damping_against_values_worked_out_by_hand_in_two_groups():
    optimizer = damped(0.16, 0.6)
    schedule = ExponentialDamping(optimizer, rate=0.25, every_epochs=10, steps_per_epoch=2)
    assert schedule.get_last_damping() == [0.16, 0.6]
    for _ in range(10):  # five epochs: 0.25^½
        schedule.step()
    assert [group["damping"] for group in optimizer.param_groups] == pytest.approx([0.08, 0.3])
    assert schedule.get_last_damping() == pytest.approx([0.08, 0.3])
    for _ in range(10):
        schedule.step()
    assert schedule.get_last_damping() == pytest.approx([0.04, 0.15])


def test_a_second_damping_schedule_starts_from_the_initial_damping():
    optimizer = damped(0.5)
    first = ExponentialDamping(optimizer, rate=0.5, every_epochs=1, steps_per_epoch=1)
    first.step()
    second = ExponentialDamping(optimizer, rate=0.5, every_epochs=1, steps_per_epoch=1)
    assert second.get_last_damping() == [0.5]


def test_damping_needs_an_optimizer_that_has_one():
    with pytest.raises(ValueError, match="parameter group 0 of SGD has no 'damping'"):
        ExponentialDamping(sgd(0.1), rate=0.8, steps_per_epoch=1)


def both(optimizer):
    return (
        WarmupPolynomialLR(optimizer, max_epoch=9, exponent=3, steps_per_epoch=3, warmup_epochs=1),
        ExponentialDamping(optimizer, rate=0.8, steps_per_epoch=3),
    )


def test_saved_in_mid_schedule_and_loaded_goes_on_as_if_nothing_had_happened():
    optimizer = damped(0.3)
    schedules = both(optimizer)
    expected = []
    saved = io.BytesIO()
    for step in range(20):
        optimizer.step()
        for schedule in schedules:
            schedule.step()
        expected.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["damping"]))
        if step == 6:
            torch.save([schedule.state_dict() for schedule in schedules], saved)
            torch.save(optimizer.state_dict(), optimizer_saved := io.BytesIO())

    fresh = damped(0.3)
    resumed = both(fresh)
    optimizer_saved.seek(0)
    saved.seek(0)
    fresh.load_state_dict(torch.load(optimizer_saved, weights_only=True))
    for schedule, state in zip(resumed, torch.load(saved, weights_only=True), strict=True):
        schedule.load_state_dict(state)
    assert (fresh.param_groups[0]["lr"], fresh.param_groups[0]["damping"]) == expected[6]
    for step in range(7, 20):
        fresh.step()
        for schedule in resumed:
            schedule.step()
        assert (fresh.param_groups[0]["lr"], fresh.param_groups[0]["damping"]) == expected[step]


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda o: WarmupPolynomialLR(o, max_epoch=0, exponent=5, steps_per_epoch=1), "max_epoch"),
        (lambda o: WarmupPolynomialLR(o, max_epoch=5, exponent=-1, steps_per_epoch=1), "exponent"),
        (lambda o: WarmupCosineLR(o, max_epoch=5, steps_per_epoch=0), "steps_per_epoch"),
        (lambda o: WarmupCosineLR(o, max_epoch=5, steps_per_epoch=1, floor=-1.0), "floor"),
        (lambda o: WarmupCosineLR(o, max_epoch=5, steps_per_epoch=1, warmup_epochs=-1), "warmup_epochs"),
        (lambda o: WarmupCosineLR(o, max_epoch=5, steps_per_epoch=1, warmup_lr=-1), "warmup_lr"),
        (lambda o: WarmupInverseSqrtLR(o, warmup_updates=0), "warmup_updates"),
        (lambda o: SchNetLR(o, steps_per_epoch=1, hold_epochs=math.nan), "hold_epochs"),
        (lambda o: ExponentialDamping(o, rate=0.0, steps_per_epoch=1), "rate"),
        (lambda o: ExponentialDamping(o, rate=0.8, steps_per_epoch=1, every_epochs=0), "every_epochs"),
    ],
)
def test_a_number_out_of_range_is_named(build, named):
    with pytest.raises(ValueError, match=named):
        build(damped(0.1))
