"""A made-up log in the exact format of Criteo's, with its numbers of values: for speed only, never for a result."""

from pathlib import Path

import numpy as np
import polars as pl

# Different values of each category in the official log, as its users count them.
VALUES = (
    *(1_460, 583, 10_131_227, 2_202_608, 305, 24, 12_517, 633, 3, 93_145, 5_683, 8_351_593, 3_194),
    *(27, 14_992, 5_461_306, 10, 5_652, 2_173, 4, 7_046_547, 18, 15, 286_181, 105, 142_572),
)
INTEGERS = 13
CLICKED, EMPTY = 0.256, 0.1  # shares of ones, and of empty fields
BLOCK = 250_000

_DIGITS = np.frombuffer("".join(f"{byte:02x}" for byte in range(256)).encode(), np.uint16)


def write_log(path: Path, lines: int, *, seed: int = 0) -> None:
    """Write ``lines`` lines; the r-th most frequent value of a category has a share of about 1/r.

    Args:
        path: the file.
        lines: how many.
        seed: of the values.
    """
    generator = np.random.default_rng(seed)
    with path.open("wb") as file:
        for start in range(0, lines, BLOCK):
            block = _block(generator, min(BLOCK, lines - start))
            block.write_csv(file, separator="\t", include_header=False, quote_style="never")


def _block(generator: np.random.Generator, n: int) -> pl.DataFrame:
    columns = {"label": pl.Series(generator.random(n) < CLICKED).cast(pl.UInt8)}
    for i in range(INTEGERS):
        # Below zero at times, as the official second integer is.
        columns[f"i{i}"] = _with_gaps(generator, pl.Series(generator.lognormal(2, 2, n).astype(np.int32) - 2))
    for j, values in enumerate(VALUES):
        columns[f"c{j}"] = _with_gaps(generator, _hexadecimal(zipf(generator, values, n) * len(VALUES) + j))
    return pl.DataFrame(columns)


def zipf(generator: np.random.Generator, values: int, n: int) -> np.ndarray:
    """Ranks below ``values``, (n,): rank r with probability log((r + 2)/(r + 1)) / log(values + 1), Zipf's law.

    Args:
        generator: of the draws.
        values: how many different ones there are.
        n: draws.

    Returns:
        int64, (n,).
    """
    return ((values + 1) ** generator.random(n)).astype(np.int64) - 1


def _hexadecimal(numbers: np.ndarray) -> pl.Series:
    """Eight digits for each number below 2³²; an odd factor scatters them without making two the same."""
    scattered = (numbers * 2_654_435_761 % 2**32).astype(">u4")
    digits = _DIGITS[scattered.view(np.uint8)].view("S8")
    return pl.Series(digits).cast(pl.String)


def _with_gaps(generator: np.random.Generator, column: pl.Series) -> pl.Series:
    return column.zip_with(pl.Series(generator.random(len(column)) >= EMPTY), pl.Series([None], dtype=column.dtype))
