"""Two processes that train together over gloo, kept for many tests, since starting them is what takes time."""

import datetime
import os
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo  # what an optimizer imports when it is made: part of starting, not of the first task
import torch.distributed as dist
import torch.multiprocessing as mp

DEADLOCK_SECONDS = 120
START_SECONDS = 240


def _work(rank: int, world: int, port: int, pipe: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group(
        "gloo", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=DEADLOCK_SECONDS / 2)
    )
    pipe.send((True, None))
    while (task := pipe.recv()) is not None:
        function, arguments = task
        try:
            pipe.send((True, function(*arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class Team:
    """Runs a function in every process at once."""

    def __init__(self, world: int = 2) -> None:
        context = mp.get_context("spawn")
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port, self._pipes, self._processes = store.port, [], []
        del store
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, world, port, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)
        self._answers(START_SECONDS)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``function(*arguments)`` returned in each process.

        Raises:
            AssertionError: where it raised in one of them, or did not end.
        """
        for pipe in self._pipes:
            pipe.send((function, arguments))
        return self._answers(DEADLOCK_SECONDS)

    def _answers(self, seconds: float) -> list[Any]:
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(seconds):
                self.close()
                raise AssertionError(f"process {rank} is stuck")
            answers.append(pipe.recv())
        assert all(fine for fine, _ in answers), "\n".join(answer for fine, answer in answers if not fine)
        return [answer for _, answer in answers]

    def close(self) -> None:
        """End the processes."""
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            if process.is_alive():
                pipe.send(None)
        for process in self._processes:
            process.join(10)
            process.kill()
