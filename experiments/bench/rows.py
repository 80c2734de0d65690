"""Whether a larger embedding table makes a step more expensive: ``make bench`` runs it.

A DLRM whose gradients are sparse, once with 10⁵ and once with 10⁷ rows in its largest table, a step of each in turn
under AdaGrad and under NG+ on AdaGrad, every step refreshing the curvature of the latter. A table of any length keeps a
d×d matrix, so the ratio should be near one; what is left of it is the cache, which holds the small table only.
"""

import argparse
import statistics
import time
from pathlib import Path

import pandas as pd
import torch

from experiments.bench.compared_optimizers import CANDIDATES, Candidate
from experiments.bench.workloads import dlrm
from experiments.records.provenance import device_name

ROWS = (100_000, 10_000_000)
OPTIMIZERS = ("adagrad", "ngplus-adagrad")


def compare(*, rounds: int, device: str, rows: tuple[int, int] = ROWS) -> pd.DataFrame:
    """One row an optimizer: seconds a step with either table, and the median over rounds of their ratio."""
    return pd.DataFrame([_row(name, rounds=rounds, device=device, rows=rows) for name in OPTIMIZERS])


def _row(name: str, *, rounds: int, device: str, rows: tuple[int, int]) -> dict[str, object]:
    candidates = [CANDIDATES[name](dlrm(device, largest=n, sparse=True), 1) for n in rows]
    seconds = [[_seconds(candidate) for candidate in candidates] for _ in range(rounds + 2)][2:]
    small, large = (statistics.median(side) for side in zip(*seconds, strict=True))
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "optimizer": name,
        "small_rows": rows[0],
        "large_rows": rows[1],
        "small_step_s": small,
        "large_step_s": large,
        "large_over_small": statistics.median(large / small for small, large in seconds),
    }


def _seconds(candidate: Candidate) -> float:
    start = time.perf_counter()
    candidate.step()
    return time.perf_counter() - start


def main() -> None:
    """Measure, print and write ``results/bench/rows.csv``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("results/bench/rows.csv"))
    arguments = parser.parse_args()
    frame = compare(rounds=arguments.rounds, device="cpu")
    print(frame.round(5).to_string(index=False))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(arguments.out, index=False)


if __name__ == "__main__":
    main()
