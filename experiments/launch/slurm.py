"""Runs on a SLURM cluster, by submitit: an array of jobs, each one run over its GPUs and nodes.

A job that is preempted or out of time is queued again, and goes on from its checkpoint.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import submitit
from submitit.helpers import Checkpointable, TorchDistributedEnvironment

from experiments.errors import UserError
from experiments.launch.jobs import Job
from experiments.launch.local import cpu_threads, describe_progress
from experiments.training.distributed import leave_workers

# How often a job that runs out of time is queued again.
_TIMEOUTS = 1000
# When a job is asked to stop, before its end; SLURM may be up to a minute early.
_SIGNAL_S = 90
_LEAST_MINUTES = 1 + (_SIGNAL_S + 60) // 60


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a run gets.

    Attributes:
        partition: SLURM's partition, ``None`` for its default.
        nodes: machines.
        gpus: a machine; as many processes train together there, one without a GPU.
        threads: CPU cores a process.
        minutes: until SLURM ends the job and it is queued again; at least 3, since it is asked to stop 90 to 150
            seconds before.
        at_once: runs at a time, ``None`` for as many as there is room for.
    """

    partition: str | None = None
    nodes: int = 1
    gpus: int = 0
    threads: int = 1
    minutes: int = 24 * 60
    at_once: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("nodes", 1), ("gpus", 0), ("threads", 1), ("minutes", _LEAST_MINUTES)):
            if getattr(self, name) < least:
                raise UserError(f"{name} = {getattr(self, name)}: must be at least {least}")


class NamedRun(Protocol):
    """Something to do; travels to the cluster pickled."""

    @property
    def name(self) -> str:
        """What a person calls it."""
        ...

    def run(self) -> None:
        """Do it; a failure is an exception."""
        ...


class ClusterRun(Checkpointable):
    """One process of a run on a cluster; asked to stop, it is submitted again as it is.

    Args:
        job: what it does.
    """

    def __init__(self, job: NamedRun) -> None:
        self.job = job

    def __call__(self) -> None:
        """Join the other processes, the way ``torchrun`` describes them, and run."""
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        try:
            self.job.run()
        finally:
            leave_workers()


def submit(
    jobs: Sequence[Job], resources: Resources, folder: Path, cluster: str = "slurm"
) -> list[tuple[Job, submitit.Job[None]]]:
    """Submit what is not finished, and return each run with what was submitted for it.

    Args:
        jobs: the runs.
        resources: of each.
        folder: where submitit keeps its scripts and logs.
        cluster: ``"slurm"``, or ``"local"`` for processes on this machine, which submitit starts six times at most.

    Returns:
        Each run that was not finished, with its job.

    Raises:
        UserError: there is no such cluster here.
    """
    return _submit([job for job in jobs if not job.is_finished()], resources, folder, cluster)


def run_on_cluster(
    works: Sequence[NamedRun], resources: Resources, folder: Path, cluster: str = "slurm"
) -> dict[str, str]:
    """Submit all of it and wait until it is over; one that fails does not stop the others.

    Args:
        works: what to do.
        resources: of each.
        folder: where submitit keeps its scripts and logs.
        cluster: as for `submit`.

    Returns:
        Why it failed, by name, for each one that did.

    Raises:
        UserError: there is no such cluster here.
    """
    failed, start = {}, time.monotonic()
    for done, (work, submitted) in enumerate(_submit(works, resources, folder, cluster), 1):
        try:
            submitted.results()
        except Exception:  # whatever ended it
            failed[work.name] = f"failed as SLURM job {submitted.job_id}, its output is in {folder}"
            print(f"{work.name}: {failed[work.name]}", file=sys.stderr, flush=True)
        print(describe_progress(done, len(works), time.monotonic() - start), flush=True)
    return failed


def _submit[T: NamedRun](
    works: Sequence[T], resources: Resources, folder: Path, cluster: str
) -> list[tuple[T, submitit.Job[None]]]:
    if not works:
        return []
    try:
        limits = {f"{each}_max_num_timeout": _TIMEOUTS for each in ("slurm", "local")}
        executor = submitit.AutoExecutor(folder, cluster=cluster, **limits)
    except RuntimeError as error:
        raise UserError(f"{cluster}: {error}") from None
    executor.update_parameters(
        name="ngplus",
        nodes=resources.nodes,
        gpus_per_node=resources.gpus or None,
        tasks_per_node=max(1, resources.gpus),
        cpus_per_task=resources.threads,
        timeout_min=resources.minutes,
        slurm_signal_delay_s=_SIGNAL_S,
        slurm_partition=resources.partition,
        slurm_array_parallelism=resources.at_once,
    )
    # SLURM hands the environment on to its jobs.
    with cpu_threads(resources.threads), executor.batch():
        submitted = [executor.submit(ClusterRun(work)) for work in works]
    return list(zip(works, submitted, strict=True))
