"""What the graph of a loss says of it: whether it is a mean or a sum, and of what kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

_PASSED = ("View", "Reshape", "Squeeze", "Unsqueeze", "ToCopy", "Clone", "Alias", "Add")
_SCALING = ("Div", "Mul")
_REDUCTIONS: dict[int, Literal["mean", "sum"]] = {1: "mean", 2: "sum"}
_REGRESSION = ("MseLoss", "HuberLoss", "SmoothL1Loss", "Pow")


@dataclass(frozen=True, kw_only=True)
class LossGraph:
    """What is known of a loss.

    Attributes:
        reduction: "mean" or "sum", a sum that is divided being a mean; None where it is neither alone.
        is_regression: whether that step is a squared error of some kind.
        ignored: targets that a cross-entropy ignores, and all it has.
    """

    reduction: Literal["mean", "sum"] | None
    is_regression: bool = False
    ignored: tuple[int, int] = (0, 0)


def read_loss(loss: Tensor) -> LossGraph:
    """Read the last steps of a loss.

    Args:
        loss: a scalar with a graph, before its backward pass.

    Returns:
        What is known of it.
    """
    found = _find_reducing(loss.grad_fn)
    nodes = [node for node, _ in found]
    reductions = {_reduction(node, is_scaled) for node, is_scaled in found}
    ignored = [_count_ignored(node) for node in nodes]
    return LossGraph(
        reduction=reductions.pop() if len(reductions) == 1 else None,
        is_regression=any(map(_is_regression, nodes)),
        ignored=max(ignored, default=(0, 0)),
    )


def _find_reducing(node: Any, is_scaled: bool = False) -> list[tuple[Any, bool]]:
    """The first nodes that reduce, each with whether a factor is behind it; sums of several losses are followed."""
    if node is None:
        return []
    if node.name().startswith((*_PASSED, *_SCALING)):
        scaled = is_scaled or node.name().startswith(_SCALING)
        return [found for behind, _ in node.next_functions for found in _find_reducing(behind, scaled)]
    return [(node, is_scaled)]


def _reduction(node: Any, is_scaled: bool) -> Literal["mean", "sum"] | None:
    """A sum that is multiplied or divided is taken for a mean."""
    kind = node.name()
    by_name: Literal["mean", "sum"] | None = (
        "mean" if kind.startswith("Mean") else "sum" if kind.startswith("Sum") else None
    )
    found = _REDUCTIONS.get(node._saved_reduction) if hasattr(node, "_saved_reduction") else by_name
    return "mean" if found == "sum" and is_scaled else found


def _is_regression(node: Any) -> bool:
    """Whether it is a squared error of torch's, or the mean or sum of what is written as one."""
    kind = node.name()
    if kind.startswith(("Mean", "Sum")) and (behind := node.next_functions[0][0]) is not None:
        kind = behind.name()
    return bool(kind.startswith(_REGRESSION))


def _count_ignored(node: Any) -> tuple[int, int]:
    if not hasattr(node, "_saved_ignore_index"):
        return 0, 0
    target, ignored = node._saved_target, node._saved_ignore_index
    # Saved as an unsigned number where it is negative.
    return int((target == (ignored + 2**63) % 2**64 - 2**63).sum()), target.numel()


__all__ = ["LossGraph", "read_loss"]
