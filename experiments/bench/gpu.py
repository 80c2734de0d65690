"""Everything that wants a GPU, in one call: ``make gpu``.

Tests, benches and then, for the minutes that are left, SchNet on all of QM9 at the paper's settings, NG+ and Adam in
turns of `TURN_S`. A part whose packages are missing is left out, one that fails or runs over its time does not stop the
others, and a training goes on where it was when the same call is made again.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

PYTHON = (sys.executable, "-m")
TURN_S = 90.0
TRAINED = ("adam", "ngplus-adam")


@dataclass(frozen=True, kw_only=True)
class Part:
    """A command, the packages it needs, and the seconds it is given.

    Attributes:
        name: as it is reported.
        command: what to run.
        needs: modules that must be there.
        seconds: after which it is stopped.
    """

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    seconds: float = 180.0


def parts(out: Path, device: str) -> list[Part]:
    """What is run before the training."""
    bench = (*PYTHON, "experiments.bench.steps", "--device", device, "--out", str(out / "bench"))
    curvature = (*PYTHON, "experiments.bench.curvature_step", "--device", device, "--batch", "32", "256")
    models = {"resnet50": ("torchvision",), "transformer": (), "dlrm": (), "schnet": ("schnetpack",)}
    return [
        Part(name="tests", command=(*PYTHON, "pytest", "-q", "-m", "gpu", "tests/ngplus"), needs=("pytest",)),
        Part(
            name="plain step",
            command=(*PYTHON, "experiments.bench.plain_step", "--out", str(out / "bench" / f"plain-step-{device}.csv")),
            needs=("torchvision",),
        ),
        Part(
            name="curvature",
            command=(*curvature, "--out", str(out / "bench" / f"curvature-{device}.csv")),
            needs=("torchvision",),
        ),
        *(
            Part(name=f"steps, {name}", command=(*bench, "--model", name), needs=needs)
            for name, needs in models.items()
        ),
    ]


def run_part(part: Part) -> str:
    """Run it, and say in a few words how it ended."""
    if missing := [name for name in part.needs if find_spec(name) is None]:
        return f"left out: {', '.join(missing)} is not installed"
    start = time.monotonic()
    status = _run(part.command, part.seconds)
    took = f"{time.monotonic() - start:.0f} s"
    return f"stopped after {took}" if status is None else f"{'done' if status == 0 else f'failed ({status})'}, {took}"


def train(out: Path, data_dir: Path, device: str, seconds: float, turn_s: float = TURN_S) -> str:
    """SchNet at the paper's scale under each of `TRAINED` in turn, from checkpoint to checkpoint."""
    command = (*PYTHON, "experiments", "run", "schnet-qm9", "--scale", "paper", "--seed", "1", "--device", device)
    where = ("--results-dir", str(out), "--data-dir", str(data_dir), "--checkpoint-every", "15")
    end, turns, running = time.monotonic() + seconds, 0, list(TRAINED)
    while running and (left := end - time.monotonic()) > min(30.0, turn_s / 2):
        name = running[turns % len(running)]
        status = _run((*command, *where, "--optimizer", name), min(turn_s, left))
        turns += 1
        if status is not None:  # finished, or cannot run; either way it needs no further turn
            running.remove(name)
            if status:
                return f"{name} failed ({status})"
    return f"{turns} turns"


def _run(command: Sequence[str], seconds: float) -> int | None:
    """Exit status, or None where the time was up."""
    print("+", " ".join(command[1:]), flush=True)
    try:
        return subprocess.run(command, timeout=max(1.0, seconds), check=False).returncode
    except subprocess.TimeoutExpired:
        return None


def main() -> None:
    """Run everything and print how each part ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=25.0, help="for all of it; the training takes what is left")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    report = {}
    for part in parts(arguments.out, arguments.device):
        report[part.name] = run_part(part)
    if find_spec("schnetpack") is None:
        report["training"] = "left out: schnetpack is not installed"
    else:
        report["training"] = train(arguments.out, arguments.data_dir, arguments.device, end - time.monotonic())
    for name, ending in report.items():
        print(f"{name:20} {ending}")


if __name__ == "__main__":
    main()
