"""NG+ in schnetpack's own training: `AtomisticTask` for Lightning and ``spktrain``, see docs/schnetpack.md."""

from functools import partial
from typing import Any

from schnetpack import AtomisticTask
from torch import Tensor

from experiments.integrations.schnetpack_rows import sample_index
from ngplus import NGPlus


class NGPlusTask(AtomisticTask):
    """An `AtomisticTask` whose ``optimizer_cls`` may be `NGPlus`.

    Schnetpack gives an optimizer its parameters alone. NG+ needs the model, to see the gradients of single
    samples, and for ``samples="batch"`` also the structure that each row belongs to.
    """

    def configure_optimizers(self) -> Any:
        """As schnetpack does, the model given as well."""
        given = self.optimizer_cls
        if issubclass(given, NGPlus):
            self.optimizer_cls = partial(given, self.model)
        try:
            return super().configure_optimizers()
        finally:
            self.optimizer_cls = given

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """As schnetpack does, the optimizer told of the batch's structures first."""
        optimizer = self.optimizers().optimizer
        if isinstance(optimizer, NGPlus):
            optimizer.sample_index = sample_index(batch)
        return super().training_step(batch, batch_idx)
