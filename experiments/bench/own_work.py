"""What an optimizer itself takes of a training step, forward and backward left out.

Where methods differ by less than one step does from the next, as on SchNet, `experiments.bench.steps` cannot tell them
apart. Here the seconds inside ``optimizer.step`` are added up over whole intervals, and those that NG+ and this
repository's K-FAC spend on curvature in the forward and backward pass. The call of ``optimizer.step`` that refreshes is
told from plain ones by its time: in each interval it is the longest. Ratios are taken within an interval, to the first
optimizer's; medians over intervals are reported, with the least and the greatest.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from experiments.bench.compared_optimizers import CANDIDATES, Candidate, Unsupported
from experiments.bench.steps import EQUAL_INTERVAL, show_ratios, summarise_ratios, synchronize
from experiments.bench.workloads import WORKLOADS
from experiments.records.provenance import device_name

MEASURABLE = [name for name in CANDIDATES if name != "kfac (asdfghjkl)"]  # which works outside of any step
SHOWN = [
    "sgd",
    "adam",
    "ngplus",
    "ngplus-mini-batch",
    "ngplus-adagrad-32-samples",
    "kfac (ngplus.baselines)",
    "shampoo (pytorch-optimizer)",
    "soap (pytorch-optimizer)",
]


def compare(model: str, names: Sequence[str], *, intervals: int, device: str) -> pd.DataFrame:
    """One row an optimizer: mean seconds a step over ``intervals`` of `EQUAL_INTERVAL` steps, one of which refreshes.

    Args:
        model: of `WORKLOADS`.
        names: of `CANDIDATES`; each has its own copy of the model, and they make their steps in turn. Ratios are to
            the first.
        intervals: 1 or more.
        device: where.

    Returns:
        A row an optimizer.
    """
    candidates: dict[str, Candidate] = {}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        torch.manual_seed(0)
        workload = WORKLOADS[model](device)
        candidates[name] = CANDIDATES[name](workload, EQUAL_INTERVAL)
        _record(candidates[name], seconds[name], device)
        for _ in range(EQUAL_INTERVAL):  # makes state, and compiles or copies what is made once
            candidates[name].step()
        seconds[name].clear()
    before = {name: _outside(candidate) for name, candidate in candidates.items()}
    for _ in range(intervals * EQUAL_INTERVAL):
        for candidate in candidates.values():
            candidate.step()
    steps = intervals * EQUAL_INTERVAL
    plain = {name: _plain_steps(each) for name, each in seconds.items()}
    rows = []
    for name, candidate in candidates.items():
        inside, outside = sum(seconds[name]) / steps, (_outside(candidate) - before[name]) / steps
        row: dict[str, Any] = {"optimizer": name, "step_s": inside, "outside_s": outside, "own_s": inside + outside}
        ratios = [own / first for own, first in zip(plain[name], plain[names[0]], strict=True)]
        refreshes = [max(each) / own for each, own in zip(_intervals(seconds[name]), plain[name], strict=True)]
        rows.append(
            row | summarise_ratios(f"plain_over_{names[0]}", ratios) | summarise_ratios("refresh_over_plain", refreshes)
        )
    fixed = {"model": workload.name, "device": device_name(device), "threads": torch.get_num_threads()}
    return pd.DataFrame(rows).assign(interval=EQUAL_INTERVAL, steps=steps, **fixed)


def _intervals(seconds: Sequence[float]) -> list[Sequence[float]]:
    return [seconds[start : start + EQUAL_INTERVAL] for start in range(0, len(seconds), EQUAL_INTERVAL)]


def _plain_steps(seconds: Sequence[float]) -> list[float]:
    """Of each interval, the median of all calls but the longest."""
    return [statistics.median(sorted(each)[:-1]) for each in _intervals(seconds)]


def _record(candidate: Candidate, seconds: list[float], device: str) -> None:
    """Have the seconds of every ``optimizer.step`` of a candidate recorded."""
    step = candidate.optimizer.step

    def timed(*args: Any) -> Any:
        synchronize(device)
        start = time.perf_counter()
        result = step(*args)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        return result

    candidate.optimizer.step = timed  # type: ignore[method-assign]


def _outside(candidate: Candidate) -> float:
    times = getattr(candidate.optimizer, "times", None)
    return 0.0 if times is None else times.curvature


def main() -> None:
    """Measure, print and write ``results/bench/own-work-<model>.csv``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=list(WORKLOADS), default="schnet")
    parser.add_argument("--optimizer", nargs="+", choices=MEASURABLE, default=SHOWN)
    parser.add_argument("--intervals", type=int, default=2, help="1 or more")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("results/bench"))
    arguments = parser.parse_args()
    if arguments.intervals < 1:
        parser.error(f"--intervals {arguments.intervals}: must be 1 or more")
    try:
        frame = compare(arguments.model, arguments.optimizer, intervals=arguments.intervals, device=arguments.device)
    except Unsupported as reason:
        parser.error(f"{arguments.model} is not for all of {', '.join(arguments.optimizer)}: {reason}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(arguments.out / f"own-work-{arguments.model}-{arguments.device.split(':')[0]}.csv", index=False)
    print(show_ratios(frame))


if __name__ == "__main__":
    main()
