"""Every use that is made of torch beyond its public interface, and of the interpreter, each with its reason."""

from __future__ import annotations

import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._dynamo import eval_frame
from torch._compile import _disable_dynamo as run_outside_of_graphs
from torch.autograd.graph import Node
from torch.distributed.distributed_c10d import _get_default_store
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode, _get_current_function_mode

# A backward pass ---------------------------------------------------------------------------------------------------
# Hooks on tensors get a gradient and nothing of the pass that brings it.


def find_accumulator(parameter: Tensor) -> Node:
    """What adds to the ``.grad`` of a parameter that requires a gradient, in any backward pass.

    In half of the time of `torch.autograd.graph.get_gradient_edge`, which has other tensors in mind too.
    """
    if not torch.is_grad_enabled():
        return torch.autograd.graph.get_gradient_edge(parameter).node
    view = parameter.view_as(parameter)
    assert view.grad_fn is not None
    accumulator = view.grad_fn.next_functions[0][0]
    assert accumulator is not None
    return accumulator


def accumulates(accumulator: Node) -> bool:
    """Whether the backward pass that is running adds to ``.grad`` through this node.

    `torch.autograd.grad` returns gradients instead.
    """
    try:
        return torch._C._will_engine_execute_node(accumulator)
    except RuntimeError:  # it returns the gradient of this very weight
        return False


def backward_pass_number() -> int:
    """A number of the backward pass that is running, which no other has."""
    return torch._C._current_graph_task_id()


def runs_python_backward() -> bool:
    """Whether the backward of a function that is written in Python runs, as a reentrant checkpoint's is; not a hook."""
    return isinstance(torch._C._current_autograd_node(), torch.autograd.function.BackwardCFunction)


def at_end_of_backward(run: Callable[[], Any]) -> None:
    """Have something run at the end of the backward pass that is running."""
    torch.autograd.Variable._execution_engine.queue_callback(run)


def retains_graph() -> bool:
    """Whether the backward pass that is running leaves its graph to another."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


# The autograd graph ------------------------------------------------------------------------------------------------
# Its nodes are numbered in the order in which a thread makes them, which tells the call that made one.


def node_number(node: Node) -> int:
    """The number of a node; for a leaf's the largest there is."""
    return node._sequence_nr()


def next_node_number() -> int:
    """The number of the next node that this thread makes."""
    return torch._C._autograd._get_sequence_nr()


# Function calls ----------------------------------------------------------------------------------------------------


def is_transformed() -> bool:
    """Whether `torch.func` or `torch.jit.trace` runs what is called now: it makes no graph of its own."""
    tracing: bool = torch._C._is_tracing()
    return tracing or torch._C._functorch.maybe_current_level() is not None


def is_dual() -> bool:
    """Whether what is called now may be differentiated forward, which functions with a backward pass alone refuse."""
    return torch.autograd.forward_ad._current_level >= 0


def keeps_parametrized() -> bool:
    """Whether `torch.nn.utils.parametrize.cached` is on, so that the next call may use a weight that this one made.

    Nothing public says so.
    """
    return parametrize._cache_enabled > 0


def is_watched() -> bool:
    """Whether anyone else may change what a function called now gets, or what of it is saved for a backward pass.

    Function modes, in one of which this is called and which does not count, and hooks on saved tensors: those of
    checkpoints compare what is saved in a forward pass with what is saved in the next.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None or torch._C._len_torch_function_stack() > 0


def unwrap_transformed(tensor: Tensor) -> Tensor:
    """The tensor that the transforms of `torch.func` around a call have wrapped."""
    functorch: Any = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def as_plain(value: Any) -> Any:
    """A tensor of a class whose functions are those of torch, as monai's ``MetaTensor``, as a `torch.Tensor`.

    Any other value, and a tensor that is more than its elements, such as a nested one or a `DTensor`, as it is.
    """
    if not isinstance(value, Tensor) or type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return value
    return value.as_subclass(Tensor)


def find_node(tensor: Tensor) -> Node | None:
    """What made a tensor, or None.

    Of a view that was made without grad mode and whose base was changed in place since, torch refuses to tell: nothing.
    """
    try:
        return tensor.grad_fn
    except RuntimeError:
        return None


@contextmanager
def quiet_vmap() -> Iterator[None]:
    """Without vmap's warning of functions that it calls one element at a time."""
    torch._C._functorch._set_vmap_fallback_warning_enabled(False)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._functorch._set_vmap_fallback_warning_enabled(True)  # type: ignore[attr-defined]


def is_current_mode(mode: TorchFunctionMode) -> bool:
    """Whether ``mode`` is the innermost function mode of this thread, so that it may be left."""
    return _get_current_function_mode() is mode  # type: ignore[no-untyped-call]


