"""The Transformer on IWSLT14 German-English (section 5.3, Figure 4), and the same code on smaller texts below it.

Model, dictionaries, batches, label-smoothed loss and beam search are fairseq's, BLEU is sacrebleu's. The paper's
``iwslt_de_en_v2`` is fairseq's ``transformer_iwslt_de_en``, pre-norm and with dropout of attention and ReLU.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from experiments.data_io.text.fairseq_folder import Folder
from experiments.data_io.text.fairseq_library import LabelSmoothedCrossEntropyCriterion, TransformerModel
from experiments.data_io.text.parallel_text import Pair
from experiments.data_io.text.text_corpus import CorpusSettings, corpus_folder
from experiments.dataclass_io import SettingsError, read_settings
from experiments.integrations.fairseq_plugin.padding import sentence_index
from experiments.tasks.protocol import DatasetInfo, Evaluation, Metric, Split
from experiments.tasks.transformer import ding, iwslt14, libreoffice_help
from experiments.tasks.transformer.translation import (
    BLEU,
    Batch,
    Batches,
    ModelSettings,
    SearchSettings,
    Translator,
    build_model,
    load_task,
    to_device,
)

_FAIRSEQ_SPLIT: Mapping[Split, str] = {"validation": "valid", "test": "test"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The recipe's ``[task]`` table.

    Attributes:
        data: the embedded sample or all of the LibreOffice help pages, the sentences of Ding, or the folder that
            ``fairseq-preprocess`` made of IWSLT14.
        max_tokens: most tokens of a batch, of either language, padding counted.
        corpus: how sentences become that folder, see `CorpusSettings`; left out for a folder that is there.
        label_smoothing: of the training loss, 0 to 1.
        model: see `ModelSettings`.
        search: see `SearchSettings`.
    """

    data: Literal["libreoffice-help-embedded", "libreoffice-help", "ding", "iwslt14"]
    max_tokens: int
    corpus: CorpusSettings | None = None
    label_smoothing: float = 0.1
    model: ModelSettings = field(default_factory=ModelSettings)
    search: SearchSettings = field(default_factory=SearchSettings)

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens = {self.max_tokens}: must be at least 1")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing = {self.label_smoothing}: must be in [0, 1)")
        if (self.data == "iwslt14") != (self.corpus is None):
            raise ValueError(
                f"corpus: must be left out for data = 'iwslt14', and given otherwise; data = {self.data!r}"
            )


