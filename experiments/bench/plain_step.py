"""Whether a plain step of NG+ on a GPU ever waits for it: ``make gpu`` runs it.

A plain step, one that builds no curvature, only queues work. The profiler counts the calls into CUDA that wait for the
device or bring a value back from it during optimizer steps alone, forward and backward being left out.
"""

import argparse
from pathlib import Path

import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile

from experiments.bench.compared_optimizers import CANDIDATES
from experiments.bench.workloads import WORKLOADS, Workload
from experiments.errors import UserError
from experiments.records.provenance import device_name

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "Memcpy DtoH")
STEPS = 5


def waits(model: str, optimizer: str) -> pd.DataFrame:
    """A row for each kind of wait: how often it came in `STEPS` plain steps.

    Args:
        model: of `WORKLOADS`.
        optimizer: of `CANDIDATES`.

    Returns:
        A row a kind of synchronisation, with its count.

    Raises:
        UserError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise UserError("waiting for a device is measured on one: there is no CUDA device here")
    workload = WORKLOADS[model]("cuda")
    candidate = CANDIDATES[optimizer](workload, 10**6)
    candidate.step()
    candidate.step()
    counts = dict.fromkeys(WAITS, 0)
    for _ in range(STEPS):
        for name, count in _step(workload, candidate.optimizer).items():
            counts[name] += count
    rows = [{"wait": name, "calls": count} for name, count in counts.items()]
    return pd.DataFrame(rows).assign(device=device_name("cuda"), model=workload.name, optimizer=optimizer, steps=STEPS)


def _step(workload: Workload, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    workload.loss(workload.model(*workload.inputs)).backward()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        optimizer.step()
    optimizer.zero_grad()
    # The profiler itself waits for the device once, as it stops.
    own = {"cudaDeviceSynchronize": 1}
    events = profiler.events()
    return {wait: sum(wait in event.name for event in events) - own.get(wait, 0) for wait in WAITS}


def main() -> None:
    """Count, print and write ``results/bench/plain-step-cuda.csv``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=list(WORKLOADS), default="resnet50")
    parser.add_argument("--optimizer", choices=list(CANDIDATES), default="ngplus")
    parser.add_argument("--out", type=Path, default=Path("results/bench/plain-step-cuda.csv"))
    arguments = parser.parse_args()
    frame = waits(arguments.model, arguments.optimizer)
    print(frame.to_string(index=False))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(arguments.out, index=False)


if __name__ == "__main__":
    main()
