"""Every optimizer that a recipe names trains its task's model: layers, layouts and gradients as they really are."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from experiments.config.recipe import load_recipe
from experiments.optimizers.registry import find_entry
from experiments.tasks import TASKS

RECIPES = {task: load_recipe(task, "small") for task in TASKS}
ALL = [(task, name) for task, recipe in RECIPES.items() for name in recipe.optimizers]


@cache
def tiny(task):
    """The task with its embedded data, and a few of its batches."""
    recipe = load_recipe(task, "tiny")
    made = TASKS[task](
        recipe.manifest_settings(next(iter(recipe.optimizers)))["task"], scale="tiny", data_dir=Path("data")
    )
    batches = made.train_batches(0, 0)
    return made, [next(batches) for _ in range(3)]


# K-FAC says what of the Transformer it leaves to Adam.
@pytest.mark.filterwarnings("ignore:.* is looked up as a table and multiplied as a matrix:UserWarning")
@pytest.mark.parametrize(("task", "name"), ALL, ids=lambda value: value)
def test_an_optimizer_of_a_recipe_trains_its_task(task, name):
    made, batches = tiny(task)
    torch.manual_seed(0)
    model = made.build_model().train()
    settings = RECIPES[task].optimizers[name].settings
    if hasattr(settings, "update_every"):
        settings = replace(settings, update_every=2)
    settings = replace(settings, lr=1e-4)  # untuned ones may diverge on a model this small
    optimizer = find_entry(name).build(model, settings)
    before = {key: value.clone() for key, value in model.named_parameters()}
    losses = []
    for batch in batches:
        if getattr(optimizer, "curvature_is_due", False) and hasattr(made, "sample_index"):
            optimizer.sample_index = made.sample_index(batch)
        loss = made.loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert torch.isfinite(torch.tensor(losses)).all()
    moved = [key for key, value in model.named_parameters() if not torch.equal(value, before[key])]
    assert len(moved) >= 0.9 * len(before)
    assert all(torch.isfinite(value).all() for value in model.parameters())
