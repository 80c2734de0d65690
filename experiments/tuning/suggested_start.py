"""Is the start that `ngplus.suggest` gives no worse than the tuned baseline?

``python -m experiments.tuning.suggested_start``: on each task at scale ``small``, one run of NG+ with the suggested
settings, as long as a trial, on the validation split at the tuning seed, compared with the best of the reference's
trials. The base is the reference; `suggest` is told its class and tuned learning rate, or its class alone. Schedules
and decay are those of the recipe.
"""

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from experiments.config.recipe import Recipe, load_recipe
from experiments.errors import UserError
from experiments.tasks import TASKS
from experiments.training.run import RunOptions, run
from experiments.tuning.trial import trial_changes
from experiments.tuning.trials_table import summarise_course
from ngplus import Suggestion, suggest

OPTIMIZERS = {
    "resnet50-imagenet": "ngplus",
    "schnet-qm9": "ngplus-adam-batch",
    "schnet-matproj": "ngplus-adam-batch",
    "transformer-iwslt14": "ngplus-adam-batch",
    "dlrm-criteo": "ngplus-adagrad",
    "gpt-text": "ngplus-adamw-batch",
}
"""NG+ around the reference, with a batch's elements as samples."""

BASES = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "adagrad": torch.optim.Adagrad}


def suggest_start(recipe: Recipe, epochs: int, *, with_lr: bool, data_dir: Path) -> Suggestion:
    """Ask for a start at a task's initial weights, with its first batch.

    Args:
        recipe: of the task.
        epochs: to be trained.
        with_lr: whether the reference's learning rate is told.
        data_dir: where datasets are kept.

    Returns:
        The suggestion.
    """
    task = TASKS[recipe.task](recipe.task_settings, scale=recipe.scale, data_dir=data_dir)
    seed, reference = recipe.run.tuning_seed, recipe.run.reference
    torch.manual_seed(seed)
    model = task.build_model()
    batch = next(iter(task.train_batches(0, seed)))
    known = getattr(task, "sample_index", None)
    return suggest(
        model,
        lambda: task.loss(model, batch),
        base=BASES[reference],
        lr=recipe.optimizers[reference].settings.lr if with_lr else None,
        steps=task.steps_per_epoch() * epochs,
        sample_index=None if known is None else known(batch),
    )


def compare(recipe: Recipe, *, with_lr: bool, options: RunOptions) -> dict[str, Any]:
    """Train with a suggested start.

    Args:
        recipe: of the task, with a ``[tuning]`` table.
        with_lr: see `suggest_start`.
        options: how to run; its folder of results keeps the record.

    Returns:
        A row of the table.
    """
    optimizer = OPTIMIZERS[recipe.task]
    suggestion = suggest_start(recipe, recipe.tuning.epochs, with_lr=with_lr, data_dir=options.data_dir)
    chosen = {name: suggestion.settings[name] for name in ("lr", "damping", "update_every", "samples")}
    done = run(
        recipe.override(trial_changes(recipe, optimizer, chosen, recipe.tuning.epochs)),
        optimizer,
        recipe.run.tuning_seed,
        options,
    )
    course, metric = summarise_course(done), done.manifest.metric
    trials = pd.read_csv(Path("results") / recipe.task / recipe.scale / "tuning.csv")
    best = trials.groupby("optimizer")[f"best_{metric.name}"].agg("max" if metric.higher_is_better else "min")
    return {
        "task": recipe.task,
        "told": "base and lr" if with_lr else "base",
        "base": suggestion.settings["base"].__name__,
        **chosen,
        "seed": recipe.run.tuning_seed,
        "split": "validation",
        "epochs": recipe.tuning.epochs,
        "device": done.manifest.device,
        "metric": metric.name,
        "higher_is_better": metric.higher_is_better,
        "ended": done.end.reason,
        "start": course[f"best_{metric.name}"],
        "tuned_reference": best[recipe.run.reference],
        "tuned_ngplus": best[optimizer],
    }


def main() -> None:
    """Train, print and write ``results/suggested-start.csv``, a row at a time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--told", nargs="+", choices=("base and lr", "base"), default=["base and lr", "base"])
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--runs", type=Path, default=Path("build/suggested-start"), help="where records are kept")
    parser.add_argument("--out", type=Path, default=Path("results/suggested-start.csv"))
    arguments = parser.parse_args()
    for told in arguments.told:
        for task in arguments.task:
            options = RunOptions(data_dir=arguments.data_dir, results_dir=arguments.runs / told.replace(" ", "-"))
            try:
                row = compare(load_recipe(task, "small"), with_lr=told == "base and lr", options=options)
            except UserError as error:
                parser.error(str(error))
            before = [pd.read_csv(arguments.out)] if arguments.out.exists() else []
            table = pd.concat([*before, pd.DataFrame([row])]).drop_duplicates(["task", "told"], keep="last")
            table.to_csv(arguments.out, index=False, float_format="%.6g")
            print(pd.DataFrame([row]).to_string(index=False), flush=True)


if __name__ == "__main__":
    main()
