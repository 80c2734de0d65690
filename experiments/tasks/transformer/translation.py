"""The fairseq side of the translation task: its task object, datasets, batches, model, and BLEU of its beam search."""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.data_io.checksum import DataFileError
from experiments.data_io.text.fairseq_folder import LANGUAGES, Folder
from experiments.data_io.text.fairseq_library import (
    ARCH_CONFIG_REGISTRY,
    LanguagePairDataset,
    SequenceGenerator,
    TransformerModel,
    TranslationConfig,
    TranslationTask,
    data_utils,
    utils,
)

Batch = dict[str, Any]
ARCHITECTURE = "transformer_iwslt_de_en"
MAX_POSITIONS = 1024
MAX_LENGTH = 1.2, 10  # a translation has at most 1.2 times the source's tokens and ten more
BLEU = "BLEU", "BLEU/tokens"
# With another multiple than 1 the function of fairseq-fixed 0.12.3.1 loses the sentences of an incomplete last batch.
_BATCH_MULTIPLE = 1


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """fairseq's Transformer; the defaults are ``transformer_iwslt_de_en``, pre-norm and with more dropout.

    Attributes:
        layers: of the encoder, and of the decoder.
        dim: width of embeddings and layers.
        ffn_dim: width inside the feed-forward parts.
        heads: of each attention.
        dropout: behind embeddings, attention and feed-forward parts.
        attention_dropout: of the attention weights.
        activation_dropout: behind the ReLU.
        normalize_before: layer norm before each part instead of behind it.
        share_decoder_embeddings: one matrix for the decoder's input embedding and output projection.
    """

    layers: int = 6
    dim: int = 512
    ffn_dim: int = 1024
    heads: int = 4
    dropout: float = 0.3
    attention_dropout: float = 0.1
    activation_dropout: float = 0.1
    normalize_before: bool = True
    share_decoder_embeddings: bool = True

    def __post_init__(self) -> None:
        for name in ("layers", "dim", "ffn_dim", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.dim % self.heads:
            raise ValueError(f"dim = {self.dim}: must be a multiple of heads = {self.heads}")
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be in [0, 1)")

    def arguments(self) -> Namespace:
        """The arguments that ``fairseq-train`` would have, completed by the architecture."""
        arguments = Namespace(
            arch=ARCHITECTURE,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            activation_dropout=self.activation_dropout,
            share_decoder_input_output_embed=self.share_decoder_embeddings,
            max_source_positions=MAX_POSITIONS,
            max_target_positions=MAX_POSITIONS,
        )
        for part in ("encoder", "decoder"):
            setattr(arguments, f"{part}_layers", self.layers)
            setattr(arguments, f"{part}_embed_dim", self.dim)
            setattr(arguments, f"{part}_ffn_embed_dim", self.ffn_dim)
            setattr(arguments, f"{part}_attention_heads", self.heads)
            setattr(arguments, f"{part}_normalize_before", self.normalize_before)
        ARCH_CONFIG_REGISTRY[ARCHITECTURE](arguments)
        return arguments


def build_model(settings: ModelSettings, task: TranslationTask) -> TransformerModel:
    """A fresh Transformer for a task's dictionaries.

    Args:
        settings: its size.
        task: from `load_task`.

    Returns:
        The model, initialised from the global generator.
    """
    return TransformerModel.build_model(settings.arguments(), task)


def load_task(folder: Folder) -> TranslationTask:
    """The translation task of fairseq on a folder that `read_folder` found whole, all splits loaded.

    Args:
        folder: from `read_folder`.

    Returns:
        fairseq's task.
    """
    source, target = LANGUAGES
    config = TranslationConfig(data=str(folder.path), source_lang=source, target_lang=target)
    config.train_subset, config.dataset_impl, config.required_seq_len_multiple = "train", "mmap", 1
    task = TranslationTask.setup_task(config)
    for split in folder.sizes:
        task.load_dataset(split)
    return task


class Batches:
    """The batches of one split: sentences of about one length together, at most ``max_tokens`` tokens a side.

    Which sentences share a batch is decided once, as `fairseq-train` does it, from a fixed seed.

    Args:
        dataset: of the split.
        where: what the split is called in error messages.
        max_tokens: most tokens of a side, padding counted.
        indices: the sentences to use; ``None`` for all.

    Raises:
        DataFileError: a sentence is longer than ``max_tokens`` or than the model has positions for.
    """

    SEED = 1

    def __init__(
        self, dataset: LanguagePairDataset, where: str, *, max_tokens: int, indices: np.ndarray | None = None
    ) -> None:
        self._dataset = dataset
        limit = min(max_tokens, MAX_POSITIONS)
        if (beyond := np.flatnonzero(dataset.sizes.max(axis=1) > limit)).size:
            raise DataFileError(
                f"{where}: {beyond.size:,} sentence pairs are longer than max_tokens = {max_tokens} or the model's "
                f"{MAX_POSITIONS} positions allow; the first is pair {beyond[0] + 1} with "
                f"{dataset.sizes[beyond[0]].max():,} tokens"
            )
        with data_utils.numpy_seed(self.SEED):
            order = dataset.ordered_indices()
        if indices is not None:
            order = order[np.isin(order, indices)]
        self._batches = dataset.batch_by_size(
            order, max_tokens=max_tokens, required_batch_size_multiple=_BATCH_MULTIPLE
        )

    def __len__(self) -> int:
        return len(self._batches)

    def shuffled(self, *, seed: int, epoch: int, rank: int, world_size: int) -> Iterator[Batch]:
        """All batches in an order drawn from ``(seed, epoch)``; each rank gets every ``world_size``-th sentence."""
        for number in np.random.default_rng([seed, epoch]).permutation(len(self._batches)):
            yield self._share(self._batches[number], rank, world_size)

    def in_order(self) -> Iterator[Batch]:
        """All batches, short sentences first."""
        for indices in self._batches:
            yield self._share(indices, 0, 1)

    def _share(self, indices: Sequence[int], rank: int, world_size: int) -> Batch:
        """A rank's part of a joint batch, with the joint batch's number of target tokens."""
        own = indices[rank::world_size]
        # Where there are fewer sentences than ranks, a rank gets one that has nothing to learn from.
        batch = self._dataset.collater([self._dataset[index] for index in (own if len(own) else indices[:1])])
        if not len(own):
            batch["target"].fill_(self._dataset.tgt_dict.pad())
        batch["loss_scale"] = world_size / int(self._dataset.tgt_sizes[indices].sum())
        return batch


def to_device(batch: Batch, device: str | torch.device) -> Batch:
    """The batch's tensors on a device.

    Args:
        batch: as fairseq collates it.
        device: where to.

    Returns:
        A batch of the same form.
    """
    return utils.apply_to_sample(lambda tensor: tensor.to(device, non_blocking=True), batch)


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """fairseq's beam search.

    Attributes:
        beam: hypotheses kept; 1 is greedy.
        length_penalty: exponent of the length that a hypothesis' score is divided by.
        sentences: how many of a split are translated, evenly spread over it; ``None`` for all.
    """

    beam: int = 5
    length_penalty: float = 1.0
    sentences: int | None = None

    def __post_init__(self) -> None:
        if self.beam < 1:
            raise ValueError(f"beam = {self.beam}: must be at least 1")
        if self.sentences is not None and self.sentences < 1:
            raise ValueError(f"sentences = {self.sentences}: must be at least 1, or left out for all")

    def chosen(self, size: int) -> np.ndarray:
        """The sentences to translate out of ``size``."""
        return np.unique(np.linspace(0, size - 1, min(self.sentences or size, size)).round().astype(np.int64))


class Translator:
    """Translates a split and compares with its references, as ``fairseq-generate`` does."""

    def __init__(self, task: TranslationTask, settings: SearchSettings) -> None:
        from sacremoses import MosesDetokenizer

        self._dictionary, self._settings = task.target_dictionary, settings
        self._detokenizer = MosesDetokenizer(LANGUAGES[1])

    def bleu(self, model: nn.Module, batches: Batches, device: torch.device) -> dict[str, float]:
        """BLEU by sacrebleu: of plain text, subwords joined and detokenised, and of Moses tokens."""
        from sacrebleu import corpus_bleu

        pairs = [pair for batch in batches.in_order() for pair in self._translated(model, to_device(batch, device))]
        outputs, references = zip(*pairs, strict=True)
        plain = [[self._detokenizer.detokenize(text.split()) for text in side] for side in (outputs, references)]
        scores = corpus_bleu(plain[0], [plain[1]]), corpus_bleu(outputs, [references], tokenize="none", force=True)
        return {name: score.score for name, score in zip(BLEU, scores, strict=True)}

    def _translated(self, model: nn.Module, batch: Batch) -> Iterator[tuple[str, str]]:
        """Output and reference of each sentence, as tokens separated by blanks."""
        generator = SequenceGenerator(
            [model],
            self._dictionary,
            beam_size=self._settings.beam,
            len_penalty=self._settings.length_penalty,
            max_len_a=MAX_LENGTH[0],
            max_len_b=MAX_LENGTH[1],
        )
        for best, target in zip(generator.generate([model], batch), batch["target"], strict=True):
            # Unlike marks for unknown words, so that two of them never count as a match.
            reference = utils.strip_pad(target, self._dictionary.pad())
            yield self._text(best[0]["tokens"], "UNKNOWNTOKENINHYP"), self._text(reference, "UNKNOWNTOKENINREF")

    def _text(self, tokens: Tensor, unknown: str) -> str:
        return self._dictionary.string(tokens.int().cpu(), bpe_symbol="@@ ", unk_string=unknown)
