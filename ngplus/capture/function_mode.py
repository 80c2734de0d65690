"""The function mode that is on inside the model's calls, and what function calls tell of their arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ngplus._torch_internals import is_transformed, undispatched


@dataclass(frozen=True)
class Attention:
    """What is known inside of ``F.multi_head_attention_forward``: inputs are (T, B, E) or (T·B, E).

    Attributes:
        batch: B.
    """

    batch: int


@dataclass(frozen=True, eq=False)
class FunctionCall:
    """A call of a torch function.

    Attributes:
        function: what was called.
        args: its arguments.
        kwargs: its arguments by name.
        output: what it returned.
        attention: the attention that it is a part of, or None.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    attention: Attention | None

    @property
    def name(self) -> str:
        """Of the function, for messages."""
        return getattr(self.function, "__name__", str(self.function))

    def tensors(self) -> Iterator[Tensor]:
        """The tensors among its arguments, those in lists and tuples too."""
        return (each for each in _flatten((*self.args, *self.kwargs.values())) if isinstance(each, Tensor))

    def passes_gradient_to(self, argument: Tensor) -> bool:
        """Whether a gradient can come back through its output, which is not only a view of ``argument``."""
        owner = owner_of(argument)
        outputs = (each for each in _flatten((self.output,)) if isinstance(each, Tensor))
        if any(each.requires_grad and each is not owner and each._base is not owner for each in outputs):
            return True
        # A transform keeps the graph of what is called in it, so that no output says that it has one.
        return is_transformed() and torch.is_grad_enabled()


def _flatten(arguments: Iterable[Any]) -> Iterator[Any]:
    for argument in arguments:
        if isinstance(argument, (list, tuple)):
            yield from argument
        else:
            yield argument


def owner_of(tensor: Tensor) -> Tensor:
    """What the tensor is a view of, or itself."""
    return tensor if tensor._base is None else tensor._base


class CaptureMode(TorchFunctionMode):
    """Hands every function call that is made while it is on to ``record``.

    Args:
        record: takes the calls.
    """

    def __init__(self, record: Callable[[FunctionCall], None]) -> None:
        super().__init__()
        self._record = record
        self._attention: Attention | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            return self._run_attention(args, kwargs)
        output = func(*args, **kwargs)
        self._record(FunctionCall(func, args, kwargs, output, self._attention))
        return output

    def _run_attention(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run attention with this mode on inside of it too, so that its projections are recorded."""
        query = args[0] if args else kwargs["query"]
        outer, self._attention = self._attention, Attention(query.shape[1] if query.dim() == 3 else 1)
        try:
            with self:
                return undispatched(F.multi_head_attention_forward)(*args, **kwargs)
        finally:
            self._attention = outer


__all__ = ["Attention", "CaptureMode", "FunctionCall", "owner_of"]
