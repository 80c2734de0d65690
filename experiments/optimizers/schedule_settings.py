"""The schedules a recipe can ask for: a settings dataclass each, which builds the scheduler."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR

from ngplus.schedules import (
    ExponentialDamping,
    SchNetLR,
    WarmupCosineLR,
    WarmupInverseSqrtLR,
    WarmupPolynomialLR,
)


class Scheduler(Protocol):
    """What training asks of a scheduler: one step an optimizer step, and a state of plain values."""

    def step(self) -> None:
        """Move on by one optimizer step."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The state as plain values."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state."""
        ...


@dataclass(frozen=True, kw_only=True)
class Constant:
    """The learning rate as it is."""

    kind: ClassVar = "constant"

    def build(self, optimizer: Optimizer, steps_per_epoch: int) -> Scheduler:
        """The scheduler on an optimizer."""
        return ConstantLR(optimizer, factor=1.0)


@dataclass(frozen=True, kw_only=True)
class Polynomial:
    """`ngplus.schedules.WarmupPolynomialLR`; lengths in epochs."""

    kind: ClassVar = "polynomial"
    max_epoch: float
    exponent: float
    warmup_epochs: float = 0.0
    warmup_lr: float | None = None

    def build(self, optimizer: Optimizer, steps_per_epoch: int) -> Scheduler:
        """The scheduler on an optimizer."""
        return WarmupPolynomialLR(optimizer, steps_per_epoch=steps_per_epoch, **asdict(self))


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """`ngplus.schedules.WarmupCosineLR`; lengths in epochs."""

    kind: ClassVar = "cosine"
    max_epoch: float
    floor: float = 0.001
    warmup_epochs: float = 0.0
    warmup_lr: float | None = None

    def build(self, optimizer: Optimizer, steps_per_epoch: int) -> Scheduler:
        """The scheduler on an optimizer."""
        return WarmupCosineLR(optimizer, steps_per_epoch=steps_per_epoch, **asdict(self))


@dataclass(frozen=True, kw_only=True)
class InverseSqrt:
    """`ngplus.schedules.WarmupInverseSqrtLR`; lengths in optimizer steps."""

    kind: ClassVar = "inverse_sqrt"
    warmup_updates: int
    warmup_init_lr: float = 0.0

    def build(self, optimizer: Optimizer, steps_per_epoch: int) -> Scheduler:
        """The scheduler on an optimizer."""
        return WarmupInverseSqrtLR(optimizer, **asdict(self))


@dataclass(frozen=True, kw_only=True)
class SchNet:
    """`ngplus.schedules.SchNetLR`; lengths in epochs."""

    kind: ClassVar = "schnet"
    hold_epochs: float = 10.0

    def build(self, optimizer: Optimizer, steps_per_epoch: int) -> Scheduler:
        """The scheduler on an optimizer."""
        return SchNetLR(optimizer, steps_per_epoch=steps_per_epoch, **asdict(self))


@dataclass(frozen=True, kw_only=True)
class Exponential:
    """`ngplus.schedules.ExponentialDamping`; lengths in epochs."""

    kind: ClassVar = "exponential"
    rate: float
    every_epochs: float = 10.0

    def build(self, optimizer: Optimizer, steps_per_epoch: int) -> Scheduler:
        """The scheduler on an optimizer."""
        return ExponentialDamping(optimizer, steps_per_epoch=steps_per_epoch, **asdict(self))


LRSchedule = Constant | Polynomial | Cosine | InverseSqrt | SchNet
DampingSchedule = Exponential
