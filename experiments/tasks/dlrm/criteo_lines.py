"""Lines of Criteo's log to arrays, many at a time; a line that is not as it should be is found and named."""

import re
from dataclasses import dataclass

import numpy as np
import polars as pl

from experiments.tasks.dlrm.criteo_format import CATEGORIES, INTEGERS

COLUMNS = 1 + INTEGERS + CATEGORIES
LEAST, GREATEST = -(2**31), 2**31 - 1

_INTEGERS = [f"i{k}" for k in range(1, INTEGERS + 1)]
_CATEGORIES = [f"c{k}" for k in range(1, CATEGORIES + 1)]
_SCHEMA = {
    "label": pl.UInt8(),
    **dict.fromkeys(_INTEGERS, pl.Int32()),
    **dict.fromkeys(_CATEGORIES, pl.String()),
}
_ALLOWED = b"0123456789abcdefABCDEF-\t\n"
# Zeros before a number are of no matter to polars, and change none.
_LABEL = re.compile(rb"0*[01]")
_INTEGER = re.compile(rb"-?[0-9]+")
_HEXADECIMAL = re.compile(rb"0*[0-9a-fA-F]{1,8}")
_WHOLE = re.compile(rb"[0-9a-fA-F]{8}")


class LineError(ValueError):
    """A line that is not as it should be.

    Args:
        line: its number, the first is 1.
        what: what is wrong with it.

    Attributes:
        line: its number, the first is 1.
        what: what is wrong with it.
    """

    def __init__(self, line: int, what: str) -> None:
        super().__init__(f"line {line}: {what}")
        self.line, self.what = line, what


@dataclass(frozen=True, kw_only=True)
class Lines:
    """What lines say.

    Attributes:
        dense: float32, (n, 13): log(1 + x), negative and empty ones count as 0.
        categories: uint32, (26, n): the hexadecimal numbers, an empty one is 0.
        labels: uint8, (n,).
    """

    dense: np.ndarray
    categories: np.ndarray
    labels: np.ndarray


def parse(text: bytes) -> Lines:
    """Whole lines to arrays.

    A last line without its line feed may be cut: it is taken if its last category has eight digits, as in Criteo's log.

    Args:
        text: whole lines.

    Returns:
        Arrays of n lines.

    Raises:
        LineError: the first line with another number of columns, a label that is not 0 or 1, an integer that is
            none or does not fit 32 bits, a category that is not of one to eight hexadecimal digits, or a last line
            that may be cut.
    """
    count = text.count(b"\n") + (not text.endswith(b"\n"))
    # With no line of more columns, which polars refuses, the right sum means that every line has as many.
    if text.count(b"\t") != (COLUMNS - 1) * count or text.translate(None, _ALLOWED):
        raise first_fault(text)
    try:
        frame = pl.read_csv(text, separator="\t", has_header=False, schema=_SCHEMA, quote_char=None)
        categories = frame.select(pl.col(_CATEGORIES).str.to_integer(base=16, dtype=pl.UInt32).fill_null(0))
    except pl.exceptions.PolarsError as error:
        raise first_fault(text, str(error)) from None
    labels = frame["label"]
    if frame.height != count or labels.null_count() or labels.max() > 1:
        raise first_fault(text)
    if not text.endswith(b"\n") and not _WHOLE.fullmatch(last := text[text.rfind(b"\t") + 1 :]):
        raise LineError(
            count,
            f"category {CATEGORIES} = {_shown(last)}, where the file ends: it may be cut in it; must be eight "
            "hexadecimal digits or have a line feed after it, add it if the line is whole",
        )
    dense = frame.select(pl.col(_INTEGERS).fill_null(0).clip(0).cast(pl.Float32).log1p())
    return Lines(
        dense=dense.to_numpy(order="c"),
        categories=categories.to_numpy(order="fortran").T,
        labels=labels.to_numpy(),
    )


def first_fault(text: bytes, otherwise: str = "cannot be read") -> LineError:
    """The first line that is not as it should be, looked for line by line.

    Args:
        text: whole lines.
        otherwise: what to say of line 1 if none is found.

    Returns:
        The error to raise.
    """
    for number, line in enumerate(text.removesuffix(b"\n").split(b"\n"), start=1):
        if what := _fault(line):
            return LineError(number, what)
    return LineError(1, otherwise)


def _fault(line: bytes) -> str | None:
    if line.endswith(b"\r"):
        return "ends as on Windows, with a carriage return: convert the file, e.g. with `dos2unix`"
    fields = line.split(b"\t")
    if len(fields) != COLUMNS:
        return (
            f"has {len(fields)} columns, must have {COLUMNS} between tabs: "
            f"the label, {INTEGERS} integers, {CATEGORIES} categories"
        )
    if not _LABEL.fullmatch(fields[0]):
        return f"label = {_shown(fields[0])}: must be 0 or 1"
    for number, field in enumerate(fields[1 : 1 + INTEGERS], start=1):
        if field and not (_INTEGER.fullmatch(field) and LEAST <= int(field) <= GREATEST):
            return f"integer {number} = {_shown(field)}: must be empty or an integer of 32 bits"
    for number, field in enumerate(fields[1 + INTEGERS :], start=1):
        if field and not _HEXADECIMAL.fullmatch(field):
            return f"category {number} = {_shown(field)}: must be empty or one to eight hexadecimal digits"
    return None


def _shown(field: bytes) -> str:
    return repr(field[:40].decode("utf-8", "replace"))
