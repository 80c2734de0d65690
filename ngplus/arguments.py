"""What `NGPlus` is given, checked before anything is made of it: the model, its parameters, and the base."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ngplus.options import Options, check_positive

Params = Iterable[Any]
"""Parameters, named parameters or parameter groups, as `torch.optim` takes them."""


def model_and_params(
    model: nn.Module | Params, params: Params | None, options: Options
) -> tuple[nn.Module | None, Params]:
    """The model, if it is one, and what `base` is to train."""
    for name, given in (("the first argument", model), ("params", params)):
        if isinstance(given, Tensor):
            raise TypeError(
                f"{name} must be an nn.Module or an iterable of tensors or dicts, got a tensor of shape "
                f"{tuple(given.shape)}: put it into a list"
            )
    if isinstance(model, nn.Module):
        _check_ready(model)
        return model, list(model.parameters() if params is None else params)
    if options.curvature == "per_sample":
        raise TypeError(
            'curvature="per_sample" watches the layers of a model: NGPlus needs an nn.Module, got '
            f'{type(model).__name__}; curvature="mini_batch" takes parameters alone'
        )
    if params is not None:
        raise TypeError("params is for an nn.Module; without one, give the parameter groups as the first argument")
    return None, list(model)


def _check_ready(model: nn.Module) -> None:
    if scripted := [name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]:
        raise TypeError(
            f"{scripted[0] or 'the model'} is a torch.jit.ScriptModule, whose calls cannot be seen: make the optimizer "
            "of a model that is not scripted"
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"{name} has no shape yet: run the model once before making the optimizer")
        if parameter.is_meta:
            raise ValueError(f"{name} is on the meta device: give it memory (to_empty) before making the optimizer")
    if sharded := [name for name, m in model.named_modules() if type(m).__name__ == "FullyShardedDataParallel"]:
        raise TypeError(f"{sharded[0] or 'the model'} is wrapped in FullyShardedDataParallel: {_WHOLE_WEIGHTS}")


def check_whole(named: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse weights that are spread over processes, with a `TypeError`."""
    for name, parameter in named:
        if "DTensor" in (type(parameter).__name__, type(parameter.data).__name__):
            raise TypeError(f"{name} is a DTensor: {_WHOLE_WEIGHTS}")
        if getattr(parameter, "_fsdp_flattened", False):  # by FullyShardedDataParallel(…, use_orig_params=True)
            raise TypeError(f"{name} is a part of a FullyShardedDataParallel's flat parameter: {_WHOLE_WEIGHTS}")


_WHOLE_WEIGHTS = (
    "NG+ needs whole weights and does not work under FSDP or tensor parallelism; "
    "wrap the model in torch.nn.parallel.DistributedDataParallel instead"
)


def make_base(base: Any, params: Params, lr: Any, options: dict[str, Any], owner: str) -> Optimizer:
    """The base optimizer, its arguments checked by name first."""
    if not (isinstance(base, type) and issubclass(base, Optimizer)):
        raise TypeError(f"base must be a torch.optim.Optimizer class, such as torch.optim.SGD, got {base!r}")
    known = inspect.signature(base).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    if (unknown := sorted(set(options) - set(known))) and not open_ended:
        allowed = ", ".join(name for name in known if name not in ("params", "lr"))
        raise TypeError(
            f"{', '.join(unknown)} is an option of neither {owner} nor its base {base.__name__}, which takes {allowed}"
        )
    make = cast(Callable[..., Optimizer], base)
    made = make([check_group(group) for group in params], lr=lr, **options)
    for group in made.param_groups:
        check_group(group)
    return made


def check_group(group: Any) -> Any:
    """A parameter group with its damping as a float; anything but a group is left to ``base``.

    Raises:
        TypeError: a damping that is no number.
        ValueError: a damping ≤ 0, or ``differentiable=True``.
    """
    if not isinstance(group, dict):
        return group
    if group.get("differentiable"):
        raise ValueError(
            "differentiable=True is not supported: the preconditioned gradient is made without a graph, so that "
            "derivatives through the step would be wrong"
        )
    if "damping" not in group:
        return group
    return {**group, "damping": check_positive("damping of a parameter group", group["damping"])}
