"""The estimate of one recipe: every optimizer measured in turn and predicted, with what was assumed."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch

from experiments.config.recipe import Recipe
from experiments.errors import UserError
from experiments.estimate import paper_machine
from experiments.estimate.batches import Bench, choose_batch
from experiments.estimate.measuring import Costs, Measured, make_clock, measure, round_length
from experiments.estimate.prediction import Prediction, Shape, predict
from experiments.estimate.timed_steps import has_refresh
from experiments.records.provenance import device_name
from experiments.training.distributed import choose_device
from experiments.training.run import check_optimizer


@dataclass(frozen=True, kw_only=True)
class Options:
    """How and where to estimate.

    Attributes:
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        data_dir: where the datasets are kept.
        steps: to measure, an optimizer; ``None`` for as many as fit into some seconds.
        batch: to measure; ``None`` for the recipe's, or a part of it that fits.
        rate: operations a second that another machine achieves; ``None`` for the paper's, where it can be had.
        cpu_time: count seconds on a processor, for a machine that is busy with other things.
    """

    device: str = "auto"
    data_dir: Path = Path("data")
    steps: int | None = None
    batch: int | None = None
    rate: float | None = None
    cpu_time: bool = False

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise UserError(f"steps = {self.steps}: must be at least 1")
        if self.rate is not None and not self.rate > 0:
            raise UserError(f"flops = {self.rate}: must be positive")
        if self.cpu_time and choose_device(self.device).type != "cpu":
            raise UserError("cpu_time: seconds on a processor say nothing of a GPU; add --device cpu")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What is printed.

    Attributes:
        task: the task's name.
        scale: of the recipe.
        device: it was measured on.
        on_gpu: whether that is a GPU.
        measured: by optimizer.
        predictions: an optimizer each.
        rate: operations a second of another machine; ``None`` for none.
        assumptions: a sentence each.
    """

    task: str
    scale: str
    device: str
    on_gpu: bool
    measured: dict[str, Measured]
    predictions: list[Prediction]
    rate: float | None
    assumptions: list[str]


def estimate(recipe: Recipe, names: Sequence[str] | None, options: Options) -> Estimate:
    """Measure and predict.

    Args:
        recipe: what would be run.
        names: of its optimizers; ``None`` for all.
        options: how and where.

    Returns:
        A prediction an optimizer, with the assumptions.

    Raises:
        UserError: an optimizer that the recipe does not have, or an option out of range.
        DataFileError: data are missing that nothing stands for.
    """
    names = list(names or recipe.optimizers)
    for name in names:
        check_optimizer(recipe, name)
    device = choose_device(options.device)
    clock = make_clock(device, cpu_time=options.cpu_time)
    print(f"{recipe.task} {recipe.scale}: choosing a batch and measuring its loading", file=sys.stderr, flush=True)
    bench = choose_batch(recipe, names[0], options.data_dir, device, clock, options.batch)
    rate, why = _rate(recipe, options, device)
    measured = {}
    for number, name in enumerate(names, 1):
        print(f"measuring steps of {name} ({number} of {len(names)})", file=sys.stderr, flush=True)
        measured[name] = measure(
            bench.recipe,
            name,
            bench.task,
            device,
            clock=clock,
            round_length=round_length(bench.step_s),
            steps=options.steps,
            count_operations=rate is not None,
        )
    measured = pool_plain_steps(measured)
    return Estimate(
        task=recipe.task,
        scale=recipe.scale,
        device=device_name(device.type),
        on_gpu=device.type == "cuda",
        measured=measured,
        predictions=[predict(name, found, make_shape(recipe, name, bench)) for name, found in measured.items()],
        rate=rate,
        assumptions=[*_assumptions(recipe, bench, measured, device, cpu_time=options.cpu_time), *why],
    )


