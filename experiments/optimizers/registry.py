"""The optimizers, by name.

A new one is a settings dataclass, a function that builds it, and a line in `OPTIMIZERS`. A field that a
recipe leaves out keeps the optimizer's own default.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from experiments.dataclass_io import SettingsError, list_allowed
from experiments.optimizers.muon import MuonAndAdamW, refuse_sparse_gradients
from experiments.optimizers.outside import load_outside, make_base
from experiments.plugins import OPTIMIZERS_GROUP, is_spec, list_entry_points
from ngplus import NGPlus
from ngplus.baselines import KFAC, SENG, Shampoo


@dataclass(frozen=True, kw_only=True)
class SGDBase:
    """What `torch.optim.SGD` takes besides the learning rate."""

    kind: ClassVar = "sgd"
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False


@dataclass(frozen=True, kw_only=True)
class AdamBase:
    """What `torch.optim.Adam` takes besides the learning rate."""

    kind: ClassVar = "adam"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass(frozen=True, kw_only=True)
class AdamWBase:
    """What `torch.optim.AdamW` takes besides the learning rate; each β by itself, so that it can be searched."""

    kind: ClassVar = "adamw"
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01


@dataclass(frozen=True, kw_only=True)
class AdagradBase:
    """What `torch.optim.Adagrad` takes besides the learning rate."""

    kind: ClassVar = "adagrad"
    eps: float = 1e-10
    weight_decay: float = 0.0
    initial_accumulator_value: float = 0.0


_BASE_CLASSES: dict[type, type[Optimizer]] = {
    SGDBase: torch.optim.SGD,
    AdamBase: torch.optim.Adam,
    AdamWBase: torch.optim.AdamW,
    AdagradBase: torch.optim.Adagrad,
}


@dataclass(frozen=True, kw_only=True)
class _LearningRate:
    lr: float

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr = {self.lr}: must be positive")


@dataclass(frozen=True, kw_only=True)
class SGDSettings(_LearningRate, SGDBase):
    """`torch.optim.SGD`."""


@dataclass(frozen=True, kw_only=True)
class AdamSettings(_LearningRate, AdamBase):
    """`torch.optim.Adam`."""


@dataclass(frozen=True, kw_only=True)
class AdamWSettings(_LearningRate, AdamWBase):
    """`torch.optim.AdamW`."""


@dataclass(frozen=True, kw_only=True)
class AdagradSettings(_LearningRate, AdagradBase):
    """`torch.optim.Adagrad`."""


@dataclass(frozen=True, kw_only=True)
class LARSSettings(_LearningRate):
    """LARS from pytorch-optimizer: biases and norms are neither decayed nor scaled.

    The settings of You et al. cap the trust ratio at 50. It needs no code: with a decay ``wd`` the ratio
    ``η‖w‖ / (‖g‖ + wd‖w‖)`` is at most ``η / wd``, which is 10 for their η = 1e-3 and wd = 1e-4.
    """

    momentum: float = 0.9
    weight_decay: float = 0.0
    trust_coefficient: float = 1e-3
    nesterov: bool = False


@dataclass(frozen=True, kw_only=True)
class MuonSettings(_LearningRate):
    """`experiments.optimizers.muon.MuonAndAdamW`; every field is its argument of that name."""

    adamw: tuple[str, ...] = ()
    adamw_lr: float | None = None
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = "match_rms_adamw"


@dataclass(frozen=True, kw_only=True)
class SOAPSettings(_LearningRate):
    """SOAP from pytorch-optimizer; a side longer than `max_precondition_dim` is left as it is."""

    betas: tuple[float, float] = (0.95, 0.95)
    weight_decay: float = 1e-2
    precondition_frequency: int = 10
    max_precondition_dim: int = 2048
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("precondition_frequency", "max_precondition_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class NGPlusSettings(_LearningRate):
    """`ngplus.NGPlus` on a base optimizer; every field but `base` is its argument of that name."""

    update_every: int
    base: SGDBase | AdamBase | AdamWBase | AdagradBase
    damping: float = 0.16
    damping_rule: Literal["paper", "released"] = "paper"
    curvature: Literal["per_sample", "mini_batch", "momentum"] = "per_sample"
    samples: Literal["batch", "rows"] = "batch"
    ema: float = 0.0
    solver: Literal["auto", "dense", "low_rank", "sketched"] = "auto"
    block_size: int | None = None
    sketch_size: int | None = None
    batch_dim: int = 0
    max_samples: int | None = None
    nonfinite: Literal["skip", "raise"] = "skip"
    update_growth: float | None = None
    staggered: bool | None = None
    basis: Literal["eigen"] | None = None
    sides: Literal["short", "both"] | None = None
    max_side: int | None = None

    @property
    def unused(self) -> tuple[str, ...]:
        """Settings that make no difference to this form, so that no search spends trials on them."""
        return () if self.basis is None else ("damping", "damping_rule")


@dataclass(frozen=True, kw_only=True)
class KFACSettings(_LearningRate):
    """`ngplus.baselines.KFAC` on a base optimizer; every field but `base` is its argument of that name."""

    damping: float
    update_every: int
    base: SGDBase | AdamBase | AdamWBase | AdagradBase
    ema: float = 0.95
    split: Literal["trace", "equal"] = "trace"
    max_side: int = 8192
    batch_dim: int = 0


@dataclass(frozen=True, kw_only=True)
class SENGSettings(_LearningRate):
    """`ngplus.baselines.SENG` on a base optimizer; every field but `base` is its argument of that name."""

    damping: float
    update_every: int
    base: SGDBase | AdamBase | AdamWBase | AdagradBase
    sketch_size: int | None = None
    samples: Literal["batch", "rows"] = "batch"
    max_samples: int | None = None
    batch_dim: int = 0


@dataclass(frozen=True, kw_only=True)
class ShampooSettings(_LearningRate):
    """`ngplus.baselines.Shampoo` on a base optimizer; every field but `base` is its argument of that name."""

    damping: float
    update_every: int
    base: SGDBase | AdamBase | AdamWBase | AdagradBase
    ema: float | None = None
    max_side: int = 2048
    grafting: Literal["none", "sgd"] = "none"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What it takes to be an optimizer here.

    Attributes:
        settings: a dataclass.
        build: makes the optimizer from a model and settings.
        versions: of the distribution that one from outside comes from, by name.
    """

    settings: type
    build: Callable[[nn.Module, Any], Optimizer]
    versions: Mapping[str, str] = field(default_factory=dict)


