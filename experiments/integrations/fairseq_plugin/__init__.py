"""NG+ for fairseq's own command line: ``--user-dir experiments/integrations/fairseq_plugin --optimizer ngplus``.

fairseq hands an optimizer parameters alone, but NG+ needs the model. So the task ``translation_ngplus``,
which is fairseq's ``translation`` otherwise, keeps the model it builds for the optimizer to find, tells it which
tokens are padding, and lowers its damping from epoch to epoch. See docs/fairseq.md.

The package needs fairseq and ngplus alone, since fairseq imports it without the rest of the repository.
"""

from .fairseq_optimizer import FairseqNGPlus
from .fairseq_task import TranslationWithNGPlus
from .safe_globals import allow_checkpoints

allow_checkpoints()

__all__ = ["FairseqNGPlus", "TranslationWithNGPlus"]
