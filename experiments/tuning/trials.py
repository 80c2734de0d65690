"""``tuning.csv``: a row a trial, all optimizers of a task at a scale, beside its results."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.tuning.search import Tried


def record_trials(path: Path, optimizer: str, trials: Sequence[Tried]) -> pd.DataFrame:
    """Put the trials of an optimizer, best first, in place of those it has in the file; returns the whole file.

    Columns: ``optimizer, trial, ended``, the tuned settings, then ``seed, split, epochs`` and, on that split,
    ``loss`` and the metric after the last epoch and the best value of the metric. Other optimizers' rows stay.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    own = pd.DataFrame([_row(trial) for trial in trials])
    higher = trials[0].run.manifest.metric.higher_is_better
    own = own.sort_values(own.columns[-1], ascending=not higher, kind="stable", na_position="last")
    others = pd.read_csv(path) if path.exists() else own.iloc[:0]
    others = others[others["optimizer"] != optimizer]
    whole = pd.concat([each for each in (others, own) if len(each)])
    whole = whole[_ordered(list(whole.columns), list(own.columns))]
    partial = path.with_suffix(".csv.partial")
    whole.to_csv(partial, index=False, float_format="%.6g")
    partial.replace(path)
    return whole


_HEAD = ["optimizer", "trial", "ended"]
_TAIL = 6  # seed, split, epochs, loss, the metric, its best


def _row(tried: Tried) -> dict[str, Any]:
    manifest, last = tried.run.manifest, tried.run.epochs[-1]
    settings = {key.rpartition(".")[2]: value for key, value in tried.settings.items()}
    return {
        "optimizer": manifest.optimizer,
        "trial": tried.number,
        "ended": tried.ended,
        **settings,
        "seed": manifest.seed,
        "split": manifest.recipe["run"]["report_split"],
        "epochs": last.epoch,
        "loss": last.eval_loss,
        manifest.metric.name: last.metric,
        f"best_{manifest.metric.name}": tried.run.best_metric,
    }


def _ordered(columns: list[str], own: list[str]) -> list[str]:
    tail = own[-_TAIL:]
    return [*_HEAD, *(name for name in columns if name not in (*_HEAD, *tail)), *tail]
