"""What training asks of a task, and nothing more.

A task from outside says which version of this it follows, ``protocol = 1``; `PROTOCOL` grows when a method is added or
means something else.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor, nn

PROTOCOL = 1
Split = Literal["validation", "test"]


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """The data a run really saw, as it is named in every table.

    Attributes:
        name: what it is, e.g. ``"Fashion-MNIST, 4,000 embedded images"``; never the name of the data it
            stands in for.
        sha256: of the file the samples came from, or of the listing of a folder.
        licence: the data's licence.
        train_size: number of training samples.
        eval_size: number of samples of the split that is reported.
    """

    name: str
    sha256: str
    licence: str
    train_size: int
    eval_size: int


@dataclass(frozen=True, kw_only=True)
class Metric:
    """The figure a target is set for.

    Attributes:
        name: e.g. ``"top1"``.
        unit: e.g. ``"fraction"`` or ``"eV"``.
        higher_is_better: the direction in which the target is crossed.
    """

    name: str
    unit: str
    higher_is_better: bool


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a split says of a model.

    Attributes:
        loss: mean loss a sample.
        metric: the task's metric.
        others: further figures by name, each with its unit behind a blank if it has one, e.g.
            ``{"auc": 0.76, "MAE/atom eV": 0.01}``. They are recorded and drawn, no target is set for them.
    """

    loss: float
    metric: float
    others: Mapping[str, float] = field(default_factory=dict)


class Task(Protocol):
    """Data, model, loss and metric of one experiment. Knows nothing of optimizers.

    A task whose batches are not laid out sample by sample (atoms of molecules, say) has one more method,
    ``sample_index(batch)``: from patterns of module names to the number of the sample that each row of the
    module's input belongs to, as `ngplus.NGPlus.sample_index` takes it.

    An instance is made by ``TASKS[name](settings, scale=..., data_dir=...)`` where ``settings`` is the
    recipe's ``[task]`` table, checked by the task's own frozen dataclass.
    """

    name: str
    dataset: DatasetInfo
    metric: Metric

    def build_model(self) -> nn.Module:
        """A fresh model; its initial weights depend on torch's global generator only."""
        ...

    def steps_per_epoch(self) -> int:
        """Number of batches that one epoch of `train_batches` yields."""
        ...

    def train_batches(self, epoch: int, seed: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """The batches of one epoch, in an order that depends on ``seed`` and ``epoch`` alone.

        Data augmentation is drawn from the same two numbers. With ``world_size > 1`` the joint batch is
        cut into equal parts, of which ``rank`` gets its own.
        """
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The training loss: a mean over the batch's samples, a scalar with a graph."""
        ...

    def evaluate(self, model: nn.Module, split: Split) -> Evaluation:
        """Loss and metric over a whole split. The trainer has put the model in ``eval()`` and ``no_grad``."""
        ...

    def to_device(self, batch: Any, device: str) -> Any:
        """The batch on a device."""
        ...
