"""What loading adds to a training step of SchNet: ``make bench-schnet-loading``.

A step of the task, its batches gathered from the arrays as a run does, against a step of schnetpack's own model
on one batch that stays where it is. Both take turns, some steps each, and the median of the ratios of
neighbouring turns is reported. The fixed batch is the one whose pairs are nearest to the mean.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pandas as pd
import torch
from schnetpack import properties
from torch import nn

from experiments.config.recipe import load_recipe
from experiments.records.provenance import device_name
from experiments.tasks import TASKS
from experiments.tasks.schnet.schnet_task import SchNetTask
from experiments.tasks.schnet.structure_batches import Batch


def compare(task: SchNetTask, *, steps: int, turns: int, device: str) -> dict[str, object]:
    """Seconds a step of the task, and of the model alone on a fixed batch, and their ratio."""
    model = task.build_model().to(device)
    fixed = task.to_device(_average(islice(task.train_batches(0, 0), 50)), device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    loaded = _endless(task)

    def seconds(next_batch: Callable[[], Batch]) -> float:
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(steps):
            _step(task, model, optimizer, next_batch())
        _synchronize(device)
        return (time.perf_counter() - start) / steps

    pairs = [(seconds(lambda: task.to_device(next(loaded), device)), seconds(lambda: fixed)) for _ in range(turns + 1)][
        1:
    ]
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "task_step_s": statistics.median(task_s for task_s, _ in pairs),
        "model_step_s": statistics.median(model_s for _, model_s in pairs),
        "ratio": statistics.median(task_s / model_s for task_s, model_s in pairs),
    }


def _average(batches: Iterator[Batch]) -> Batch:
    found = list(batches)
    mean = statistics.mean(len(batch[properties.idx_i]) for batch in found)
    return min(found, key=lambda batch: abs(len(batch[properties.idx_i]) - mean))


def _endless(task: SchNetTask) -> Iterator[Batch]:
    epoch = 0
    while True:
        yield from task.train_batches(epoch, 0)
        epoch += 1


def _step(task: SchNetTask, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    task.loss(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad()


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def main() -> None:
    """Measure, print and write ``results/bench/schnet-loading-<device>.csv``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", nargs="+", default=["schnet-qm9", "schnet-matproj"])
    parser.add_argument("--scale", default="small")
    parser.add_argument("--steps", type=int, default=10, help="in a turn")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("results/bench"))
    arguments = parser.parse_args()
    rows = []
    for name in arguments.task:
        recipe = load_recipe(name, arguments.scale)
        task = TASKS[name](recipe.task_settings, scale=recipe.scale, data_dir=arguments.data_dir)
        measured = compare(task, steps=arguments.steps, turns=arguments.turns, device=arguments.device)
        rows.append({"task": name, "scale": recipe.scale} | measured)
    frame = pd.DataFrame(rows)
    print(frame.round(4).to_string(index=False))
    arguments.out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(arguments.out / f"schnet-loading-{arguments.device.split(':')[0]}.csv", index=False)


if __name__ == "__main__":
    main()
