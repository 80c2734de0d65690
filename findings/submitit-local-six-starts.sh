#!/usr/bin/env bash
# submitit 1.5.4: `max_num_timeout` says how often a checkpointable job is restarted after a timeout. The local
# executor never starts a job more than six times, whatever that number is, and does not say so: the job ends as
# FINISHED, and `result()` reports that there is no output, where a job that has used up its own number of timeouts
# says that.
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


class Sleeper(submitit.helpers.Checkpointable):
    """Notes each start, then sleeps past the limit."""

    def __call__(self, log):
        with open(log, "a") as file:
            file.write("start\n")
        time.sleep(60)


def run(limit):
    log = Path(f"starts-{limit}").resolve()
    executor = submitit.LocalExecutor(f"jobs-{limit}", max_num_timeout=limit)
    executor.update_parameters(timeout_min=0.05, signal_delay_s=2)  # a timeout after one second
    job = executor.submit(Sleeper(), str(log))
    try:
        job.result()
    except Exception as error:
        told = "timed-out too many times" in str(error)
        reason = "timed out too many times" if told else str(error).splitlines()[1]
        starts = len(log.read_text().splitlines())
        print(f"max_num_timeout={limit}: {starts} starts, state {job.state}, {type(error).__name__}: {reason}")
        return starts, told
    raise AssertionError("the job cannot have a result")


if __name__ == "__main__":
    print("submitit", version("submitit"))
    few, many = run(2), run(10)
    assert few == (3, True)
    assert many == (6, False)
    print("expected: 11 starts for ten restarts, or a message that names the limit of six")
EOF
venv/bin/python -W ignore check.py
