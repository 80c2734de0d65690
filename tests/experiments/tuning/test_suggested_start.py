import pandas as pd
import pytest
import torch

from experiments.config.recipe import load_recipe
from experiments.records.provenance import REPOSITORY
from experiments.tasks import TASKS
from experiments.tuning.suggested_start import OPTIMIZERS, suggest_start
from ngplus import NGPlus


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_start_is_suggested_on_every_task_and_trains(name, tmp_path):
    """At scale tiny, a few steps; that it is no worse than the tuned baseline is recorded at scale small."""
    recipe = load_recipe(name, "tiny")
    suggestion = suggest_start(recipe, 2, with_lr=False, data_dir=tmp_path)
    assert suggestion.settings["samples"] == "batch"
    assert suggestion.settings["loss_reduction"] == "mean"
    assert 0 < suggestion.settings["damping"] <= 10
    task = TASKS[name](recipe.task_settings, scale="tiny", data_dir=tmp_path)
    torch.manual_seed(0)
    model = task.build_model()
    named = [
        *(layer.name for layer in suggestion.layers),
        *(each for names in suggestion.to_base.values() for each in names),
    ]
    assert set(named) <= {parameter for parameter, _ in model.named_parameters()}
    optimizer = NGPlus(model, **suggestion.settings)
    batch = next(iter(task.train_batches(0, 0)))
    losses = []
    for _ in range(4):
        if hasattr(task, "sample_index"):
            optimizer.sample_index = task.sample_index(batch)
        loss = task.loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert min(losses[1:]) < losses[0]
    assert set(optimizer.curvature) == {layer.name for layer in suggestion.layers}


def test_the_start_is_no_worse_than_the_tuned_baseline_on_five_of_six_tasks():
    """What is recorded; `python -m experiments.tuning.suggested_start` makes it again."""
    record = pd.read_csv(REPOSITORY / "results" / "suggested-start.csv").query("told == 'base and lr'")
    sign = record.higher_is_better.map({True: 1, False: -1})
    assert set(record.task) == set(OPTIMIZERS)
    assert (sign * record.start >= sign * record.tuned_reference).sum() >= 5
