"""Optimizers from outside: any class or function, its settings read from its signature.

In a recipe, ``kind`` says where it is:

    [optimizers.lion]
    kind = { value = "pytorch_optimizer:Lion", source = "pytorch-optimizer" }
    lr = { value = 1e-3, source = "untuned" }

It is a class of `torch.optim.Optimizer`, made with the model's parameters (with the model, if its first argument is
called ``model``), or a function ``(model, **settings) -> Optimizer``. A class can be the base of NG+ as well.
"""

import inspect
import math
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import nn
from torch.optim import Optimizer

from experiments.plugins import OPTIMIZERS_GROUP, Plugin, PluginError, describe_failure, load_plugin

# What a setting may be where neither its annotation nor its default says.
ANYTHING = bool | int | float | str | tuple[float, ...] | None
_PLAIN = (bool, int, float, str, type(None))
# What a first argument is called that is no iterable of parameters.
_MODEL = ("model", "module")
# What a recipe's table has of its own.
_RESERVED = ("kind", "schedule", "damping_schedule")


@dataclass(frozen=True, kw_only=True)
class OutsideOptimizer:
    """An optimizer from outside.

    Attributes:
        plugin: where it is from.
        settings: a frozen dataclass of its settings, with ``kind`` where it is.
        build: makes one from a model and settings.
    """

    plugin: Plugin
    settings: type
    build: Callable[[nn.Module, Any], Optimizer]


def load_outside(
    spec: str, *, given: Iterable[str] = (), where: str = "optimizer", folder: Path = Path()
) -> OutsideOptimizer:
    """Import an optimizer and read its signature.

    Args:
        spec: see `plugins.load_plugin`.
        given: names of settings, which a function that takes any (``**settings``) is taken to have.
        where: what is asked for, for the error.
        folder: that a relative path is seen from.

    Returns:
        Its settings and what builds it.

    Raises:
        PluginError: it cannot be imported, is no optimizer, or needs what no recipe can give.
    """
    plugin = load_plugin(spec, group=OPTIMIZERS_GROUP, where=where, folder=folder)
    value = plugin.value
    _check_kind(value, f"{where} = {spec!r}")
    settings = _read_signature(value, given, spec, f"{where} = {spec!r}")
    takes_model = not isinstance(value, type) or _first(value) in _MODEL

    def build(model: nn.Module, settings: Any) -> Optimizer:
        chosen = {field.name: getattr(settings, field.name) for field in fields(settings)}
        try:
            made = value(model if takes_model else model.parameters(), **chosen)
        except (ValueError, TypeError):  # of a setting: said in one line
            raise
        except Exception as error:
            raise PluginError(f"{spec} could not be made:\n{describe_failure(error)}") from None
        if not isinstance(made, Optimizer):
            raise TypeError(f"{spec} returned a {type(made).__name__}: must be a torch.optim.Optimizer")
        return made

    return OutsideOptimizer(plugin=plugin, settings=settings, build=build)


def make_base(outside: OutsideOptimizer, where: str) -> type:
    """What NG+ can be around: the settings without the learning rate, and the class as ``optimizer_class``.

    Args:
        outside: a class that is made with parameters.
        where: what is asked for, for the error.

    Returns:
        A frozen dataclass, as `registry.SGDBase` is.

    Raises:
        PluginError: it is no such class.
    """
    cls = outside.plugin.value
    if not isinstance(cls, type) or _first(cls) in _MODEL:
        raise PluginError(f"{where} = {outside.plugin.spec!r}: a base must be a class that is made with parameters")
    own = [(each.name, each.type, each) for each in fields(outside.settings) if each.name != "lr"]
    again = [(name, hint, field(default=each.default)) for name, hint, each in own]
    namespace = {"kind": outside.settings.kind, "optimizer_class": cls}  # type: ignore[attr-defined]
    return make_dataclass(f"{cls.__name__}Base", again, namespace=namespace, frozen=True, kw_only=True)