def _torch_entry(settings: type, cls: type[Optimizer]) -> Entry:
    return Entry(settings=settings, build=lambda model, given: cls(model.parameters(), **asdict(given)))


def _build_adam(model: nn.Module, settings: AdamSettings) -> Optimizer:
    refuse_sparse_gradients(model, "Adam")
    return torch.optim.Adam(model.parameters(), **asdict(settings))


def _build_adamw(model: nn.Module, settings: AdamWSettings) -> Optimizer:
    refuse_sparse_gradients(model, "AdamW")
    return torch.optim.AdamW(model.parameters(), **_join_betas(asdict(settings)))


def _join_betas(options: dict[str, Any]) -> dict[str, Any]:
    """The two β of AdamW as the argument they are."""
    if "beta1" not in options:
        return options
    others = {name: value for name, value in options.items() if name not in ("beta1", "beta2")}
    return others | {"betas": (options["beta1"], options["beta2"])}


def _build_lars(model: nn.Module, settings: LARSSettings) -> Optimizer:
    from pytorch_optimizer import LARS  # takes seconds to import, so only where it is wanted

    return LARS(model.parameters(), **asdict(settings))


def _build_soap(model: nn.Module, settings: SOAPSettings) -> Optimizer:
    from pytorch_optimizer import SOAP  # as for LARS

    refuse_sparse_gradients(model, "SOAP")
    return SOAP(model.parameters(), **asdict(settings))


def _build_shampoo(model: nn.Module, settings: ShampooSettings) -> Optimizer:
    refuse_sparse_gradients(model, "Shampoo")
    return _around_base(Shampoo, model, settings)


def _around_base(cls: Callable[..., Optimizer], model: nn.Module, settings: Any) -> Optimizer:
    base = settings.base
    if isinstance(base, AdamBase | AdamWBase):
        refuse_sparse_gradients(model, f"{cls.__name__} around {_BASE_CLASSES[type(base)].__name__}")
    own = {name: value for name, value in asdict(settings).items() if value is not None}  # None keeps its own default
    base_arguments = _join_betas(own.pop("base"))
    base_class = getattr(base, "optimizer_class", None) or _BASE_CLASSES[type(base)]
    return cls(model, base=base_class, **own, **base_arguments)


