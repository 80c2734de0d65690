"""What the state of a base is, so that it can move with the eigenbasis in which the base steps (beyond the paper).

In coordinates Xʹ = Q_LᵀX Q_R a base keeps its state as it always does. Where the basis changes from Q to Q′, with
C = QᵀQ′ of either side, its state moves with it:

=============  =====================================  ========================================================
kind           new value                              for
=============  =====================================  ========================================================
``linear``     C_Lᵀ M C_R                             sums of gradients or of steps, exact
``square``     (C_L∘C_L)ᵀ V (C_R∘C_R)                 sums of their squares, exact where the entries of the
                                                      gradient are uncorrelated
``magnitude``  root of the same of the squares        sizes of gradients
``kept``       unchanged                              what belongs to a coordinate, whatever its direction
=============  =====================================  ========================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch.optim import Optimizer

Decay = Literal["coupled", "decoupled", "flag", "none"]


@dataclass(frozen=True, kw_only=True)
class BaseRule:
    """What an optimizer does with a parameter, as far as the basis matters.

    Attributes:
        linear: names of state entries that move as gradients do.
        square: names of those that move as squares of gradients do.
        magnitude: names of those that move as sizes of gradients do.
        kept: names of those that do not move.
        momentum: the one of ``linear`` whose product makes the curvature with ``curvature="momentum"``; None where
            there may be none.
        decay: how ``weight_decay`` of a group acts: "coupled": added to the gradient; "decoupled": W ← (1 − lr · decay)
            W; "flag": as the group's ``decoupled_weight_decay`` says; "none": there is none.
        reads_parameters: whether its step depends on the parameter's value otherwise, so that it must see that in the
            basis, at the cost of one more product a side. Its decay is then its own.

    Raises:
        TypeError: names that are no tuple of strings.
        ValueError: a ``momentum`` that is not among ``linear``, or an unknown ``decay``.
    """

    linear: tuple[str, ...] = ()
    square: tuple[str, ...] = ()
    magnitude: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    momentum: str | None = None
    decay: Decay = "none"
    reads_parameters: bool = False

    def __post_init__(self) -> None:
        for name in ("linear", "square", "magnitude", "kept"):
            given = getattr(self, name)
            if not isinstance(given, tuple) or not all(isinstance(each, str) for each in given):
                raise TypeError(f"{name} of a BaseRule must be a tuple of names of state entries, got {given!r}")
        if self.momentum is not None and self.momentum not in self.linear:
            raise ValueError(f"momentum must be one of linear, {self.linear}, got {self.momentum!r}")
        if self.decay not in get_args(Decay):
            raise ValueError(f"decay must be one of {', '.join(map(repr, get_args(Decay)))}, got {self.decay!r}")

    @property
    def declared(self) -> tuple[str, ...]:
        """All names."""
        return (*self.linear, *self.square, *self.magnitude, *self.kept)

    def decay_kind(self, group: Mapping[str, Any]) -> Decay:
        """How ``weight_decay`` acts with a group's settings."""
        if self.decay == "flag":
            return "decoupled" if group.get("decoupled_weight_decay") else "coupled"
        return self.decay


_ADAM = BaseRule(
    linear=("exp_avg",), square=("exp_avg_sq", "max_exp_avg_sq"), momentum="exp_avg", decay="flag"
)  # AdamW is Adam with the flag

_RULES: dict[type[Optimizer], BaseRule] = {
    torch.optim.Adadelta: BaseRule(square=("square_avg", "acc_delta"), decay="coupled"),
    torch.optim.Adagrad: BaseRule(square=("sum",), decay="coupled"),
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    torch.optim.Adamax: BaseRule(linear=("exp_avg",), magnitude=("exp_inf",), momentum="exp_avg", decay="coupled"),
    torch.optim.NAdam: _ADAM,
    torch.optim.RAdam: _ADAM,
    torch.optim.RMSprop: BaseRule(linear=("momentum_buffer", "grad_avg"), square=("square_avg",), decay="coupled"),
    torch.optim.Rprop: BaseRule(linear=("prev",), kept=("step_size",)),
    torch.optim.SparseAdam: BaseRule(linear=("exp_avg",), square=("exp_avg_sq",), momentum="exp_avg"),
}

_REFUSED: dict[type[Optimizer], str] = {
    torch.optim.SGD: "makes the same steps in any basis: the basis would cost time and change nothing",
    torch.optim.Muon: "makes the same steps in any basis: the basis would cost time and change nothing",
    torch.optim.ASGD: "averages the parameters themselves, which are not kept in the basis",
    torch.optim.LBFGS: "evaluates the model within its step, where the parameters are in the basis",
    torch.optim.Adafactor: "keeps its second moments as row and column sums, which do not move with a basis",
}


def register_base(base: type[Optimizer], rule: BaseRule) -> None:
    """Declare the state of an optimizer that torch does not have, for ``NGPlus(basis="eigen", base=...)``.

    Args:
        base: the class; its subclasses are declared apart.
        rule: what its state is. An entry of a parameter's shape that the rule does not name is an error on the first
            step.

    Raises:
        TypeError: no optimizer class, or no rule.

    Example:
        >>> class Lion(torch.optim.Adam): ...
        >>> register_base(Lion, BaseRule(linear=("exp_avg",), momentum="exp_avg", decay="decoupled"))
    """
    if not (isinstance(base, type) and issubclass(base, Optimizer)):
        raise TypeError(f"base must be a torch.optim.Optimizer class, got {base!r}")
    if not isinstance(rule, BaseRule):
        raise TypeError(f"rule must be a BaseRule, got {rule!r}")
    _RULES[base] = rule


def find_rule(base: type[Optimizer]) -> BaseRule:
    """The rule of a base.

    Args:
        base: its class.

    Returns:
        The rule.

    Raises:
        ValueError: a base that gains nothing by a basis, or that cannot step in one.
        TypeError: a base that nobody has declared.
    """
    if base in _REFUSED:
        raise ValueError(
            f'basis="eigen" is not for base={base.__name__}, which {_REFUSED[base]}; bases are '
            f"{', '.join(sorted(each.__name__ for each in _RULES))}"
        )
    if base not in _RULES:
        raise TypeError(
            f'basis="eigen" does not know the state of base={base.__name__}: declare it by ngplus.register_base; known '
            f"are {', '.join(sorted(each.__name__ for each in _RULES))}"
        )
    return _RULES[base]


__all__ = ["BaseRule", "Decay", "find_rule", "register_base"]
