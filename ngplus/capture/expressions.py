"""What the model computes of its weights alone, before samples come in: `weight_norm`, a transpose, positions.

A tensor is free of samples where all that it is made of is: parameters, buffers, constants. The calls that lead from
weights to it are kept for as long as the model's call runs, so that a function of it is a function of the weights.

What is drawn at random, or kept by a module outside of its buffers, may be noise on the weights as well as samples: a
generator's codes, a state. It is loose: where it is joined with something made of weights that it does not enlarge, it
is taken for a constant, and as samples everywhere else.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ngplus.capture.contractions import UnsupportedCall
from ngplus.capture.function_mode import FunctionCall, find_owner
from ngplus.layers import Layer


@dataclass(frozen=True, eq=False)
class Source:
    """A parameter of a layer: its weight, or its bias."""

    layer: Layer
    parameter: nn.Parameter

    @property
    def key(self) -> tuple[int, int]:
        """Equal for the same parameter of the same layer."""
        return id(self.layer), id(self.parameter)


Sources = Mapping[tuple[int, int], Source]


@dataclass(frozen=True, eq=False)
class Expression:
    """A tensor that is free of samples.

    Attributes:
        value: the tensor, which is kept so that no other gets its id.
        call: what made it; None for a constant.
        place: of it among the call's outputs.
        sources: parameters that it carries a gradient to, by no handler's reading.
        changed: whether it was changed in place since.
    """

    value: Tensor
    call: FunctionCall | None
    place: int
    sources: Sources
    changed: bool = False


CONSTANTS = frozenset(
    {torch.arange, torch.zeros, torch.ones, torch.full, torch.eye, torch.linspace, torch.tensor, torch.as_tensor}
)
"""Functions that make a tensor of none, and the same one each time."""


LOOSE = frozenset({torch.rand, torch.randn, torch.randint, torch.randperm, torch.empty})
"""Functions that make a tensor of none that is loose: those of noise, or of the memory for it."""


class Expressions(threading.local):
    """The tensors free of samples that the model's call which runs on this thread has made.

    Args:
        modules: of the model.

    Attributes:
        static: ids of their parameters and buffers.
        known: the tensors, by id.
    """

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        self.static: set[int] = set()
        self._kept: dict[int, weakref.ref[Tensor]] = {}
        for module in modules:
            self._kept.update((id(each), weakref.ref(each)) for each in _kept_tensors(module) if each.grad_fn is None)
            buffers = [each for each in module._buffers.values() if each is not None]  # which may be views themselves
            self.static.update(
                map(id, module._parameters.values()), map(id, map(find_owner, buffers)), map(id, buffers)
            )
        self.known: dict[int, Expression] = {}
        self._loose = dict(self._kept)  # weakly: `fully_shard` makes its buffers by ``torch.empty``

    def clear(self) -> None:
        """Forget the tensors."""
        self.known = {}
        self._loose = dict(self._kept)

    def find(self, tensor: Tensor) -> Expression | None:
        """What is known of a tensor that is free of samples and no parameter."""
        return self.known.get(id(tensor))

    def is_free(self, tensor: Tensor, owner: Tensor) -> bool:
        """Whether a tensor, or what it is a view of, is free of samples, and not loose."""
        return id(owner) in self.static or id(tensor) in self.known or id(owner) in self.known

    def is_loose(self, tensor: Tensor, owner: Tensor) -> bool:
        """Whether a tensor, or what it is a view of, may hold samples or be a constant."""
        return any((found := self._loose.get(id(each))) is not None and found() is each for each in (tensor, owner))

    def _follow_loose(self, call: FunctionCall) -> None:
        for value in find_outputs(call):
            for each in (value, find_owner(value)):
                self.known.pop(id(each), None)
                self._loose[id(each)] = weakref.ref(each)

    def follow(self, call: FunctionCall, sources: Sources, *, loose: bool = False) -> None:
        """Note what a call returns whose arguments are all free of samples, or loose.

        Args:
            call: the call.
            sources: the parameters that it carries a gradient to, by no handler's reading.
            loose: whether what it returns is loose.
        """
        if loose:
            self._follow_loose(call)
            return
        arguments = {id(each) for each in call.tensors}
        in_place = changes_in_place(call)
        for place, value in enumerate(find_outputs(call)):
            if id(value) in arguments:  # changed, or as it was: ``float`` of what is float32
                for changed in {id(each): each for each in (value, find_owner(value))}.values() if in_place else ():
                    known = self.known.get(id(changed))
                    carried = {**(known.sources if known is not None else {}), **sources}
                    self.known[id(changed)] = Expression(changed, None, 0, carried, changed=bool(carried))
            elif sources and not (value.requires_grad or find_owner(value).requires_grad):
                self.known[id(value)] = Expression(value, None, 0, {})
            else:
                self.known[id(value)] = Expression(value, call if sources else None, place, sources)

    def drop(self, call: FunctionCall) -> None:
        """Forget a tensor that a call with samples has changed in place."""
        if (self.known or self._loose) and changes_in_place(call):
            for changed in (call.args[0], find_owner(call.args[0])):
                self.known.pop(id(changed), None)
                self._loose.pop(id(changed), None)


def _kept_tensors(module: nn.Module) -> Iterator[Tensor]:
    """The tensors that a module keeps as plain attributes, or in lists and dicts."""
    for name, value in vars(module).items():
        if name in ("_parameters", "_buffers", "_modules"):
            continue
        members = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
        yield from (each for each in members if isinstance(each, Tensor))


def changes_in_place(call: FunctionCall) -> bool:
    """Whether a call changes its first argument."""
    name = call.name
    if not call.args or not isinstance(call.args[0], Tensor):
        return False
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and call.output is call.args[0])
    return name.endswith("_")


def find_outputs(call: FunctionCall) -> Iterator[Tensor]:
    """The tensors that a call returned."""
    output = call.output
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        yield from (each for each in output if isinstance(each, Tensor))


def _multiply_bilinear(one: Tensor, other: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x₁ᵀ W x₂ + b for each row of W."""
    product: Tensor = torch.einsum("...i,oij,...j->...o", one, weight, other)
    return product if bias is None else product + bias


