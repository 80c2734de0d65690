"""Whether a plain step of NG+ ever synchronizes with the GPU: ``make gpu`` runs it.

A plain step, one that builds no curvature, only queues work. The profiler counts the calls into CUDA that synchronize
or bring a value back from it during optimizer steps alone, forward and backward being left out.
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

SYNCHRONIZING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "Memcpy DtoH")
STEPS = 5


def count_synchronizations(model: str, optimizer: str) -> pd.DataFrame:
    """Count the calls that synchronize with the device in `STEPS` plain steps.

    Args:
        model: of `WORKLOADS`.
        optimizer: of `CANDIDATES`.

    Returns:
        A row a kind of call.

    Raises:
        UserError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise UserError("synchronization with a device is measured on one: there is no CUDA device here")
    workload = WORKLOADS[model]("cuda")
    candidate = CANDIDATES[optimizer](workload, 10**6)
    candidate.step()
    candidate.step()
    counts = dict.fromkeys(SYNCHRONIZING, 0)
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
    # The profiler itself synchronizes once, as it stops.
    own = {"cudaDeviceSynchronize": 1}
    events = profiler.events()
    return {name: sum(name in event.name for event in events) - own.get(name, 0) for name in SYNCHRONIZING}


def main() -> None:
    """Count, print and write ``results/bench/plain-step-cuda.csv``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=list(WORKLOADS), default="resnet50")
    parser.add_argument("--optimizer", choices=list(CANDIDATES), default="ngplus")
    parser.add_argument("--out", type=Path, default=Path("results/bench/plain-step-cuda.csv"))
    arguments = parser.parse_args()
    frame = count_synchronizations(arguments.model, arguments.optimizer)
    print(frame.to_string(index=False))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(arguments.out, index=False)


if __name__ == "__main__":
    main()
