"""Processes besides that of the tests: fresh ones, and two that train together over gloo.

All are forked from one server that has imported torch, since importing it is what starting a process takes.
"""

import datetime
import os
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo  # what an optimizer imports when it is made: part of starting, not of the first task
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.multiprocessing as mp

DEADLOCK_SECONDS = 120
START_SECONDS = 240
FRESH = mp.get_context("forkserver")
"""Makes processes that share nothing with the one that starts them but the modules that they import first."""
_PRELOADED = ["pytest", "tests.ngplus.training.problems", __name__]
FRESH.set_forkserver_preload(_PRELOADED)


def preload(module: str) -> None:
    """Have the server import a module too, before the first process is started."""
    _PRELOADED.append(module)
    FRESH.set_forkserver_preload(_PRELOADED)


def in_a_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What ``function(*arguments)`` returned in a process of its own.

    Raises:
        AssertionError: where it raised, or did not end.
    """
    ours, theirs = FRESH.Pipe()
    process = FRESH.Process(target=_answer_and_wait, args=(theirs, function, arguments), daemon=True)
    process.start()
    try:
        assert ours.poll(START_SECONDS), "the process is stuck"
        fine, answer = ours.recv()
        ours.send(None)
    finally:
        process.join(10)
        process.kill()
    assert fine, answer
    return answer


def _answer(pipe: Any, function: Callable[..., Any], arguments: tuple) -> None:
    """Send whether a function returned, and what; where it raised, the traceback."""
    try:
        pipe.send((True, function(*arguments)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def _answer_and_wait(pipe: Any, function: Callable[..., Any], arguments: tuple) -> None:
    """Live until the answer has been received: tensors are sent as memory that is shared."""
    _answer(pipe, function, arguments)
    pipe.recv()


def _work(rank: int, world: int, port: int, seconds: float, pipe: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=seconds))
    pipe.send((True, None))
    while (task := pipe.recv()) is not None:
        function, arguments, is_last = task
        _answer(pipe, function, arguments)
        if is_last:
            return
    dist.destroy_process_group()


class Team:
    """Runs a function in every process at once.

    Args:
        world: how many processes there are.
        seconds: that they wait for one another.
    """

    def __init__(self, world: int = 2, seconds: float = DEADLOCK_SECONDS / 2) -> None:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port, self._pipes, self._processes = store.port, [], []
        del store
        for rank in range(world):
            ours, theirs = FRESH.Pipe()
            process = FRESH.Process(target=_work, args=(rank, world, port, seconds, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)
        self._receive(START_SECONDS)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``function(*arguments)`` returned in each process.

        Raises:
            AssertionError: where it raised in one of them, or did not end.
        """
        self._send(function, arguments, is_last=False)
        answers = self._receive(DEADLOCK_SECONDS)
        assert all(fine for fine, _ in answers), "\n".join(answer for fine, answer in answers if not fine)
        return [answer for _, answer in answers]

    def tracebacks(self, function: Callable[..., Any]) -> list[str]:
        """Those of ``function()``, which raises in each process and ends it."""
        self._send(function, (), is_last=True)
        answers = self._receive(DEADLOCK_SECONDS)
        assert not any(fine for fine, _ in answers), answers
        return [answer for _, answer in answers]

    def _send(self, function: Callable[..., Any], arguments: tuple, *, is_last: bool) -> None:
        for pipe in self._pipes:
            pipe.send((function, arguments, is_last))

    def _receive(self, seconds: float) -> list[tuple[bool, Any]]:
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(seconds):
                self.close()
                raise AssertionError(f"process {rank} is stuck")
            answers.append(pipe.recv())
        return answers

    def close(self) -> None:
        """End the processes."""
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            if process.is_alive():
                pipe.send(None)
        for process in self._processes:
            process.join(10)
            process.kill()