def pool_plain_steps(measured: Mapping[str, Measured]) -> dict[str, Measured]:
    """The same with one figure for forward and backward, which are the same work under every optimizer.

    The mean over all of them; a refresh step keeps its multiple of the plain one. So a machine that was busier
    while one of them was measured does not make that one look more expensive.
    """
    common = fmean(found.seconds.plain.batch for found in measured.values())

    def one(costs: Costs) -> Costs:
        times = common / costs.plain.batch
        return Costs(
            plain=replace(costs.plain, batch=common),
            refresh=replace(costs.refresh, batch=times * costs.refresh.batch),
        )

    return {name: replace(found, seconds=one(found.seconds)) for name, found in measured.items()}


def make_shape(recipe: Recipe, name: str, bench: Bench) -> Shape:
    """How large an optimizer's run is."""
    return Shape(
        batches=bench.batches,
        accumulate=recipe.run.accumulate,
        epochs=recipe.run.epochs,
        update_every=recipe.optimizers[name].settings.update_every if has_refresh(recipe, name) else None,
        factor=bench.factor,
    )


def _rate(recipe: Recipe, options: Options, device: torch.device) -> tuple[float | None, list[str]]:
    """The other machine's operations a second, and what is said about it."""
    how = (
        "operations are counted by torch on the steps measured: products and convolutions, a multiply-add as two; "
        "a machine limited by memory, launches or loading takes longer"
    )
    if options.rate is not None:
        return options.rate, [f"{options.rate / 1e12:.4g} TFLOP/s are achieved elsewhere, as --flops says; {how}"]
    if device.type == "cuda" or recipe.task != paper_machine.TASK or not recipe.scale.startswith("paper"):
        return None, []
    rate = paper_machine.rate()
    return rate, [
        f"{rate / 1e12:.1f} TFLOP/s are what the paper's machine achieves: an epoch of SGD in "
        f"{paper_machine.SGD_EPOCH_S:.0f} s (Table 1; its GPUs are not named); {how}",
        *(
            f"by operations alone an epoch of {epoch.method} takes {epoch.predicted_s:.0f} s there, "
            f"{epoch.predicted_s / paper_machine.SGD_EPOCH_S:.3f} of SGD's; the paper has {epoch.paper_s:.0f} s, "
            f"{epoch.paper_s / paper_machine.SGD_EPOCH_S:.2f}"
            for epoch in paper_machine.epochs()
        ),
    ]


def _assumptions(
    recipe: Recipe, bench: Bench, measured: dict[str, Measured], device: torch.device, *, cpu_time: bool
) -> list[str]:
    first = next(iter(measured.values()))
    return [
        *([bench.made_up] if bench.made_up else []),
        _loading(bench, first),
        *_batch(bench),
        *(
            ["seconds are those on a processor, of all threads: a machine that is busy takes longer"]
            if cpu_time
            else []
        ),
        f"{recipe.run.precision}, {recipe.run.accumulate} batch{'es' if recipe.run.accumulate > 1 else ''} to a step, "
        f"{torch.get_num_threads()} CPU threads, one process; "
        + ", ".join(f"{found.steps} steps of {name}" for name, found in measured.items())
        + " measured: means over the middle half of rounds, "
        "those of forward and backward over all optimizers",
        "the first step refreshes, and every 𝒯-th after it; a refresh costs the same at every point of the training",
        "evaluation and checkpoints are left out, as the clock of a run leaves them out",
        _memory(device),
    ]


def _loading(bench: Bench, found: Measured) -> str:
    if bench.made_up:
        return "loading and decoding are not counted: the true data may make the device wait"
    return (
        f"loading is counted where a step waits for it: {1e3 * found.loading_s:.2g} ms a batch, "
        f"{found.epoch_start_s:.2g} s more when an epoch starts"
    )


def _batch(bench: Bench) -> list[str]:
    if bench.size == bench.whole_size:
        return []
    return [
        f"measured at a batch of {bench.size} instead of {bench.whole_size}: forward, backward and building the "
        f"curvature are taken {bench.factor:.4g} times, inverses, directions and the update once, as their operations "
        "grow (experiments.theory.costs.operations)"
    ]


def _memory(device: torch.device) -> str:
    what = "allocated on the device" if device.type == "cuda" else "resident beyond what the process had before"
    return (
        f"memory is the peak {what}; what is kept (weights, gradients, state) is counted, the rest grows with the batch"
    )
