"""Data-parallel training under ``torchrun``: who this process is, and what the processes tell each other."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from experiments.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Workers:
    """This process among those that train together.

    Attributes:
        rank: 0 writes records and checkpoints.
        size: number of processes.
        local_rank: its index on this machine, which is the index of its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def from_first[T](self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, on every rank; a `UserError` there is raised everywhere."""
        if self.size == 1:
            return make()
        answer: list[Any] = [None, None]
        if self.is_first:
            try:
                answer[0] = make()
            except UserError as error:
                answer[1] = error
        dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def join_workers(device: str) -> Workers:
    """Join the process group that ``torchrun`` describes in the environment; alone without it.

    Args:
        device: ``"cpu"`` or ``"cuda"``, which decides the backend.

    Returns:
        This process among those that train together.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Workers()
    local_rank = int(os.environ["LOCAL_RANK"])
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    return Workers(rank=dist.get_rank(), size=size, local_rank=local_rank)


def leave_workers() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def choose_device(wanted: str, local_rank: int = 0) -> torch.device:
    """The device for ``"auto"``, ``"cpu"`` or ``"cuda"``.

    Args:
        wanted: as given on the command line.
        local_rank: of this process on its machine, which GPU it takes.

    Returns:
        The device.

    Raises:
        UserError: for another name, or CUDA where there is none.
    """
    if wanted not in ("auto", "cpu", "cuda"):
        raise UserError(f"device = {wanted!r}: must be one of auto, cpu, cuda")
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UserError("device = 'cuda': torch finds no CUDA device on this machine")
    return torch.device("cpu") if wanted == "cpu" or not available else torch.device("cuda", local_rank)
