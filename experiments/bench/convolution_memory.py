"""Peak memory of a curvature step of large convolutions, compared with SGD's: ``make bench`` runs it.

Unfolded whole, one volume of 64³ pixels and 16 channels has 27 times as many elements as the layer's input.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from experiments.bench.peak_memory import peak_memory_mb
from experiments.bench.workloads import WORKLOADS
from experiments.records.provenance import device_name

MODELS = ("conv1d", "conv2d", "conv2d-depthwise", "conv3d", "conv3d-batch-4")


def compare(models: Sequence[str], *, rounds: int, device: str) -> pd.DataFrame:
    """Rows of SGD, and of NG+ with either kind of sample, for each model.

    Args:
        models: of `WORKLOADS`, each with one more of its name and ``-rows``.
        rounds: how often each is measured, in a process of its own; medians count.
        device: where.

    Returns:
        A row a model, optimizer and kind of sample.
    """
    rows = []
    for model in models:
        names = {"sgd": model, "ngplus": model, "ngplus-rows": f"{model}-rows"}
        peaks = {
            optimizer: statistics.median(
                peak_memory_mb(name, optimizer.removesuffix("-rows"), device) for _ in range(rounds)
            )
            for optimizer, name in names.items()
        }
        rows += [
            {
                "model": WORKLOADS[model](device).name,
                "device": device_name(device),
                "threads": torch.get_num_threads(),
                "rounds": rounds,
                "optimizer": optimizer,
                "peak_memory_mb": peak,
                "over_sgd": peak / peaks["sgd"],
            }
            for optimizer, peak in peaks.items()
        ]
    return pd.DataFrame(rows)


def main() -> None:
    """Measure, print and write ``results/bench/convolution-memory-<device>.csv``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("results/bench"))
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds}: must be 1 or more")
    frame = compare(arguments.model, rounds=arguments.rounds, device=arguments.device)
    print(frame.round(3).to_string(index=False))
    arguments.out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(arguments.out / f"convolution-memory-{arguments.device.split(':')[0]}.csv", index=False)


if __name__ == "__main__":
    main()
