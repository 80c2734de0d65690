"""What is used of fairseq, imported in the one place that undoes what the import does to the process.

``import fairseq`` sets the root logger to DEBUG and ``fairseq_cli.preprocess`` may give it a handler that prints
to standard output, so that every library would print its debug messages from then on.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def restore_logging() -> Iterator[None]:
    """Put the root logger's level and handlers back afterwards.

    Yields:
        Nothing.
    """
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


with restore_logging(), warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of deprecated torch.jit and of escape sequences in modules that are not used
    from fairseq import options, utils
    from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
    from fairseq.data import Dictionary, LanguagePairDataset, data_utils
    from fairseq.data.indexed_dataset import MMapIndexedDataset
    from fairseq.data.indexed_dataset import _code_to_dtype as NUMBER_KINDS
    from fairseq.models import ARCH_CONFIG_REGISTRY
    from fairseq.models.transformer import TransformerModel
    from fairseq.sequence_generator import SequenceGenerator
    from fairseq.tasks.translation import TranslationConfig, TranslationTask
    from fairseq_cli import preprocess

# fairseq gives attention a mask of floats for what is ahead and one of bools for padding, at every call.
warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask and attn_mask", category=UserWarning)

logging.getLogger("fairseq").setLevel(logging.WARNING)
logging.getLogger("fairseq_cli").setLevel(logging.WARNING)

__all__ = [
    "ARCH_CONFIG_REGISTRY",
    "NUMBER_KINDS",
    "Dictionary",
    "LabelSmoothedCrossEntropyCriterion",
    "LanguagePairDataset",
    "MMapIndexedDataset",
    "SequenceGenerator",
    "TransformerModel",
    "TranslationConfig",
    "TranslationTask",
    "data_utils",
    "options",
    "preprocess",
    "restore_logging",
    "utils",
]