def with_globals(function: Any, replaced: Mapping[str, Any]) -> Callable[..., Any]:
    """A copy of a Python function that finds other values under some of its global names.

    Replacing them in the function's module would replace them for other threads too.
    """
    namespace = {**function.__globals__, **replaced}
    copy = types.FunctionType(
        function.__code__, namespace, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def undispatched(function: Any) -> Callable[..., Any]:
    """``function`` without its first step, which hands the whole call to the function mode that is on.

    So the mode sees the functions that it calls, as the projections of attention.
    """
    return with_globals(function, {"has_torch_function": lambda _: False})


grouped_mm: Any = getattr(torch, "_grouped_mm", None)
"""What `torch.nn.functional.grouped_mm` calls, which a function mode sees in its place; None before torch 2.8."""


def frames() -> Iterator[types.FrameType]:
    """The frames of this thread's stack, from the caller's caller outwards."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def keyword_arguments() -> Mapping[str, Any]:
    """Those of the module's call whose hook this is called from; hooks of all modules are not given them."""
    call = nn.Module._call_impl.__code__
    codes = {call, *(each for each in call.co_consts if isinstance(each, types.CodeType))}
    for frame in frames():
        if frame.f_code in codes:
            found: Mapping[str, Any] = frame.f_locals.get("kwargs", {})
            return found
    return {}


# Memory and precision ----------------------------------------------------------------------------------------------


def shares_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are views of the same memory."""
    return torch._C._is_alias_of(one, other)  # type: ignore[attr-defined,no-any-return]


def is_autocast_enabled() -> bool:
    """Whether autocast is on for any device: one call in place of one for each."""
    return torch._C._is_any_autocast_enabled()


# Several processes -------------------------------------------------------------------------------------------------
# A collective that fails does not tell which process was not there; what they share besides collectives does.


def announce(what: str) -> None:
    """Tell the other processes of the default group that this one has come to ``what``."""
    _get_default_store().set(f"ngplus/{dist.get_rank()}", what)


def find_absent(what: str, seconds: float) -> list[int]:
    """The ranks of the processes that have not come to ``what`` after so many seconds; none where nobody can tell."""
    deadline, store = time.monotonic() + seconds, _get_default_store()
    others = [rank for rank in range(dist.get_world_size()) if rank != dist.get_rank()]
    absent = [0]  # it holds the store where no launcher does
    try:
        while others and time.monotonic() < deadline:
            others = [r for r in others if not store.check([key := f"ngplus/{r}"]) or store.get(key) != what.encode()]
            absent = others
            time.sleep(seconds / 20)
    except RuntimeError:  # whoever holds the store is gone
        pass
    return absent


# Sharded models ----------------------------------------------------------------------------------------------------
# With `FSDPModule.set_requires_all_reduce(False)` a backward pass brings no gradient to a parameter: fully_shard keeps
# the sum over the shards' processes to itself, until a pass that reduces it over the replicas too.


def find_kept_back(model: nn.Module) -> set[int]:
    """The ids of a model's sharded parameters whose gradient `fully_shard` keeps back at the moment."""
    from torch.distributed.fsdp import FSDPModule  # takes time to import, and a model that has it has imported it

    groups = [
        group
        for module in model.modules()
        if isinstance(module, FSDPModule)
        for group in module._get_fsdp_state()._fsdp_param_groups
    ]
    return {
        id(each.sharded_param)
        for group in groups
        if group._partial_reduce_output is not None
        for each in group.fsdp_params
    }


# The compiler ------------------------------------------------------------------------------------------------------

_set_frame_count = getattr(eval_frame, "set_fullgraph_compiled_frame_count", None)


def is_in_fullgraph() -> bool:
    """Whether a function compiled with ``fullgraph=True`` runs, though uncompiled for the moment.

    torch counts the frames that it compiles inside of one, from −1 outside; the count is only told as it is set.
    """
    if _set_frame_count is None or (count := _set_frame_count(-1)) < 0:
        return False
    _set_frame_count(count)
    return True


__all__ = [
    "accumulates",
    "announce",
    "as_plain",
    "at_end_of_backward",
    "backward_pass_number",
    "find_absent",
    "find_accumulator",
    "find_kept_back",
    "find_node",
    "frames",
    "grouped_mm",
    "is_autocast_enabled",
    "is_current_mode",
    "is_dual",
    "is_in_fullgraph",
    "is_transformed",
    "is_watched",
    "keyword_arguments",
    "next_node_number",
    "node_number",
    "quiet_vmap",
    "retains_graph",
    "run_outside_of_graphs",
    "runs_python_backward",
    "shares_memory",
    "undispatched",
    "unwrap_transformed",
    "with_globals",
]
