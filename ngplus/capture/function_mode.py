"""The function mode that is on inside the model's calls, and what function calls tell of their arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ngplus._torch_internals import is_transformed, undispatched
from ngplus.capture.products import Product, find_product
from ngplus.capture.recurrent import RECURRENT_CALLS, RecurrentCall
from ngplus.curvature.gradient_sum import GradientSum


@dataclass(frozen=True, eq=False)
class TimeMajor:
    """What is known inside of ``F.multi_head_attention_forward`` and of recurrent layers.

    Inputs are (T, B, E) or (T·B, E).

    Attributes:
        batch: B.
        dimensions: of the input that the module takes, with a batch.
        input_shape: of the input, where it is the function's that is known, and not only the module's.
        is_sorted: whether its samples are those of a packed sequence, sorted by length.
    """

    batch: int
    dimensions: int
    input_shape: torch.Size | None = None
    is_sorted: bool = False


@dataclass(eq=False, slots=True)
class FunctionCall:
    """A call of a torch function.

    Attributes:
        function: what was called.
        args: its arguments.
        kwargs: its arguments by name.
        output: what it returned.
        time_major: the attention or the recurrent layer that it is a part of, or None.
        total: gives the weight's gradient in the backward pass, where that is found on the way; or None.
        tensors: those among its arguments, in lists and tuples too, whose values count.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    time_major: TimeMajor | None
    total: GradientSum | None = None
    tensors: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        if self.function in _LIKE_ANOTHER and self.args:
            self.tensors = [self.args[0]]
        else:
            arguments = (*self.args, *self.kwargs.values()) if self.kwargs else self.args
            self.tensors = [each for each in _flatten(arguments) if isinstance(each, Tensor)]

    @property
    def name(self) -> str:
        """Of the function, for messages."""
        return getattr(self.function, "__name__", str(self.function))

    def passes_gradient_to(self, argument: Tensor) -> bool:
        """Whether a gradient can come back through its output, which is not only a view of ``argument``."""
        owner, output = find_owner(argument), self.output
        if isinstance(output, Tensor) and output.requires_grad and output is not owner and output._base is not owner:
            return True
        outputs = (each for each in _flatten((self.output,)) if isinstance(each, Tensor))
        if any(each.requires_grad and each is not owner and each._base is not owner for each in outputs):
            return True
        # A transform keeps the graph of what is called in it, so that no output says that it has one.
        return is_transformed() and torch.is_grad_enabled()


def _flatten(arguments: Sequence[Any]) -> Sequence[Any]:
    """The arguments, and of lists and tuples what is in them."""
    if not any(isinstance(each, (list, tuple)) for each in arguments):
        return arguments
    return [
        each for argument in arguments for each in (argument if isinstance(argument, (list, tuple)) else (argument,))
    ]


def find_owner(tensor: Tensor) -> Tensor:
    """What the tensor is a view of, or itself."""
    return tensor if tensor._base is None else tensor._base


_LIKE_ANOTHER = frozenset({Tensor.to, Tensor.type_as, Tensor.expand_as, Tensor.view_as, Tensor.reshape_as})
"""Functions of one tensor, which may be given another to tell a dtype, a device or a shape by."""

_WITHOUT_TENSORS = (int, float, torch.Size, torch.device, torch.dtype)
"""What calls that ask something of a tensor return: most calls of a small model do."""


class CallObserver(Protocol):
    """Who is told of function calls, and says which of them are to be taken apart."""

    @property
    def armed(self) -> bool:
        """Whether there is anything to tell it."""
        ...

    def record_call(self, call: FunctionCall) -> None:
        """Take a call that has been made."""
        ...

    def sums_gradients_of(self, product: Product, time_major: TimeMajor | None) -> bool:
        """Whether the gradient of a product's weight may be found on the way to the curvature."""
        ...

    def awaits(self, arguments: Iterable[Any]) -> bool:
        """Whether the gradient of any of some arguments is awaited."""
        ...

    def trains(self, arguments: Iterable[Any]) -> bool:
        """Whether any of some tensors is made of weights alone and carries them a gradient."""
        ...

    def trace(self, arguments: Iterable[Any]) -> None:
        """Take the arguments of a call that is made of others, which are recorded in its place."""
        ...


class CaptureMode(TorchFunctionMode):
    """Tells an observer of every function call that is made while it is on.

    Args:
        observer: gives the observer, or None where it is no more, as a weak reference does.
    """

    def __init__(self, observer: Callable[[], CallObserver | None]) -> None:
        super().__init__()
        self._observer = observer
        self._time_major: TimeMajor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        observer = self._observer()
        if observer is None or not observer.armed:
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            query = args[0] if args else kwargs["query"]
            batch = query.shape[1] if query.dim() == 3 else 1
            return self._run_inside(partial(undispatched(func), *args, **kwargs), TimeMajor(batch, 3, query.shape))
        if (parse := RECURRENT_CALLS.get(func)) is not None and not kwargs:
            call = parse(*args)
            observer.trace(args)
            if observer.trains(map(find_owner, call.state)):  # parsed again where what the state goes into is recorded
                return self._run_inside(lambda: parse(*args).run(F.linear), self._inside(call))
            if observer.awaits(_flatten(args)):
                return self._run_unfused(call)
        total: GradientSum | None = None
        product = find_product(func, args, kwargs)
        if product is not None and observer.sums_gradients_of(product, self._time_major):
            total = GradientSum(product.weight)
            output = product.run(total)
        else:
            output = func(*args, **kwargs)
        if not isinstance(output, _WITHOUT_TENSORS):
            observer.record_call(FunctionCall(func, args, kwargs, output, self._time_major, total))
        return output

    @staticmethod
    def _inside(call: RecurrentCall) -> TimeMajor:
        return TimeMajor(call.batch, call.dimensions, is_sorted=call.counts is not None)

    def _run_unfused(self, call: RecurrentCall) -> Any:
        """Run a recurrent layer step by step, so that its products are recorded."""
        time_major = self._inside(call)

        def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            product: Tensor = self._run_inside(partial(F.linear, input, weight, bias), time_major)
            return product

        return call.run(linear)

    def _run_inside(self, run: Callable[[], Any], time_major: TimeMajor) -> Any:
        """Call with this mode on inside of it too, and its inputs known to be time-major."""
        outer, self._time_major = self._time_major, time_major
        try:
            with self:
                return run()
        finally:
            self._time_major = outer


__all__ = ["CallObserver", "CaptureMode", "FunctionCall", "TimeMajor", "find_owner"]
