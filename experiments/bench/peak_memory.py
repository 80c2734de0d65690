"""Peak memory of training under an optimizer, measured in a process of its own."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import torch


def peak_memory_mb(model: str, optimizer: str, device: str) -> float:
    """Peak memory of four steps, two of them refreshing, in MiB.

    On a GPU what was allocated there; on a CPU the process's peak resident memory above what it had before the model
    was made, and after a first optimizer was: torch imports 160 MB with that.

    Args:
        model: of `WORKLOADS`.
        optimizer: of `CANDIDATES`.
        device: where.

    Returns:
        MiB.
    """
    command = [sys.executable, "-m", "experiments.bench.peak_memory", model, optimizer, device]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(result.stdout.splitlines()[-1])


def _resident_mb() -> float:
    """The most this process took; ``getrusage`` would count what its parent took before it as well."""
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024  # type: ignore[index]


def _measure(model: str, optimizer: str, device: str) -> float:
    from experiments.bench.compared_optimizers import CANDIDATES
    from experiments.bench.workloads import WORKLOADS

    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    before = _resident_mb()
    candidate = CANDIDATES[optimizer](WORKLOADS[model](device), 2)
    for _ in range(4):
        candidate.step()
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    return _resident_mb() - before


def main() -> None:
    """Print the peak memory of one optimizer on one model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("optimizer")
    parser.add_argument("device")
    arguments = parser.parse_args()
    print(_measure(arguments.model, arguments.optimizer, arguments.device))


if __name__ == "__main__":
    main()
