"""NG+ for fairseq's own command line: ``--user-dir experiments/fairseq_plugin --optimizer ngplus``.

fairseq hands an optimizer parameters alone, but NG+ has to watch the model. So the task ``translation_ngplus``,
which is fairseq's ``translation`` otherwise, keeps the model it builds for the optimizer to find, tells it which
tokens are padding, and lowers its damping from epoch to epoch. See docs/fairseq.md.

The package needs fairseq and ngplus alone, since fairseq imports it without the rest of the repository.
"""

from .checkpoints import allow_checkpoints
from .optimizer import FairseqNGPlus
from .task import TranslationWithNGPlus

allow_checkpoints()

__all__ = ["FairseqNGPlus", "TranslationWithNGPlus"]
