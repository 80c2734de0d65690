#!/usr/bin/env bash
# submitit 1.5.4: a job is to be signalled `signal_delay_s` before its limit, to write a checkpoint. In the local
# executor a limit that is not longer than that delay has two other effects. If they are equal, as for half a minute
# with the default delay of 30 seconds, the signal is sent before the new process can handle it, and ends it: the
# function is never called. If the limit is the shorter one, no signal is sent at all: the job is stopped at its limit
# without a checkpoint and without a restart. Neither the executor nor `result()` says why.
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
cd "$dir"
venv/bin/pip install --quiet submitit==1.5.4 cloudpickle==3.1.2 >pip.log 2>&1 ||
  { cat pip.log; exit 2; }

cat >check.py <<'EOF'
import time
from importlib.metadata import version
from pathlib import Path

import submitit


class Job:
    """Notes its calls and its checkpoints."""

    def __call__(self, log, seconds):
        with open(log, "a") as file:
            file.write("call\n")
        time.sleep(seconds)
        return "done"

    def checkpoint(self, log, seconds):
        with open(log, "a") as file:
            file.write("checkpoint\n")
        return submitit.helpers.DelayedSubmission(self, log, 0)


def run(name, seconds, **parameters):
    log = Path(f"log-{name}").resolve()
    log.touch()
    executor = submitit.LocalExecutor(f"jobs-{name}")
    executor.update_parameters(**parameters)
    try:
        result = executor.submit(Job(), str(log), seconds).result()
    except submitit.core.utils.UncompletedJobError:
        result = "no output"
    events = log.read_text().split()
    counts = events.count("call"), events.count("checkpoint")
    print(f"{parameters}, a job of {seconds} s: {counts[0]} calls, {counts[1]} checkpoints, result: {result}")
    return *counts, result


if __name__ == "__main__":
    print("submitit", version("submitit"), "(default signal_delay_s: 30)")
    longer = run("longer", 60, timeout_min=0.05, signal_delay_s=2)
    equal = run("equal", 0.1, timeout_min=0.5)
    shorter = run("shorter", 60, timeout_min=0.05, signal_delay_s=4)
    assert longer == (2, 1, "done")
    assert equal == (0, 0, "no output")
    assert shorter == (1, 0, "no output")
    print("expected: (1, 0, done) for the job of 0.1 s, a checkpoint for the last one, or such limits refused")
EOF
venv/bin/python -W ignore check.py
