"""``paper.toml``: every number and claim of the paper, with its place and how it is checked.

A claim has one ``check``, told apart by its ``kind``; one without a check cannot be settled from anything that is
recorded here, and its ``note`` says why.
"""

import tomllib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from experiments.dataclass_io import read_settings
from experiments.errors import UserError
from experiments.records.provenance import REPOSITORY

PAPER = REPOSITORY / "results" / "paper.toml"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """An absolute figure, which only runs with the paper's own data and settings can meet.

    Attributes:
        task: whose runs.
        optimizer: the recipe's name.
        measure: a field of `outcomes.Outcome`, or ``others.<name>``, a further figure where the metric is best.
        value: the paper's.
        within: relative deviation that still counts as the same.
        bound: whether the paper's value is what it is about, or the most or least it may be.
        eval_loss: what counts as reached for a time to the target, in place of the runs' own target.
        scale: where the paper's settings stand.
    """

    kind: ClassVar = "figure"
    task: str
    optimizer: str
    measure: str
    value: float
    within: float = 0.02
    bound: Literal["about", "at most", "at least"] = "about"
    eval_loss: float | None = None
    scale: str = "paper"

    def __post_init__(self) -> None:
        if self.eval_loss is not None and self.measure not in ("epochs_to_target", "seconds_to_target"):
            raise ValueError(f"eval_loss = {self.eval_loss}: is for epochs_to_target or seconds_to_target")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One optimizer against another: a sentence that runs at any scale can speak to.

    Attributes:
        task: whose runs.
        measure: as for `Figure`.
        optimizer: the one that is said to be better.
        against: the other.
        better: which way the measure is better.
        ratio: the paper's ratio of the two medians, where it gives one: ours must be as good or better.
    """

    kind: ClassVar = "comparison"
    task: str
    measure: str
    optimizer: str
    against: str
    better: Literal["less", "more"]
    ratio: float | None = None


@dataclass(frozen=True, kw_only=True)
class CurveBelow:
    """One optimizer's curve is below another's after every epoch.

    Attributes:
        task: whose runs.
        value: a field of `records.Epoch`.
        optimizer: the lower one.
        against: the other.
    """

    kind: ClassVar = "curve below"
    task: str
    value: Literal["train_loss", "eval_loss"]
    optimizer: str
    against: str


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A cost measured by a bench, ``results/bench/<file>``.

    Attributes:
        file: name of the CSV.
        row: column and value that single out one row.
        column: the cost.
        at_most: the most that agrees with the claim.
        over: the row whose cost it is divided by, in the same way; by default nothing.
    """

    kind: ClassVar = "cost"
    file: str
    row: Mapping[str, str]
    column: str
    at_most: float
    over: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Theory:
    """A row of ``results/theory/<part>/verdicts.csv``, by its claim."""

    kind: ClassVar = "theory"
    part: str
    row: str


@dataclass(frozen=True, kw_only=True)
class Formula:
    """A formula as printed: a row of ``results/theory/errata.csv``, by its place."""

    kind: ClassVar = "formula"
    place: str


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """Whether the paper's own figures fit together: the product of `times` over that of `over` is `value`."""

    kind: ClassVar = "arithmetic"
    times: tuple[float, ...]
    value: float
    over: tuple[float, ...] = ()
    within: float = 0.02


Check = Figure | Comparison | CurveBelow | Cost | Theory | Formula | Arithmetic


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One number or sentence of the paper.

    Attributes:
        id: a short name, unique.
        place: section, table or figure.
        claim: what is said, in our words.
        paper: the paper's figure.
        check: how it is checked, ``None`` if it is not.
        note: what a reader must know besides the outcome of the check.
        headline: whether it stands in the short table.
    """

    id: str
    place: str
    claim: str
    paper: str
    check: Check | None = None
    note: str = ""
    headline: bool = False

    def __post_init__(self) -> None:
        if self.check is None and not self.note:
            raise ValueError(f"id = {self.id!r}: a claim without a check needs a note that says why")


def load_claims(path: Path = PAPER) -> list[Claim]:
    """The claims in the order of the file.

    Args:
        path: ``paper.toml``.

    Returns:
        The claims, each checked.

    Raises:
        UserError: the file cannot be read, or an entry does not fit; names it.
    """
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8")).get("claims", [])
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    claims = [
        read_settings(Claim, entry, f"{path}: claim {number} ({entry.get('id', 'without id')})")
        for number, entry in enumerate(entries, 1)
    ]
    if twice := [name for name, count in Counter(claim.id for claim in claims).items() if count > 1]:
        raise UserError(f"{path}: id = {twice[0]!r} stands there twice")
    return claims
