"""``--task translation_ngplus``: fairseq's translation, which shows its model and its batches to NG+."""

from typing import Any

from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from torch import nn

from .fairseq_optimizer import WITHOUT, FairseqNGPlus, remember
from .padding import sentence_index


@register_task("translation_ngplus", dataclass=TranslationConfig)
class TranslationWithNGPlus(TranslationTask):
    """Translation as ever; with another optimizer than NG+ it is ``translation`` to the bit."""

    epoch = 1

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> nn.Module:
        """The model, kept for the optimizer to find."""
        model = super().build_model(cfg, from_checkpoint)
        remember(model)
        return model

    def begin_epoch(self, epoch: int, model: nn.Module) -> None:
        """Note the epoch, for the damping."""
        super().begin_epoch(epoch, model)
        self.epoch = epoch

    def train_step(self, sample: dict, model: nn.Module, criterion: nn.Module, optimizer: Any, *args: Any, **kw: Any):
        """One forward and backward pass; before one that builds curvature, NG+ is told of damping and padding.

        Args:
            sample: a batch as fairseq collates it.
            model: that is trained.
            criterion: the loss.
            optimizer: fairseq's wrapper of it.
            *args: as fairseq's task takes them.
            **kw: as fairseq's task takes them.

        Returns:
            Loss, sample size and what is logged, as fairseq's task returns them.

        Raises:
            ValueError: the optimizer is NG+ under ``--amp``.
        """
        if isinstance(getattr(optimizer, "fp32_optimizer", None), FairseqNGPlus):
            raise ValueError(f"--amp scales the loss, which --optimizer ngplus cannot know: {WITHOUT}")
        if isinstance(optimizer, FairseqNGPlus) and optimizer.optimizer.curvature_is_due:
            optimizer.begin_epoch(self.epoch)
            padding = self.source_dictionary.pad(), self.target_dictionary.pad()
            optimizer.optimizer.sample_index = sentence_index(sample, *padding)
        return super().train_step(sample, model, criterion, optimizer, *args, **kw)
