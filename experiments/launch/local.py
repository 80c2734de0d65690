"""Several runs at once on one machine, each in a process of its own, so that its peak memory is its own."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Protocol

# What a process of numerical libraries reads once, when it starts.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_PATIENCE_S = 10.0


class Work(Protocol):
    """Something to do in a process; travels there pickled."""

    @property
    def name(self) -> str:
        """What a person calls it."""
        ...

    def run_in_one_line(self) -> None:
        """Do it as the whole of a process; a failure is an exit status."""
        ...


def run_in_processes(works: Sequence[Work], *, workers: int = 1, threads: int | None = None) -> dict[str, str]:
    """Do all of it, `workers` at a time, started in order; one that fails does not stop the others.

    Of several, a line says after each how many are done, and about how long the rest takes if it goes on like that.
    When this process ends before, whatever ended it, the processes it started end too.

    Args:
        works: what to do.
        workers: processes at a time.
        threads: CPU threads each, ``None`` for what the environment says.

    Returns:
        Why it failed, by name, for each one that did.
    """
    waiting, running, failed = list(works), {}, {}
    start = time.monotonic()
    with cpu_threads(threads), _stop_on_sigterm():
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    work = waiting.pop(0)
                    running[_start(work)] = work
                for process in _wait_for_ended(running):
                    work = running.pop(process)
                    if reason := _failure(process):
                        failed[work.name] = reason
                        print(f"{work.name}: {reason}", file=sys.stderr, flush=True)
                    if len(works) > 1:
                        done = len(works) - len(waiting) - len(running)
                        print(describe_progress(done, len(works), time.monotonic() - start), flush=True)
        finally:
            _end(list(running))
    return failed


def describe_progress(done: int, count: int, seconds: float) -> str:
    """How far it is, and how long the rest takes at the pace so far.

    Args:
        done: how many are over, at least one.
        count: how many there are.
        seconds: that it took.

    Returns:
        A line.

    Example:
        >>> describe_progress(3, 20, 180.0)
        '3 of 20 runs done, about 17 min left'
        >>> describe_progress(2, 2, 180.0)
        '2 of 2 runs done'
    """
    left = seconds / done * (count - done)
    if not left:
        return f"{done} of {count} runs done"
    return f"{done} of {count} runs done, about {describe_seconds(left)} left"


def describe_seconds(seconds: float) -> str:
    """A length of time, as exact as it can be guessed.

    Args:
        seconds: how long.

    Returns:
        Words.

    Example:
        >>> describe_seconds(50.0), describe_seconds(5000.0)
        ('50 s', '1 h 23 min')
    """
    hours, minutes = divmod(max(1, round(seconds / 60)), 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if seconds >= 60 else f"{seconds:.0f} s"


def _start(work: Work) -> BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=_in_child, args=(work,), name=work.name)
    process.start()
    return process


def _in_child(work: Work) -> None:
    # Ctrl-C reaches all processes of a terminal; the parent tells this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    work.run_in_one_line()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGKILL)


def _wait_for_ended(running: dict[BaseProcess, Work]) -> list[BaseProcess]:
    """The processes that are over, at least one."""
    sentinels = {process.sentinel: process for process in running}
    ended = [sentinels[each] for each in multiprocessing.connection.wait(list(sentinels))]
    for process in ended:
        process.join()
    return ended


def _failure(process: BaseProcess) -> str:
    if process.exitcode < 0:
        return f"killed by {signal.Signals(-process.exitcode).name}"
    return f"failed with exit status {process.exitcode}" if process.exitcode else ""


def _end(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(_PATIENCE_S)
        process.kill()
        process.join()


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Let the processes that are started inside this have so many CPU threads, ``None`` for no change.

    Args:
        count: threads of each process.

    Yields:
        Nothing; the environment is put back afterwards.
    """
    before = {name: os.environ.get(name) for name in _THREADS}
    if count is not None:
        os.environ.update(dict.fromkeys(_THREADS, str(count)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _stop_on_sigterm() -> Iterator[None]:
    """Inside, SIGTERM is an exception, so that what was started is ended."""

    def stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: Callable | int | None = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
