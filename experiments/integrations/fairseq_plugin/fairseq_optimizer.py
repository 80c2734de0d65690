"""``--optimizer ngplus``: `ngplus.NGPlus` as fairseq's trainer wants an optimizer, and its arguments."""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from fairseq import utils
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.optim import FairseqOptimizer, register_optimizer
from omegaconf import II
from torch import nn

from ngplus import NGPlus

WITHOUT = "leave out --fp16, --bf16 and --amp"

_MODELS: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def remember(model: nn.Module) -> None:
    """Keep a model for the optimizer that is going to get its parameters.

    Args:
        model: that the task built; it is not kept alive.
    """
    _MODELS.add(model)


def recall_model(parameters: Iterable[nn.Parameter]) -> nn.Module:
    """The remembered model that these parameters are of.

    Args:
        parameters: as fairseq hands them to an optimizer.

    Returns:
        The model.

    Raises:
        ValueError: there is none, and what to change about the command.
    """
    wanted = {id(parameter) for parameter in parameters}
    for model in list(_MODELS):
        if wanted <= {id(parameter) for parameter in model.parameters()}:
            return model
    raise ValueError(
        f"--optimizer ngplus needs the model that its parameters are of: use --task translation_ngplus; {WITHOUT}"
    )


_SAMPLES = {"token": "rows", "sentence": "batch"}


@dataclass
class NGPlusConfig(FairseqDataclass):
    """The arguments of ``--optimizer ngplus``; the defaults are the paper's for IWSLT14, 𝒯 excepted."""

    ngplus_base: ChoiceEnum(["adam", "sgd"]) = field(
        default="adam",
        metadata={"help": "optimizer that gets the preconditioned gradients; adam is AdamW, as in fairseq"},
    )
    ngplus_damping: float = field(default=0.3, metadata={"help": "damping λ of (6) in the first epoch"})
    ngplus_damping_rate: float = field(default=0.87, metadata={"help": "factor on the damping a number of epochs"})
    ngplus_damping_epochs: float = field(default=10.0, metadata={"help": "that number of epochs"})
    ngplus_update_every: int = field(default=200, metadata={"help": "steps between curvature steps (𝒯)"})
    ngplus_samples: ChoiceEnum(list(_SAMPLES)) = field(
        default="token",
        metadata={"help": "what a sample is; a sentence's gradient is the sum over its tokens (docs/fairseq.md)"},
    )
    ngplus_betas: str = field(default="(0.9, 0.98)", metadata={"help": "betas of the base adam"})
    ngplus_eps: float = field(default=1e-8, metadata={"help": "epsilon of the base adam"})
    ngplus_momentum: float = field(default=0.9, metadata={"help": "momentum of the base sgd"})
    weight_decay: float = field(default=1e-4, metadata={"help": "weight decay of the base"})
    lr: list[float] = II("optimization.lr")  # noqa: RUF009 (a string that refers to --lr)


@register_optimizer("ngplus", dataclass=NGPlusConfig)
class FairseqNGPlus(FairseqOptimizer):
    """NG+ with every token a sample, or every sentence.

    The trainer runs backward on losses summed over the target tokens of the step and divides the gradients by
    their number afterwards. So the curvature is that of a summed loss, which needs no number of tokens.

    Args:
        cfg: the arguments of the command line.
        params: of a model that the task built.

    Raises:
        ValueError: the parameters are not those of a model that the task built.
    """

    def __init__(self, cfg: NGPlusConfig, params: Iterable[nn.Parameter]) -> None:
        super().__init__(cfg)
        params = list(params)
        base, options = _base(cfg)
        self._optimizer = NGPlus(
            recall_model(params),
            base=base,
            params=params,
            damping=cfg.ngplus_damping,
            update_every=cfg.ngplus_update_every,
            samples=_SAMPLES[str(cfg.ngplus_samples)],
            loss_reduction="sum",
            lr=cfg.lr[0],
            weight_decay=cfg.weight_decay,
            **options,
        )

    @property
    def optimizer_config(self) -> dict[str, Any]:
        """What a resumed run takes from its own command instead of the checkpoint."""
        return {"lr": self.cfg.lr[0], "weight_decay": self.cfg.weight_decay}

    def begin_epoch(self, epoch: int) -> None:
        """The damping of an epoch, the first being 1: λ · rate^((epoch − 1) / epochs)."""
        passed = (epoch - 1) / self.cfg.ngplus_damping_epochs
        for group in self.param_groups:
            group["damping"] = self.cfg.ngplus_damping * self.cfg.ngplus_damping_rate**passed


def _base(cfg: NGPlusConfig) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    if str(cfg.ngplus_base) == "sgd":
        return torch.optim.SGD, {"momentum": cfg.ngplus_momentum}
    betas = tuple(utils.eval_str_list(cfg.ngplus_betas.strip("()").split(","), type=float))
    return torch.optim.AdamW, {"betas": betas, "eps": cfg.ngplus_eps}
