"""A decoder language model on plain text, the model that most people train today; beyond the paper.

Any text becomes token files in nanoGPT's format, split by document, which are mapped from disk. A sample is a
sequence: a window of the training stream, in which documents follow one another with a separator before each. The loss
is a mean over tokens.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.metadata import version
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor, nn

from experiments.data_io.sampling import epoch_batches
from experiments.data_io.text.byte_bpe import LEAST_VOCABULARY
from experiments.data_io.text.documents import (
    Document,
    digest_documents,
    list_text_files,
    read_documents,
    split_documents,
)
from experiments.data_io.text.token_folder import (
    LARGEST_VOCABULARY,
    TokenFolder,
    read_token_folder,
    write_token_folder,
)
from experiments.dataclass_io import SettingsError, read_settings
from experiments.tasks.gpt import django_docs
from experiments.tasks.gpt.gpt_model import GPT, ModelSettings
from experiments.tasks.protocol import DatasetInfo, Evaluation, Metric, Split

Batch = tuple[Tensor, Tensor]
_FILES: Mapping[Split, str] = {"validation": "val", "test": "test"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The recipe's ``[task]`` table.

    Attributes:
        data: the embedded sample or all of Django's documentation; ``"text-folder"``, the files ``*.txt`` in
            ``<data_dir>/text``, a document each; or ``"token-folder"``, nanoGPT's ``train.bin`` and ``val.bin`` in
            ``<data_dir>/tokens``.
        vocabulary: tokens of the byte-level BPE that is learned on the training split; of a token folder, the tokens
            that it was made with.
        context: tokens of a sequence.
        batch_size: sequences of a joint batch.
        epoch_steps: batches to a recorded epoch; left out for a pass over the training split.
        validation_share: of the text's bytes.
        test_share: of the text's bytes.
        model: see `ModelSettings`.
    """

    data: Literal["django-docs-embedded", "django-docs", "text-folder", "token-folder"]
    vocabulary: int
    context: int
    batch_size: int
    epoch_steps: int | None = None
    validation_share: float = 0.05
    test_share: float = 0.05
    model: ModelSettings = field(default_factory=ModelSettings)

    def __post_init__(self) -> None:
        if not LEAST_VOCABULARY <= self.vocabulary <= LARGEST_VOCABULARY:
            raise ValueError(
                f"vocabulary = {self.vocabulary}: must be from {LEAST_VOCABULARY}, the bytes and the separator, to "
                f"{LARGEST_VOCABULARY}, which uint16 holds"
            )
        for name in ("context", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.epoch_steps is not None and self.epoch_steps < 1:
            raise ValueError(f"epoch_steps = {self.epoch_steps}: must be at least 1, or left out for a whole pass")
        for name in ("validation_share", "test_share"):
            if not 0 < getattr(self, name) < 0.5:
                raise ValueError(f"{name} = {getattr(self, name)}: must be between 0 and 0.5")


class GPTText:
    """Language modelling; nats a token count, bits a byte of the text are reported with them.

    Args:
        settings: the recipe's ``[task]`` table, see `Settings`.
        scale: the recipe's scale, for error messages.
        data_dir: where the datasets are kept.

    Raises:
        SettingsError: a setting is unknown, mistyped or out of range, or the text is too short for it.
        DataFileError: a data file is missing or damaged, or not what it should be.
    """

    name = "gpt-text"
    metric = Metric(name="nll", unit="nats/token", higher_is_better=False)

    def __init__(self, settings: Mapping[str, Any], *, scale: str, data_dir: Path) -> None:
        self._where = f"{self.name}/{scale}, [task]"
        self.settings = read_settings(Settings, settings, self._where)
        source = _SOURCES[self.settings.data]
        self._folder = source.folder(self.settings, data_dir)
        self._tokens = self._folder.tokens
        self._check_lengths()
        parts = "" if self.settings.epoch_steps is None else f"; an epoch is {self.settings.epoch_steps} batches"
        self.dataset = DatasetInfo(
            name=f"{source.name(self._folder)}{parts}",
            sha256=self._folder.sha256,
            licence=source.licence,
            train_size=self._windows("train"),
            eval_size=self._windows("test" if "test" in self._tokens else "val"),
        )

    def build_model(self) -> GPT:
        """The decoder; its initial weights depend on torch's global generator only."""
        return GPT(self.settings.model, vocabulary=self._folder.vocabulary, context=self.settings.context)

    def steps_per_epoch(self) -> int:
        """Batches of a recorded epoch."""
        return self.settings.epoch_steps or self._pass_steps()

    def train_batches(self, epoch: int, seed: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """One recorded epoch, which begins in the pass where the one before ended.

        A pass cuts the stream into windows, from a place that depends on the seed and the number of the pass, as their
        order does; what does not fill a window or a batch is left out.

        Args:
            epoch: from 0.
            seed: of the run.
            rank: of this process.
            world_size: processes that train together.

        Yields:
            Tokens (B, T) and the tokens that follow them, int64.
        """
        number, done = divmod(epoch * self.steps_per_epoch(), self._pass_steps())
        starts = (each for later in count(number) for each in self._pass(later, seed, rank=rank, world_size=world_size))
        for each in islice(starts, done, done + self.steps_per_epoch()):
            yield self._batch("train", each)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross entropy over the batch's tokens."""
        return _sum_losses(model, batch) / batch[1].numel()

    def evaluate(self, model: nn.Module, split: Split) -> Evaluation:
        """Nats a token over a whole split, each token predicted once; and bits a byte, where the bytes are known.

        Args:
            model: in ``eval()``.
            split: which one.

        Returns:
            The loss, which is the metric too, and bits a byte as a further figure.

        Raises:
            SettingsError: there are no tokens of the split.
        """
        file = _FILES[split]
        if file not in self._tokens:
            raise SettingsError(
                f"{self._where}: {self._folder.path} has no {file}.bin: set run.report_split to validation"
            )
        device = next(model.parameters()).device
        sums = [_sum_losses(model, self.to_device(batch, device)).double() for batch in self._in_order(file)]
        nats = torch.stack(sums).sum().item()
        loss = nats / (len(self._tokens[file]) - 1)
        text_bytes = self._folder.text_bytes.get(file)
        others = {} if text_bytes is None else {"bits/byte": nats / math.log(2) / text_bytes}
        return Evaluation(loss=loss, metric=loss, others=others)

    def to_device(self, batch: Batch, device: str | torch.device) -> Batch:
        """The batch on a device."""
        inputs, targets = (each.to(device, non_blocking=True) for each in batch)
        return inputs, targets

    def _check_lengths(self) -> None:
        """Refuse a context that no document to train on fills, and a text that fills no batch."""
        context, documents = self.settings.context, self._folder.longest
        longest = documents["train"] if documents else len(self._tokens["train"]) - 1
        if context > longest:
            text = "longest document" if documents else "stream"
            raise SettingsError(
                f"{self._where}: context = {context}: the {text} to train on, in {self._folder.path}, has "
                f"{longest:,} tokens"
            )
        if self._pass_steps() < 1:
            raise SettingsError(
                f"{self._where}: batch_size = {self.settings.batch_size}: a pass has only {self._windows('train'):,} "
                f"sequences of {context} tokens"
            )

    def _windows(self, split: str) -> int:
        """Sequences of a split, wherever the first one begins among the first ``context`` tokens."""
        return (len(self._tokens[split]) - self.settings.context) // self.settings.context

    def _pass_steps(self) -> int:
        return self._windows("train") // self.settings.batch_size

    def _pass(self, number: int, seed: int, *, rank: int, world_size: int) -> Iterator[np.ndarray]:
        """First places of the windows of each batch of a pass."""
        size, context, batch_size = self._windows("train"), self.settings.context, self.settings.batch_size
        first = int(np.random.default_rng([number, seed]).integers(context))
        for indices in epoch_batches(size, batch_size, seed=seed, epoch=number, rank=rank, world_size=world_size):
            yield first + indices * context

    def _batch(self, split: str, starts: Sequence[int] | np.ndarray, length: int | None = None) -> Batch:
        """Windows that begin at these places, (B, T), and those one token later."""
        length = length or self.settings.context
        windows = np.stack([self._tokens[split][start : start + length + 1] for start in starts]).astype(np.int64)
        whole = torch.from_numpy(windows)
        return whole[:, :-1], whole[:, 1:]

    def _in_order(self, split: str) -> Iterator[Batch]:
        """All of a split, the last window as short as it is."""
        predicted, context, size = len(self._tokens[split]) - 1, self.settings.context, self.settings.batch_size
        starts = range(0, predicted - context + 1, context)
        for first in range(0, len(starts), size):
            yield self._batch(split, starts[first : first + size])
        if rest := predicted % context:
            yield self._batch(split, [predicted - rest], rest)


def _sum_losses(model: nn.Module, batch: Batch) -> Tensor:
    inputs, targets = batch
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="sum")


# --- where the text comes from


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A collection: what it is called, its licence, and how its tokens are had.

    Attributes:
        title: its name in tables, to which its sizes are added.
        licence: the data's licence.
        documents: loads its texts out of a data folder; ``None`` for token files, which are taken as they are.
        unit: what a document is called in tables.
    """

    title: str
    licence: str
    documents: Callable[[Path], list[Document]] | None
    unit: str = "documents"

    def name(self, folder: TokenFolder) -> str:
        """The name in tables."""
        texts = f"{sum(folder.documents.values()):,} {self.unit}, " if folder.documents else ""
        return f"{self.title}, {texts}{len(folder.tokens['train']):,} tokens"

    def folder(self, settings: Settings, data_dir: Path) -> TokenFolder:
        """The tokens; made of the texts unless they are there."""
        if self.documents is None:
            return read_token_folder(
                data_dir / "tokens", settings.vocabulary, "put nanoGPT's train.bin and val.bin there"
            )
        documents = self.documents(data_dir)
        folder = data_dir / settings.data / f"tokens-{_digest(documents, settings)[:16]}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):  # runs side by side: one makes it, the others wait
            if not folder.is_dir():
                splits = split_documents(
                    documents,
                    validation_share=settings.validation_share,
                    test_share=settings.test_share,
                    where=self.title,
                )
                write_token_folder(splits, settings.vocabulary, folder)
            return read_token_folder(folder, settings.vocabulary, "delete the folder, and it is made again")


def _digest(documents: Sequence[Document], settings: Settings) -> str:
    """Of all that makes a token folder what it is."""
    chosen = (settings.vocabulary, settings.validation_share, settings.test_share, version("tokenizers"))
    return sha256(f"{digest_documents(documents)} {chosen}".encode()).hexdigest()


def _read_text_folder(data_dir: Path) -> list[Document]:
    folder = data_dir / "text"
    return read_documents(folder, list_text_files(folder, "put the text there, a file *.txt a document"))


_SOURCES = {
    "django-docs-embedded": _Source(
        title="Django's documentation",
        licence=django_docs.LICENCE,
        documents=lambda _: django_docs.load_embedded(),
        unit="embedded pages",
    ),
    "django-docs": _Source(
        title="Django's documentation", licence=django_docs.LICENCE, documents=django_docs.load, unit="pages"
    ),
    "text-folder": _Source(title="text folder", licence="the user's", documents=_read_text_folder),
    "token-folder": _Source(title="token files", licence="the user's", documents=None),
}