class TransformerIWSLT14:
    """Translation from German to English; the loss a target token is what counts, BLEU is reported with it.

    Args:
        settings: the recipe's ``[task]`` table, see `Settings`.
        scale: the recipe's scale, for error messages.
        data_dir: where the datasets are kept.

    Raises:
        SettingsError: a setting is unknown, mistyped or out of range, or the data has too few pairs.
        DataFileError: a data file is missing or damaged, or holds a sentence that is too long.
    """

    name = "transformer-iwslt14"
    metric = Metric(name="nll", unit="nats/token", higher_is_better=False)

    def __init__(self, settings: Mapping[str, Any], *, scale: str, data_dir: Path) -> None:
        where = f"{self.name}/{scale}, [task]"
        self.settings = read_settings(Settings, settings, where)
        source = _SOURCES[self.settings.data]
        try:
            folder = _folder(source, self.settings, data_dir)
        except ValueError as error:
            raise SettingsError(f"{where}: {error}") from None
        self._task = load_task(folder)
        self._criterion = LabelSmoothedCrossEntropyCriterion(
            self._task, sentence_avg=False, label_smoothing=self.settings.label_smoothing
        )
        self._train = self._batches("train", _with_words(self._task.datasets["train"].sizes, folder))
        self._eval = {split: self._batches(name) for split, name in _FAIRSEQ_SPLIT.items()}
        self._to_translate = {
            split: self._batches(name, self.settings.search.chosen(len(self._task.datasets[name])))
            for split, name in _FAIRSEQ_SPLIT.items()
        }
        self._translator = Translator(self._task, self.settings.search)
        self.dataset = DatasetInfo(
            name=source.name(folder),
            sha256=folder.sha256,
            licence=source.licence,
            train_size=folder.sizes["train"] - folder.empty["train"],
            eval_size=folder.sizes["test"],
        )

    def build_model(self) -> TransformerModel:
        """The Transformer; its initial weights depend on torch's global generator only."""
        return build_model(self.settings.model, self._task)

    def steps_per_epoch(self) -> int:
        """Batches of the training set; which sentences share one is the same in all epochs."""
        return len(self._train)

    def train_batches(self, epoch: int, seed: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """One epoch of fairseq's batches, in an order drawn from ``seed`` and ``epoch``."""
        return self._train.shuffled(seed=seed, epoch=epoch, rank=rank, world_size=world_size)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The label-smoothed cross entropy, a mean over the target tokens of the joint batch.

        With several workers each returns its tokens' sum times the number of workers, divided by the tokens of
        all: the mean of these over the workers is the mean over all tokens, however they are spread.
        """
        loss, _ = self._losses(model, batch)
        return loss * batch["loss_scale"]

    def evaluate(self, model: nn.Module, split: Split) -> Evaluation:
        """Per target token the label-smoothed loss, and without smoothing the metric; and BLEU.

        Of a model that has diverged BLEU is NaN: fairseq's search fails where no token has a probability.
        """
        device = next(model.parameters()).device
        sums, tokens = torch.zeros(2, dtype=torch.float64, device=device), 0
        for batch in (self.to_device(batch, device) for batch in self._eval[split].in_order()):
            sums += torch.stack(self._losses(model, batch)).double()
            tokens += batch["ntokens"]
        loss, metric = (sums / tokens).tolist()
        if math.isfinite(loss):
            bleu = self._translator.bleu(model, self._to_translate[split], device)
        else:
            bleu = dict.fromkeys(BLEU, math.nan)
        return Evaluation(loss=loss, metric=metric, others=bleu)

    def sample_index(self, batch: Batch) -> dict[str, Tensor]:
        """Which sentence each row of each layer's input belongs to, -1 for padding; see `sentence_index`."""
        return sentence_index(batch, self._task.source_dictionary.pad(), self._task.target_dictionary.pad())

    def to_device(self, batch: Batch, device: str | torch.device) -> Batch:
        """The batch on a device."""
        return to_device(batch, device)

    def _losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The smoothed and the plain loss, sums over the batch's target tokens."""
        inside = getattr(model, "module", model)  # of a data-parallel wrapping, which has only the forward pass
        return self._criterion.compute_loss(inside, model(**batch["net_input"]), batch)

    def _batches(self, name: str, indices: np.ndarray | None = None) -> Batches:
        where = f"{self._task.cfg.data}, {name} split"
        return Batches(self._task.datasets[name], where, max_tokens=self.settings.max_tokens, indices=indices)


def _with_words(sizes: np.ndarray, folder: Folder) -> np.ndarray:
    """The training pairs to use: those with a word on both sides."""
    if empty := {split: count for split, count in folder.empty.items() if count}:
        counts = ", ".join(f"{count:,} of {split}" for split, count in empty.items())
        warnings.warn(
            f"{folder.path}: sentence pairs with an empty side: {counts}; training leaves them out", stacklevel=3
        )
    return np.flatnonzero(sizes.min(axis=1) > 1)


# --- where the sentences come from


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A dataset: what it is called, its licence, and how it is had.

    Attributes:
        title: its name in tables, to which the number of pairs is added.
        licence: the data's licence.
        pairs: loads its sentences out of a data folder; ``None`` where a folder of fairseq's is there.
    """

    title: str
    licence: str
    pairs: Callable[[Path], list[Pair]] | None = None
    unit: str = "pairs"

    def name(self, folder: Folder) -> str:
        """The name in tables."""
        return f"{self.title if self.pairs else iwslt14.name_folder(folder)}, {folder.sizes['train']:,} {self.unit}"


_SOURCES = {
    "libreoffice-help-embedded": _Source(
        title="LibreOffice help de-en",
        licence=libreoffice_help.LICENCE,
        pairs=lambda _: libreoffice_help.load_embedded(),
        unit="embedded pairs",
    ),
    "libreoffice-help": _Source(
        title="LibreOffice help de-en", licence=libreoffice_help.LICENCE, pairs=libreoffice_help.load
    ),
    "ding": _Source(title="Ding sentences de-en", licence=ding.LICENCE, pairs=ding.load),
    "iwslt14": _Source(title="IWSLT14 de-en", licence=iwslt14.LICENCE),
}


def _folder(source: _Source, settings: Settings, data_dir: Path) -> Folder:
    if source.pairs is None or settings.corpus is None:
        return iwslt14.load(data_dir)
    return corpus_folder(source.pairs(data_dir), settings.corpus, data_dir / settings.data)
