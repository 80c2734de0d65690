"""Where a run's numbers come from: the commit, the versions, the device."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

REPOSITORY = Path(__file__).parents[2]
# What this repository recorded: in a checkout, or in the installed package.
_PLACES = (REPOSITORY / "results", Path(__file__).parents[1] / "recorded")
RECORDED = next((place for place in _PLACES if place.is_dir()), None)
PACKAGES = (
    "fairseq-fixed",
    "ngplus",
    "numpy",
    "pytorch-optimizer",
    "schnetpack",
    "torch",
    "torchvision",
)


def git_state() -> tuple[str | None, bool | None]:
    """The commit, and whether tracked files outside ``results/`` differ from it; ``None``s outside a checkout.

    Returns:
        SHA-1 of the commit, and whether the working tree is dirty.
    """
    if not (REPOSITORY / ".git").exists():  # an installed package may be inside a repository of its user's
        return None, None
    sha = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
    return (None, None) if sha is None or changes is None else (sha, bool(changes))


def versions() -> dict[str, str]:
    """Python and the installed packages that can change a number.

    Returns:
        Versions by name.
    """
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def device_name(device: str) -> str:
    """The GPU's name, or the processor's; ``device`` is torch's, as ``"cpu"`` or ``"cuda:0"``.

    Args:
        device: torch's name of it.

    Returns:
        What stands in a record.
    """
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor()


def machine_load() -> float | None:
    """How busy the machine is: processes that run or wait, over the last minute, over its processors.

    Returns:
        1.0 where there is one for each processor; ``None`` where the system does not tell.
    """
    processors = os.cpu_count()
    return os.getloadavg()[0] / processors if processors and hasattr(os, "getloadavg") else None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
