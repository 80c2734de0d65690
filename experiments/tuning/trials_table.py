"""``tuning.csv``: a row a trial, all optimizers of a task at a scale, next to its results."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.config.tuning_space import short_name
from experiments.records.run_record import Run
from experiments.tuning.search import Tried


def record_trials(path: Path, optimizer: str, trials: Sequence[Tried]) -> pd.DataFrame:
    """Put the trials of an optimizer, best first, in place of those it has in the file; returns the whole file.

    Columns: ``optimizer, trial, ended``, the tuned settings, then ``seed, split, epochs`` and, on that split,
    ``loss`` and the metric after the last epoch and the best value of the metric. Other optimizers' rows stay.

    Args:
        path: ``tuning.csv``.
        optimizer: whose trials they are.
        trials: all of a search.

    Returns:
        A row a trial, of all optimizers.
    """
    own = pd.DataFrame([_row(trial) for trial in trials])
    higher = trials[0].run.manifest.metric.higher_is_better
    own = own.sort_values(own.columns[-1], ascending=not higher, kind="stable", na_position="last")
    others = pd.read_csv(path) if path.exists() else own.iloc[:0]
    others = others[others["optimizer"] != optimizer]
    whole = pd.concat([each for each in (others, own) if len(each)])
    whole = whole[_order_columns(list(whole.columns), list(own.columns))]
    write_rows(whole, path)
    return whole


def write_rows(table: pd.DataFrame, path: Path) -> None:
    """Replace a CSV file as a whole.

    Args:
        table: all rows.
        path: the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".csv.partial")
    table.to_csv(partial, index=False, float_format="%.6g")
    partial.replace(path)


def summarise_course(run: Run) -> dict[str, Any]:
    """The columns for what a run was and came to.

    Args:
        run: that is over.

    Returns:
        Values by column.
    """
    manifest, last = run.manifest, run.epochs[-1]
    return {
        "seed": manifest.seed,
        "split": manifest.recipe["run"]["report_split"],
        "epochs": last.epoch,
        "loss": last.eval_loss,
        manifest.metric.name: last.metric,
        f"best_{manifest.metric.name}": run.best_metric,
    }


_HEAD = ["optimizer", "trial", "ended"]
_TAIL = 6  # the columns of `summarise_course`


def _row(tried: Tried) -> dict[str, Any]:
    settings = {short_name(key): value for key, value in tried.settings.items()}
    return {
        "optimizer": tried.run.manifest.optimizer,
        "trial": tried.number,
        "ended": tried.ended,
        **settings,
        **summarise_course(tried.run),
    }


def _order_columns(columns: list[str], own: list[str]) -> list[str]:
    tail = own[-_TAIL:]
    return [*_HEAD, *(name for name in columns if name not in (*_HEAD, *tail)), *tail]