def _entry_around_base(settings: type, cls: Callable[..., Optimizer]) -> Entry:
    return Entry(settings=settings, build=partial(_around_base, cls))


OPTIMIZERS: dict[str, Entry] = {
    "adagrad": _torch_entry(AdagradSettings, torch.optim.Adagrad),
    "adam": Entry(settings=AdamSettings, build=_build_adam),
    "adamw": Entry(settings=AdamWSettings, build=_build_adamw),
    "kfac": _entry_around_base(KFACSettings, KFAC),
    "lars": Entry(settings=LARSSettings, build=_build_lars),
    "muon": Entry(settings=MuonSettings, build=lambda model, given: MuonAndAdamW(model, **asdict(given))),
    "ngplus": _entry_around_base(NGPlusSettings, NGPlus),
    "seng": _entry_around_base(SENGSettings, SENG),
    "sgd": _torch_entry(SGDSettings, torch.optim.SGD),
    "shampoo": Entry(settings=ShampooSettings, build=_build_shampoo),
    "soap": Entry(settings=SOAPSettings, build=_build_soap),
}


def find_entry(name: str, where: str = "optimizer") -> Entry:
    """The entry of an optimizer whose name may carry a suffix, as ``ngplus-rows`` does.

    Args:
        name: as in a recipe.
        where: file and table, for the error.

    Returns:
        The settings dataclass and the function that builds the optimizer.

    Raises:
        SettingsError: for a name that is not there; lists what is.
    """
    registered, _, _ = name.partition("-")
    if registered not in OPTIMIZERS:
        raise SettingsError(
            f"{where} = {name!r}: there is no such optimizer; {list_allowed(OPTIMIZERS)}, "
            "or one of these with a suffix, e.g. 'ngplus-adam'"
        )
    check_name(name, where)
    return OPTIMIZERS[registered]


def check_name(name: str, where: str) -> None:
    """Refuse what cannot be part of a file's name.

    Args:
        name: of an optimizer.
        where: file and table, for the error.

    Raises:
        SettingsError: names it and what is allowed.
    """
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        raise SettingsError(f"{where} = {name!r}: must be small letters and digits, with hyphens between")


def find_outside(name: str, table: Mapping[str, Any], where: str, folder: Path) -> Entry:
    """The entry of an optimizer that a recipe's table may take from outside.

    Args:
        name: as in the recipe.
        table: its settings; ``kind``, or ``kind`` in its table ``base``, says where an optimizer from outside is.
        where: file and table of all optimizers, for the error.
        folder: of the recipe, from which a relative path is seen.

    Returns:
        The entry of that optimizer, of one of `OPTIMIZERS` around that base, or else of one of `OPTIMIZERS`.

    Raises:
        SettingsError: for a name that is not there; lists what is.
        PluginError: what is outside cannot be had.
    """
    if "kind" in table:
        check_name(name, f"{where}: name")
        found = load_outside(str(table["kind"]), given=table, where=f"{where}: {name}: kind", folder=folder)
        return Entry(settings=found.settings, build=found.build, versions=found.plugin.versions)
    entry = find_entry(name, f"{where}: name")
    base = table.get("base")
    kind = base.get("kind") if isinstance(base, Mapping) else None
    takes_base = "base" in {each.name for each in fields(entry.settings)}
    if (
        not takes_base
        or not isinstance(kind, str)
        or not (is_spec(kind) or kind in list_entry_points(OPTIMIZERS_GROUP))
    ):
        return entry
    found = load_outside(kind, where=f"{where}: {name}: base: kind", folder=folder)
    base_settings = make_base(found, f"{where}: {name}: base: kind")
    both = {each.name for each in fields(entry.settings)} & {each.name for each in fields(base_settings)}
    if both:
        raise SettingsError(f"{where}: {name}: base: {kind} and {name} both have a setting {', '.join(sorted(both))}")
    settings = make_dataclass(
        entry.settings.__name__, [("base", base_settings)], bases=(entry.settings,), frozen=True, kw_only=True
    )
    return Entry(settings=settings, build=entry.build, versions=found.plugin.versions)
