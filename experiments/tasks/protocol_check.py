"""Whether a task keeps to the protocol where a type cannot say it: what depends on what, and what is a number."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from experiments.errors import UserError
from experiments.tasks.protocol import Task


class ProtocolError(UserError):
    """A task that does not keep to the protocol; the message says where."""


def check_task(make: Callable[[], Task]) -> None:
    """Check a task on a CPU: two epochs of batches, two models, one step.

    Args:
        make: makes the task; called twice.

    Raises:
        ProtocolError: says what is not so.
    """
    task, again = make(), make()
    _expect(len(task.dataset.sha256) == 64, "dataset.sha256 must have 64 hexadecimal digits")
    _expect(task.dataset == again.dataset, "the dataset must be the same each time the task is made")
    model, other = _build(task), _build(again)
    _expect(_alike(model, other), "initial weights must depend on torch's global generator alone")
    batches = list(task.train_batches(0, 1))
    _expect(len(batches) == task.steps_per_epoch(), "train_batches() must yield steps_per_epoch() batches")
    losses = _losses(task, model, batches)
    _expect(_losses(again, other, again.train_batches(0, 1)) == losses, "an epoch must be the same at the same seed")
    _expect(_losses(task, model, task.train_batches(0, 2)) != losses, "the order of batches must depend on the seed")
    _expect(_losses(task, model, task.train_batches(1, 1)) != losses, "the order of batches must depend on the epoch")
    model.train()
    loss = task.loss(model, task.to_device(batches[0], "cpu"))
    _expect(loss.requires_grad, "loss() must have a graph")
    loss.backward()
    _expect(any(each.grad is not None for each in model.parameters()), "the graph of loss() must go to the parameters")
    before = {name: each.clone() for name, each in model.state_dict().items()}
    for split in ("validation", "test"):
        model.eval()
        with torch.no_grad():
            found = task.evaluate(model, split)
        _expect(math.isfinite(found.loss) and math.isfinite(found.metric), f"evaluate() of {split} must give numbers")
    _expect(_same(before, model.state_dict()), "evaluate() must leave the model as it is")


def _expect(fits: bool, what: str) -> None:
    if not fits:
        raise ProtocolError(what)


def _build(task: Task) -> nn.Module:
    torch.manual_seed(0)
    return task.build_model()


def _losses(task: Task, model: nn.Module, batches: Any) -> list[float]:
    """Of each batch, without dropout."""
    model.eval()
    with torch.no_grad():
        found = [task.loss(model, task.to_device(batch, "cpu")) for batch in batches]
    _expect(all(each.dim() == 0 and math.isfinite(each.item()) for each in found), "loss() must be one finite number")
    return [each.item() for each in found]


def _alike(one: nn.Module, other: nn.Module) -> bool:
    return _same(one.state_dict(), other.state_dict())


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(each, other[name]) for name, each in one.items())
