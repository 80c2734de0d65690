"""Which structure each row of a SchNet layer's input belongs to: schnetpack stacks the rows of a whole batch."""

from collections.abc import Mapping

from schnetpack import properties
from torch import Tensor


def sample_index(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The structure of each row of a SchNet layer's input, by patterns of module names; the first that fits counts.

    Filter networks see the P pairs of a batch, all other layers its A atoms: tensors of shapes (P,) and (A,).

    Args:
        batch: as schnetpack collates it.

    Returns:
        Structures by pattern, for `ngplus.NGPlus.sample_index`.
    """
    atoms = batch[properties.idx_m]
    return {"*.filter_network.*": atoms[batch[properties.idx_i]], "*": atoms}