def _normalize_weight(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """G v / ‖v‖, with the norm over all dimensions but one, or over all for −1."""
    dims = [each for each in range(v.dim()) if each != dim]
    norms: Tensor = torch.linalg.vector_norm(v, dim=dims, keepdim=True)
    return v * (g / norms)


def _norm_of_batch(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, *args: Any, **kwargs: Any
) -> Tensor:
    """`F.batch_norm`, which leaves alone the running statistics that it would only update."""
    bound = _BATCH_NORM.bind(input, running_mean, running_var, *args, **kwargs).arguments
    if bound.get("training", False):
        bound["running_mean"] = bound["running_var"] = None
    return F.batch_norm(**bound)


def _norm_of_instances(
    input: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """The same of `F.instance_norm`."""
    bound = _INSTANCE_NORM.bind(input, running_mean, running_var, *args, **kwargs).arguments
    if bound.get("use_input_stats", True):
        bound["running_mean"] = bound["running_var"] = None
    return F.instance_norm(**bound)


_BATCH_NORM, _INSTANCE_NORM = inspect.signature(F.batch_norm), inspect.signature(F.instance_norm)

_REWRITTEN: Mapping[Any, Callable[..., Any]] = {
    F.batch_norm: _norm_of_batch,
    F.instance_norm: _norm_of_instances,
    # The gradient of what is added to an argument does not depend on what that was before it was changed in place.
    Tensor.add_: torch.add,
    Tensor.__iadd__: torch.add,
    Tensor.sub_: torch.sub,
    Tensor.__isub__: torch.sub,
    # vmap has no rule for these.
    F.bilinear: _multiply_bilinear,
    torch._weight_norm: _normalize_weight,
}
"""Functions that have the same gradients as others."""


_REPEATING = frozenset(
    {
        Tensor.expand,
        Tensor.expand_as,
        Tensor.broadcast_to,
        torch.broadcast_to,
        Tensor.repeat,
        Tensor.tile,
        torch.tile,
        Tensor.repeat_interleave,
        torch.repeat_interleave,
    }
)
"""Functions that return copies of their argument."""


def _is_copied(tensor: Tensor, expressions: Expressions) -> bool:
    """Whether a tensor that is free of samples is made by a function that returns copies, or stacks or joins them."""
    known = expressions.find(tensor)
    if known is None or known.call is None:
        return False
    arguments = known.call.tensors
    repeats = known.call.function in _REPEATING and tensor.numel() > arguments[0].numel()
    repeats = repeats or len(set(map(id, arguments))) < len(arguments)
    return repeats or any(_is_copied(each, expressions) for each in arguments)


def rewrite(call: FunctionCall) -> Callable[..., Any]:
    """The function that is differentiated for a call.

    Args:
        call: the call.

    Returns:
        A function of the same arguments.

    Raises:
        UnsupportedCall: of one that changes an argument in place, so that it is not known any more.
    """
    if (function := _REWRITTEN.get(call.function)) is not None:
        return function
    if changes_in_place(call):
        raise UnsupportedCall(f"is used by {call.name}, which changes its argument in place")
    if _writes(call.function):
        raise UnsupportedCall(f"is used by {call.name}, which changes its arguments, so that it is not run again")
    return call.function


@functools.cache
def _writes(function: Any) -> bool:
    """Whether a function of torch changes what it is given, as observers of quantization do, by its schemas."""
    packet: Any = getattr(torch.ops.aten, getattr(function, "__name__", ""), None)
    packet = function if isinstance(function, torch._ops.OpOverloadPacket) else packet
    if isinstance(function, torch._ops.OpOverload):
        schemas = [function._schema]
    elif isinstance(packet, torch._ops.OpOverloadPacket):
        schemas = [getattr(packet, name)._schema for name in packet.overloads()]  # type: ignore[no-untyped-call]
    else:
        return False
    written = [
        [each.kwarg_only for each in schema.arguments if each.alias_info is not None and each.alias_info.is_write]
        for schema in schemas
        if schema.arguments
        and isinstance(schema.arguments[0].type, torch.TensorType)  # ``sort`` is also that of a list, in place
    ]
    return any(not all(kinds) for kinds in written)  # those by name alone are ``out``, which is no argument here


class Program:
    """A call as a function of some parameters and of the tensors with samples among its arguments.

    Args:
        call: the call.
        parameters: those that it is a function of.
        expressions: of its arguments.

    Attributes:
        inputs: the tensors with samples.
        shared: the other tensors but for parameters, as they were; they are free of samples.
        dtype: the one with the fewest bits that it is computed in.

    Raises:
        UnsupportedCall: where it cannot be called again.
    """

    def __init__(self, call: FunctionCall, parameters: Iterable[nn.Parameter], expressions: Expressions) -> None:
        self._parameters = {id(each) for each in parameters}
        self._expressions: dict[int, Expression] = {}
        leaves, self._structure = pytree.tree_flatten((call.args, call.kwargs))
        self._function = rewrite(call)
        self._is_input: list[bool] = []
        self._is_shared: list[bool] = []
        self._copies: list[bool] = []
        for place, leaf in enumerate(leaves):
            tensor = isinstance(leaf, Tensor)
            carries = tensor and self._collect(leaf, expressions)
            free = tensor and (
                isinstance(find_owner(leaf), nn.Parameter) or expressions.is_free(leaf, find_owner(leaf))
            )
            shared = carries or (free and not isinstance(leaf, nn.Parameter))
            if shared:
                self._copies.append(_is_copied(leaf, expressions))
            if free and not carries:
                leaves[place] = leaf.detach()
            self._is_shared.append(shared)
            self._is_input.append(tensor and not carries and not free)
        self.inputs = [leaf for leaf, each in zip(leaves, self._is_input, strict=True) if each]
        self.shared = [leaf for leaf, each in zip(leaves, self._is_shared, strict=True) if each]
        every = (
            *find_outputs(call),
            *self.inputs,
            *self.shared,
            *(each.value for each in self._expressions.values()),
        )
        self.dtype = min(
            (each.dtype for each in every if each.is_floating_point() or each.is_complex()),
            key=lambda each: -torch.finfo(each).eps,
        )
        self._leaves = [None if is_input else leaf for leaf, is_input in zip(leaves, self._is_input, strict=True)]

    @property
    def has_copies(self) -> bool:
        """Whether any of ``shared`` is made of several copies of the same."""
        return any(self._copies)

    def repeats(self, dim: int) -> list[bool]:
        """Which of ``shared`` are copies of the same, one behind the other along a dimension as far as is known."""
        return [
            copied or (each.layout == torch.strided and each.dim() > dim and each.stride(dim) == 0)
            for each, copied in zip(self.shared, self._copies, strict=True)
        ]

    def _collect(self, tensor: Tensor, expressions: Expressions) -> bool:
        """Whether a tensor is made of the parameters; keeps what is needed to make it again."""
        if id(tensor) in self._parameters:
            return True
        known = expressions.find(tensor)
        if known is None:
            if id(find_owner(tensor)) in self._parameters:
                raise UnsupportedCall("is used through a view that was made outside of the model's call")
            return False
        if not any(id(source.parameter) in self._parameters for source in known.sources.values()):
            return False
        if known.changed or known.call is None:
            raise UnsupportedCall("is used after an expression of it was changed in place")
        if id(tensor) not in self._expressions:
            rewrite(known.call)  # which refuses what cannot be called again
            self._expressions[id(tensor)] = known
            for argument in pytree.tree_leaves((known.call.args, known.call.kwargs)):
                if isinstance(argument, Tensor):
                    self._collect(argument, expressions)
        return True

    def check_memory(self) -> None:
        """Raise where the call cannot be made again: `fully_shard` frees weights as soon as backward is through them.

        Raises:
            UnsupportedCall: where the memory of a tensor is gone.
        """
        calls = [known.call for known in self._expressions.values() if known.call is not None]
        values = pytree.tree_leaves((self._leaves, *((call.args, call.kwargs) for call in calls)))
        plain = [e for e in values if type(e) in (Tensor, nn.Parameter) and e.layout == torch.strided and e.numel()]
        if not all(each.untyped_storage().size() for each in plain):
            raise UnsupportedCall("is used by a call whose weights are sharded again before its samples are complete")

    def evaluate_shared(self, values: Mapping[int, Tensor], convert: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """The tensors that are free of samples, with other values of the parameters.

        Args:
            values: of the parameters, by their ids.
            convert: applied to the tensors that are constants in this.

        Returns:
            In the order of ``shared``.
        """
        made: dict[int, Any] = {}
        return [self._evaluate(tensor, values, made, convert) for tensor in self.shared]

    def _evaluate(
        self, tensor: Any, values: Mapping[int, Tensor], made: dict[int, Any], convert: Callable[[Tensor], Tensor]
    ) -> Any:
        """An argument of a call: of a tensor what it is with other values of the parameters."""
        if not isinstance(tensor, Tensor):
            return tensor
        if id(tensor) in values:
            return values[id(tensor)]
        known = self._expressions.get(id(tensor))
        if known is None or known.call is None:
            return convert(tensor.detach())
        if id(known.call) not in made:
            leaves, structure = pytree.tree_flatten((known.call.args, known.call.kwargs))
            leaves = [self._evaluate(leaf, values, made, convert) for leaf in leaves]  # no closure: that were a cycle
            args, kwargs = pytree.tree_unflatten(leaves, structure)
            made[id(known.call)] = rewrite(known.call)(*args, **kwargs)
        output = made[id(known.call)]
        return output if isinstance(output, Tensor) else [e for e in output if isinstance(e, Tensor)][known.place]

    def run(self, inputs: Iterable[Tensor], shared: Iterable[Tensor], convert: Callable[[Tensor], Tensor]) -> Any:
        """The call's function on other inputs.

        Args:
            inputs: in place of ``inputs``.
            shared: in place of ``shared``.
            convert: applied to all other tensors.

        Returns:
            What it returns.
        """
        inputs, shared = iter(inputs), iter(shared)
        leaves = [
            next(inputs)
            if is_input
            else next(shared)
            if is_shared
            else convert(leaf)
            if isinstance(leaf, Tensor)
            else leaf
            for leaf, is_input, is_shared in zip(self._leaves, self._is_input, self._is_shared, strict=True)
        ]
        args, kwargs = pytree.tree_unflatten(leaves, self._structure)
        return self._function(*args, **kwargs)


__all__ = ["CONSTANTS", "Expressions", "Program", "Source", "Sources", "changes_in_place", "find_outputs"]
