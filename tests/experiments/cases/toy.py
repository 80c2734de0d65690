"""A task small enough to train in milliseconds: linear regression through one hidden layer."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from experiments import tasks
from experiments.dataclass_io import read_settings
from experiments.tasks.protocol import DatasetInfo, Evaluation, Metric

INPUTS, SAMPLES = 5, 48


@dataclass(frozen=True, kw_only=True)
class ToySettings:
    batch_size: int
    hidden: int = 4
    dropout: float = 0.0
    poison: int = -1  # the batch of each epoch whose loss is not a number
    pause: float = 0.0  # seconds a batch, so that a test can kill the run half-way


class Toy:
    name = "toy"
    metric = Metric(name="mse", unit="1", higher_is_better=False)
    dataset = DatasetInfo(name="toy numbers", sha256="0" * 64, licence="MIT", train_size=SAMPLES, eval_size=16)

    def __init__(self, settings, *, scale, data_dir: Path):
        self.settings = read_settings(ToySettings, settings, f"toy/{scale}, [task]")
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(SAMPLES + 16, INPUTS, generator=generator)
        self.y = (self.x @ torch.randn(INPUTS, 1, generator=generator)).tanh()

    def build_model(self):
        hidden = self.settings.hidden
        return nn.Sequential(
            nn.Linear(INPUTS, hidden), nn.Tanh(), nn.Dropout(self.settings.dropout), nn.Linear(hidden, 1)
        )

    def steps_per_epoch(self):
        return SAMPLES // self.settings.batch_size

    def train_batches(self, epoch, seed, *, rank=0, world_size=1):
        torch.rand(())  # as a DataLoader does when an epoch begins
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(1000 * seed + epoch))
        for number, joint in enumerate(order.split(self.settings.batch_size)):
            time.sleep(self.settings.pause)
            own = joint.chunk(world_size)[rank]
            poison = float("nan") if number == self.settings.poison else 0.0
            yield self.x[own] + poison, self.y[own]

    def loss(self, model, batch):
        x, y = batch
        return nn.functional.mse_loss(model(x), y)

    def evaluate(self, model, split):
        assert not model.training
        x, y = self.x[SAMPLES:], self.y[SAMPLES:]
        loss = nn.functional.mse_loss(model(x), y).item()
        return Evaluation(loss=loss, metric=loss, others={"rmse": loss**0.5})

    def to_device(self, batch, device):
        return tuple(each.to(device) for each in batch)


RECIPE = """
[task]
batch_size = { value = 8, source = "made up" }
dropout = { value = 0.1, source = "made up" }

[run]
epochs = { value = 3, source = "made up" }
seeds = { value = [0, 1], source = "made up" }
tuning_seed = { value = 100, source = "made up" }
target = { value = 0.5, source = "made up" }

[optimizers.sgd]
lr = { value = 0.1, source = "made up" }
momentum = { value = 0.9, source = "made up" }

[optimizers.sgd.schedule]
kind = { value = "cosine", source = "made up" }
max_epoch = { value = 3, source = "made up" }
warmup_epochs = { value = 0.5, source = "made up" }

[optimizers.adam]
lr = { value = 0.01, source = "made up" }

[optimizers.ngplus]
lr = { value = 0.1, source = "made up" }
damping = { value = 0.5, source = "made up" }
update_every = { value = 4, source = "made up" }

[optimizers.ngplus.base]
kind = { value = "sgd", source = "made up" }
momentum = { value = 0.9, source = "made up" }

[optimizers.ngplus.damping_schedule]
kind = { value = "exponential", source = "made up" }
rate = { value = 0.8, source = "made up" }
every_epochs = { value = 1, source = "made up" }
"""


# What a clock or a memory gauge says is different in every run.
GAUGES = {"seconds", "peak_memory_mb", "curvature_s", "inverse_s", "apply_s"}


def reproducible_values(run):
    """What two runs with the same settings and seed have in common, an epoch a dictionary."""
    return [{k: v for k, v in vars(epoch).items() if k not in GAUGES} for epoch in run.epochs]


def install(folder: Path) -> None:
    """Make the toy a task, and put its recipe into a folder."""
    tasks.TASKS["toy"] = Toy
    path = folder / "toy" / "tiny.toml"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(RECIPE)


if recipes := os.environ.get("TOY_RECIPES"):
    # Run as a program, `python toy.py run toy ...` is the command line with the toy among its tasks, in
    # the processes it starts too.
    from experiments.config import recipe

    recipe.RECIPES = Path(recipes)
    install(recipe.RECIPES)

if __name__ == "__main__":
    from experiments.cli.app import main

    main()
