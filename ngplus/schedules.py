"""The paper's learning-rate and damping schedules, stepped once an iteration.

Every schedule runs on the *fractional epoch* of footnote 4, ``epoch_k = k / steps_per_epoch``, where ``k``
counts optimizer steps from 0. Call ``step()`` after each ``optimizer.step()``, not after each epoch.
"""

import math
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = [
    "ExponentialDamping",
    "SchNetLR",
    "WarmupCosineLR",
    "WarmupInverseSqrtLR",
    "WarmupPolynomialLR",
]


def _positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be a positive number, got {value!r}")


def _not_negative(name: str, value: float) -> None:
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be zero or a positive number, got {value!r}")


class _FractionalEpochLR(LRScheduler):
    """A learning rate that is a function of the fractional epoch, after a linear warm-up.

    For ``k < W`` with ``W = warmup_epochs · steps_per_epoch`` the rate is
    ``warmup_lr + (lr0 − warmup_lr) · k / W``; from then on it is what a subclass returns from `_rate`. As
    in the paper, the schedule's own clock starts with training, not with the end of the warm-up.
    """

    def __init__(
        self, optimizer: Optimizer, steps_per_epoch: int, warmup_epochs: float, warmup_lr: float | None
    ) -> None:
        _positive("steps_per_epoch", steps_per_epoch)
        _not_negative("warmup_epochs", warmup_epochs)
        if warmup_lr is not None:
            _not_negative("warmup_lr", warmup_lr)
        self.steps_per_epoch = steps_per_epoch
        self.warmup_epochs = warmup_epochs
        self.warmup_lr = warmup_lr
        super().__init__(optimizer)

    @property
    def epoch(self) -> float:
        """The fractional epoch; torch's `last_epoch` counts calls of ``step()``, here iterations."""
        return self.last_epoch / self.steps_per_epoch

    def get_lr(self) -> list[float | Tensor]:
        """The learning rate of each parameter group at the current step."""
        warm = self.epoch < self.warmup_epochs
        return [self._warm_rate(lr0) if warm else self._rate(lr0, self.epoch) for lr0 in self.base_lrs]

    def _warm_rate(self, lr0: float | Tensor) -> float | Tensor:
        warmup_steps = self.warmup_epochs * self.steps_per_epoch
        start = lr0 / warmup_steps if self.warmup_lr is None else self.warmup_lr
        return start + (lr0 - start) * (self.last_epoch / warmup_steps)

    def _rate(self, lr0: float | Tensor, epoch: float) -> float | Tensor:
        raise NotImplementedError


class WarmupPolynomialLR(_FractionalEpochLR):
    """Polynomial decay, what the paper calls the "exponential strategy" of NG+ and K-FAC (appendix A).

    ``α_k = lr0 · (1 − epoch_k / max_epoch)^exponent``, and 0 from ``max_epoch`` on; before, a linear
    warm-up to ``lr0``. The decay counts epochs from the start of training, as printed, so the rate drops
    by ``(1 − warmup_epochs / max_epoch)^exponent`` where the warm-up ends.

    Args:
        optimizer: its groups' ``lr`` is ``lr0``.
        max_epoch: the epoch at which the rate reaches zero.
        exponent: the paper's ``decay_rate``.
        steps_per_epoch: optimizer steps an epoch.
        warmup_epochs: length of the warm-up in epochs, may be a fraction; 0 for none.
        warmup_lr: the rate of the first step, for every group; by default ``lr0`` divided by the number of
            warm-up steps (Goyal et al., 2017).

    Raises:
        ValueError: for a number out of range; the message names it.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.18)
        >>> schedule = WarmupPolynomialLR(optimizer, max_epoch=52, exponent=5, steps_per_epoch=1)
        >>> for _ in range(26):
        ...     optimizer.step()
        ...     schedule.step()
        >>> round(schedule.get_last_lr()[0] / 0.18, 5)  # half-way: 2⁻⁵
        0.03125
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        max_epoch: float,
        exponent: float,
        steps_per_epoch: int,
        warmup_epochs: float = 0.0,
        warmup_lr: float | None = None,
    ) -> None:
        _positive("max_epoch", max_epoch)
        _positive("exponent", exponent)
        self.max_epoch = max_epoch
        self.exponent = exponent
        super().__init__(optimizer, steps_per_epoch, warmup_epochs, warmup_lr)

    def _rate(self, lr0: float | Tensor, epoch: float) -> float | Tensor:
        remaining = max(1.0 - epoch / self.max_epoch, 0.0)
        return lr0 * math.pow(remaining, self.exponent)


class WarmupCosineLR(_FractionalEpochLR):
    """Cosine decay to a floor, the schedule of SGD on ImageNet (appendix A).

    ``α_k = floor + ½ (lr0 − floor) (1 + cos(π · epoch_k / max_epoch))``, and ``floor`` from ``max_epoch``
    on. The paper prints a fourth power on the bracket; the 4 is the number of a footnote.

    Args:
        optimizer: its groups' ``lr`` is ``lr0``.
        max_epoch: the epoch at which the rate reaches the floor.
        steps_per_epoch: optimizer steps an epoch.
        floor: the last learning rate, 0.001 in the paper.
        warmup_epochs: length of the linear warm-up in epochs; 0 for none.
        warmup_lr: the rate of the first step, for every group; by default ``lr0`` divided by the number of
            warm-up steps.

    Raises:
        ValueError: for a number out of range; the message names it.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        max_epoch: float,
        steps_per_epoch: int,
        floor: float = 0.001,
        warmup_epochs: float = 0.0,
        warmup_lr: float | None = None,
    ) -> None:
        _positive("max_epoch", max_epoch)
        _not_negative("floor", floor)
        self.max_epoch = max_epoch
        self.floor = floor
        super().__init__(optimizer, steps_per_epoch, warmup_epochs, warmup_lr)

    def _rate(self, lr0: float | Tensor, epoch: float) -> float | Tensor:
        angle = math.pi * min(epoch / self.max_epoch, 1.0)
        return self.floor + 0.5 * (lr0 - self.floor) * (1.0 + math.cos(angle))


