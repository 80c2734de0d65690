"""Random coefficients of a matrix's rows and columns, for sums over them; kept, and the same for all layers."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

PERIOD = 2**16
"""Rows of a table after which their coefficients are the same again."""

SHIFTS = range(0, PERIOD, 1021)
"""Where the coefficients of a matrix's rows and columns may start: so few that what is made of them can be kept."""

_BLOCK = 16
"""Rows of a long table that count or do not together: their gradients are neighbours in memory."""


@functools.cache
def _coefficients(long: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """For each row of a table, of two periods: ½ to 1½ with either sign; 0 for rows of a long one that do not count.

    Numbers, and not the signs alone, since two rows of signs are often the same where a matrix is small.
    """
    generator = torch.Generator().manual_seed(0)
    coefficients = torch.randint(0, 2, (PERIOD,), generator=generator) * 2.0 - 1
    coefficients *= 0.5 + torch.rand(PERIOD, generator=generator)
    if long:
        counts = torch.randint(0, 16, (PERIOD // _BLOCK,), generator=generator) == 0
        coefficients *= counts.repeat_interleave(_BLOCK)
    return coefficients.to(device, dtype).repeat(2)


@functools.cache
def counting_rows(device: torch.device) -> Tensor:
    """The rows of a period of a long table that count, ascending."""
    return _coefficients(True, torch.float32, device)[:PERIOD].nonzero().flatten()


def window(start: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The coefficients of ``count`` rows or columns from ``start`` on."""
    coefficients, start = _coefficients(False, dtype, device), start % PERIOD
    if start + count <= 2 * PERIOD:
        return coefficients[start : start + count]
    return coefficients[torch.arange(start, start + count, device=device) & (PERIOD - 1)]


@functools.lru_cache(maxsize=2**10)
def coefficients_after(start: int, long: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The coefficients of a table's rows from ``start`` on."""
    return _coefficients(long, dtype, device)[start:]


coefficients_from = functools.lru_cache(maxsize=2**13)(window)
"""The same, kept: of a matrix's sums it is a view."""


@functools.lru_cache(maxsize=2**13)
def coefficient_columns(start: int, length: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(length, count) coefficients for ``count`` sums: those of one are those of another from another column on."""
    between = PERIOD // 8 + 1
    coefficients = coefficients_from(start, length + (count - 1) * between, dtype, device)
    return coefficients.as_strided((length, count), (1, between), coefficients.storage_offset())


__all__ = [
    "PERIOD",
    "SHIFTS",
    "coefficient_columns",
    "coefficients_after",
    "coefficients_from",
    "counting_rows",
    "window",
]
