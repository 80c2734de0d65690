import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from experiments.launch.local import run_in_processes
from experiments.records.provenance import REPOSITORY

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Writes:
    """Notes in a file when it begins and ends, and fails in the way it is told."""

    name: str
    folder: Path
    seconds: float = 0.0
    after_begun: int = 0
    ending: str = ""

    def run_in_one_line(self):
        (self.folder / f"{self.name}.begun").write_text(f"{os.getpid()} {os.environ.get('OMP_NUM_THREADS')}")
        time.sleep(self.seconds)
        while len(begun(self.folder)) < self.after_begun:
            time.sleep(0.01)
        (self.folder / f"{self.name}.ended").touch()
        if self.ending == "exit":
            sys.exit(2)
        if self.ending == "kill":
            os.kill(os.getpid(), signal.SIGKILL)


def begun(folder):
    return [path.stem for path in sorted(folder.glob("*.begun"), key=lambda path: path.stat().st_mtime_ns)]


def alive(folder):
    pids = [int(path.read_text().split()[0]) for path in folder.glob("*.begun") if path.read_text()]
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_all_are_done_in_order_and_a_failure_is_named_with_its_reason(tmp_path, capsys):
    works = [Writes("a", tmp_path, ending="exit"), Writes("b", tmp_path, ending="kill"), Writes("c", tmp_path)]
    assert run_in_processes(works) == {"a": "failed with exit status 2", "b": "killed by SIGKILL"}
    assert begun(tmp_path) == ["a", "b", "c"]
    first, second, third = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"1 of 3 runs done, about \d+ (s|min) left", first)
    assert second.startswith("2 of 3 runs done, about ")
    assert third == "3 of 3 runs done"


def test_two_at_a_time_each_with_its_number_of_threads(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    works = [Writes(name, tmp_path, after_begun=2) for name in "abc"]
    assert run_in_processes(works, workers=2, threads=3) == {}
    assert {path.read_text().split()[1] for path in tmp_path.glob("*.begun")} == {"3"}
    first_end = min(path.stat().st_mtime_ns for path in tmp_path.glob("*.ended"))
    assert (tmp_path / f"{begun(tmp_path)[-1]}.begun").stat().st_mtime_ns >= first_end
    assert os.environ["OMP_NUM_THREADS"] == "7"


PROGRAM = """
import signal

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
import sys
from pathlib import Path
from experiments.launch.local import run_in_processes
from test_local import Writes
if __name__ == "__main__":
    run_in_processes([Writes(name, Path(sys.argv[1]), seconds=60.0) for name in "abc"], workers=2)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_whatever_ends_the_parent_ends_the_children(tmp_path, number):
    (tmp_path / "program.py").write_text(PROGRAM)
    paths = os.pathsep.join([str(HERE), str(REPOSITORY)])
    program = [sys.executable, str(tmp_path / "program.py"), str(tmp_path)]
    process = subprocess.Popen(program, env=os.environ | {"PYTHONPATH": paths}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(alive(tmp_path)) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(timeout=30) != 0
    while alive(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert len(begun(tmp_path)) == 2
    assert not list(tmp_path.glob("*.ended"))