class WarmupInverseSqrtLR(LRScheduler):
    """fairseq's ``inverse_sqrt``, the schedule of the Transformer (appendix A).

    ``warmup_init_lr + k (lr0 − warmup_init_lr) / warmup_updates`` for ``k < warmup_updates``, then
    ``lr0 · √(warmup_updates / k)``: the rate peaks at ``lr0`` where the two meet.

    Args:
        optimizer: its groups' ``lr`` is the peak ``lr0``.
        warmup_updates: length of the warm-up in optimizer steps, at least 1.
        warmup_init_lr: the rate of the first step, for every group.

    Raises:
        ValueError: for a number out of range; the message names it.
    """

    def __init__(self, optimizer: Optimizer, *, warmup_updates: int, warmup_init_lr: float = 0.0) -> None:
        _positive("warmup_updates", warmup_updates)
        _not_negative("warmup_init_lr", warmup_init_lr)
        self.warmup_updates = warmup_updates
        self.warmup_init_lr = warmup_init_lr
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """The learning rate of each parameter group at the current step."""
        return [self._rate(lr0, self.last_epoch) for lr0 in self.base_lrs]

    def _rate(self, lr0: float | Tensor, step: int) -> float | Tensor:
        if step < self.warmup_updates:
            return self.warmup_init_lr + (lr0 - self.warmup_init_lr) * (step / self.warmup_updates)
        return lr0 * math.sqrt(self.warmup_updates / step)


class SchNetLR(_FractionalEpochLR):
    """NG+'s schedule on SchNet: ``α_k = lr0 · max(epoch_k − hold_epochs, 1)^−½`` (appendix A).

    The rate stays at ``lr0`` up to epoch ``hold_epochs + 1``. The paper's "2e · 4" is 2e-4.

    Args:
        optimizer: its groups' ``lr`` is ``lr0``.
        steps_per_epoch: optimizer steps an epoch.
        hold_epochs: 10 in the paper.

    Raises:
        ValueError: for a number out of range; the message names it.
    """

    def __init__(self, optimizer: Optimizer, *, steps_per_epoch: int, hold_epochs: float = 10.0) -> None:
        _not_negative("hold_epochs", hold_epochs)
        self.hold_epochs = hold_epochs
        super().__init__(optimizer, steps_per_epoch, warmup_epochs=0.0, warmup_lr=None)

    def _rate(self, lr0: float | Tensor, epoch: float) -> float | Tensor:
        return lr0 / math.sqrt(max(epoch - self.hold_epochs, 1.0))


class ExponentialDamping:
    """``λ_k = λ0 · rate^(epoch_k / every_epochs)``, written to ``group["damping"]`` (appendix A).

    Each parameter group keeps its own ``λ0`` under ``group["initial_damping"]``, so that groups with
    different dampings decay side by side and a second schedule on the same optimizer starts from the same
    place, as torch's schedulers do with ``initial_lr``.

    Args:
        optimizer: every parameter group must have a ``damping``.
        rate: the factor every ``every_epochs`` epochs, e.g. 0.8; in (0, 1] for a decay.
        steps_per_epoch: optimizer steps an epoch.
        every_epochs: 10 in the paper.

    Raises:
        ValueError: for a number out of range, or an optimizer without damping; the message names it.
    """

    def __init__(self, optimizer: Optimizer, *, rate: float, steps_per_epoch: int, every_epochs: float = 10.0) -> None:
        _positive("rate", rate)
        _positive("steps_per_epoch", steps_per_epoch)
        _positive("every_epochs", every_epochs)
        self.optimizer = optimizer
        self.rate = rate
        self.steps_per_epoch = steps_per_epoch
        self.every_epochs = every_epochs
        self.last_step = 0
        self.initial_dampings = [self._initial_damping(i) for i in range(len(optimizer.param_groups))]
        self._write()

    def _initial_damping(self, index: int) -> float:
        group = self.optimizer.param_groups[index]
        if "damping" not in group:
            raise ValueError(f"parameter group {index} of {type(self.optimizer).__name__} has no 'damping' to schedule")
        initial: float = group.setdefault("initial_damping", group["damping"])
        return initial

    def _write(self) -> None:
        epoch = self.last_step / self.steps_per_epoch
        factor = self.rate ** (epoch / self.every_epochs)
        for group, damping0 in zip(self.optimizer.param_groups, self.initial_dampings, strict=True):
            group["damping"] = damping0 * factor

    def step(self) -> None:
        """Move on by one optimizer step."""
        self.last_step += 1
        self._write()

    def get_last_damping(self) -> list[float]:
        """The damping of each parameter group as last written."""
        return [group["damping"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer, as plain numbers."""
        return {key: value for key, value in self.__dict__.items() if key != "optimizer"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state, and write its damping to the groups."""
        self.__dict__.update(state_dict)
        self._write()