def _check_kind(value: Any, where: str) -> None:
    if isinstance(value, type):
        if not issubclass(value, Optimizer):
            bases = ", ".join(base.__name__ for base in value.__mro__[1:])
            raise PluginError(f"{where}: is no optimizer: must inherit from torch.optim.Optimizer, not from {bases}")
        closure = inspect.signature(value.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise PluginError(f"{where}: its step() needs a closure, which training does not give")
    elif not inspect.isroutine(value):
        raise PluginError(
            f"{where}: is no optimizer: must be a class of torch.optim.Optimizer, "
            f"or a function (model, **settings) that returns one, not a {type(value).__name__}"
        )


def _first(value: Any) -> str:
    """The name of the first argument, ``""`` without one."""
    return next(iter(inspect.signature(value).parameters), "")


def _read_signature(value: Any, given: Iterable[str], spec: str, where: str) -> type:
    first, *own = inspect.signature(value).parameters.values() or (None,)
    if first is None:
        raise PluginError(f"{where}: takes no argument: must take the model, or its parameters, first")
    hints = _hints(value)
    found: list[tuple[Any, ...]] = []
    for parameter in own:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or parameter.name in _RESERVED:
            continue
        hint = _plain_hint(hints.get(parameter.name, parameter.annotation), parameter.default)
        if parameter.default is parameter.empty:
            if hint is None:
                raise PluginError(
                    f"{where}: needs {parameter.name}, which no plain value can be: "
                    "write a function (model, **settings) that makes it"
                )
            found.append((parameter.name, hint))
        elif hint is not None and _is_plain(parameter.default):
            found.append((parameter.name, hint, _freeze(parameter.default)))
    # A class that swallows what it does not know, as many do, would swallow a typing mistake: only names count.
    if not isinstance(value, type) and any(each.kind is each.VAR_KEYWORD for each in own):
        named = {first.name, *(each[0] for each in found)}
        found += [(name, ANYTHING, None) for name in given if name not in named]
    name = getattr(value, "__name__", "Outside")
    return make_dataclass(f"{name}Settings", found, namespace={"kind": spec}, frozen=True, kw_only=True)


def _hints(value: Any) -> Mapping[str, Any]:
    try:
        return get_type_hints(value.__init__ if isinstance(value, type) else value)
    except Exception:  # an annotation that names what is not there at run time: the default has to do
        return {}


def _plain_hint(hint: Any, default: Any) -> Any:
    """What of an annotation a recipe can give, or else the default's kind; ``None`` if it can give nothing."""
    kept = _keep_plain(hint)
    if kept is not None:
        return kept
    if default is inspect.Parameter.empty:
        return ANYTHING if hint is inspect.Parameter.empty or isinstance(hint, str) else None
    if not _is_plain(default):
        return None
    if default is None:
        return ANYTHING if hint is inspect.Parameter.empty or isinstance(hint, str) else None
    if isinstance(default, list | tuple):
        return tuple[ANYTHING, ...]
    # A whole number as a default may well stand for any number.
    return int | float if type(default) is int else type(default)


def _keep_plain(hint: Any) -> Any:
    origin = get_origin(hint)
    if hint in _PLAIN or origin is Literal:
        return hint
    if origin in (list, tuple):
        items = [_keep_plain(each) for each in get_args(hint) if each is not Ellipsis]
        if not items or any(each is None for each in items):
            return None
        whole = origin is tuple and get_args(hint)[-1] is not Ellipsis
        return tuple[*items] if whole else tuple[items[0], ...]
    if origin in (Union, types.UnionType):
        members = [each for each in map(_keep_plain, get_args(hint)) if each is not None]
        if not [each for each in members if each is not type(None)]:
            return None
        # A number that is whole stays whole.
        members.sort(key=lambda each: each is float)
        return Union[tuple(members)]  # noqa: UP007 made of a list
    return None


def _is_plain(value: Any) -> bool:
    """Whether a record can hold it."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN) and not (isinstance(value, float) and not math.isfinite(value))


def _freeze(value: Any) -> Any:
    return tuple(map(_freeze, value)) if isinstance(value, list | tuple) else value
