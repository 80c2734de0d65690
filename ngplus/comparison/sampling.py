"""Which entries of a layer's gradient are compared."""

from __future__ import annotations

import random

from ngplus.comparison.coefficients import PERIOD
from ngplus.comparison.entries import ComparedEntries
from ngplus.comparison.matrix_entries import MatrixEntries
from ngplus.comparison.matrix_sums import MatrixSums
from ngplus.comparison.table_entries import TableEntries
from ngplus.comparison.whole_sums import WholeSums
from ngplus.layers import Layer, MatrixShape
from ngplus.tuning import DEFAULT, Tuning


def sample_entries(
    layer: Layer,
    shape: MatrixShape,
    output_size: int,
    generator: random.Random,
    tuning: Tuning = DEFAULT,
    *,
    doubted: bool = False,
) -> ComparedEntries:
    """Sample which entries of a layer's gradient are compared.

    Args:
        layer: whose gradient they are of.
        shape: of its matrix.
        output_size: elements of the output of its first use.
        generator: samples them.
        tuning: how many they are.
        doubted: whether its gradient has had other sources before, so that all of it is compared.

    Returns:
        The entries.
    """
    products = max(1, output_size // max(1, layer.matrix[1]))
    most = min(tuning.compared_entries, max(2, tuning.compared_products // products))
    small = output_size <= tuning.summed_outputs and layer.weight.numel() <= tuning.summed_weights
    if (
        layer.weight.dim() == 2
        and not (layer.row_sparse or doubted)
        and small
        and max(layer.weight.shape) <= PERIOD // 2
    ):
        return MatrixSums.sample(layer, generator)
    if layer.row_sparse:
        return TableEntries.sample(layer, most, tuning.long_table, generator)
    if doubted or (layer.batched and small):
        return WholeSums.sample(layer, generator, tuning.curvature_chunk(layer.weight.device))
    return MatrixEntries.sample(layer, shape, most, generator)


def choose_bias_entries(layer: Layer, entries: ComparedEntries) -> ComparedEntries | None:
    """Choose which entries of a layer's bias are compared.

    Args:
        layer: whose bias it is.
        entries: what is compared of its weight.

    Returns:
        The entries; None where the bias is no column of the matrix, or is not trained.
    """
    if layer.trained_bias is None or isinstance(entries, TableEntries):
        return None
    assert isinstance(entries, MatrixEntries | MatrixSums | WholeSums)
    return entries.bias_entries(layer)


__all__ = ["choose_bias_entries", "sample_entries"]
