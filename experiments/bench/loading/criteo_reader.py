"""How fast, and in how much memory, Criteo's log is read, on a made file in its exact format: ``make bench-criteo``.

The file is made in a temporary folder, prepared by a process of its own and then read in shuffled batches of 128 from
the maps. Of a shared machine the processor's seconds say more than those of the clock: ``lines_per_s_of_two_cores`` is
what two cores would do that are never idle.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.estimate.stand_ins.criteo_log import write_log
from experiments.records.provenance import device_name
from experiments.tasks.dlrm import criteo, criteo_format
from experiments.tasks.dlrm.block_shuffle import block_batches
from experiments.tasks.dlrm.clicks import Frequent

BATCH = 128


def measure(lines: int, folder: Path) -> dict[str, object]:
    """Make the file, prepare it, read batches; one row of the table."""
    source = criteo_format.log_path(folder)
    source.parent.mkdir(parents=True)
    write_log(source, lines)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    program = (
        "import sys, pathlib; from experiments.tasks.dlrm import criteo; criteo.prepare(pathlib.Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", program, str(folder)], check=True)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    manifest = criteo_format.check_files(criteo_format.columns_path(folder))
    return {
        "device": device_name("cpu"),
        "cores": os.cpu_count(),
        "lines": manifest["lines"],
        "bytes": source.stat().st_size,
        "different_values": sum(manifest["values"]),
        "seconds": seconds,
        "lines_per_s": lines / seconds,
        "processor_s": cpu,
        "lines_per_s_of_two_cores": 2 * lines / cpu,
        "peak_memory_mb": after.ru_maxrss / 1024,
        "batches_per_s": _batches_per_s(folder),
    }


def _batches_per_s(folder: Path, count: int = 5_000) -> float:
    """Shuffled batches of `BATCH` rows, numbers, table rows and labels, from the maps."""
    clicks, _ = criteo.load(folder)
    rows = Frequent(clicks.vocabulary, 1)
    start = time.perf_counter()
    done = 0
    for indices in block_batches(clicks.parts["train"][1], BATCH, seed=0, epoch=0):
        np.array(clicks.dense[indices]), rows.to_rows(clicks.categories[indices]), clicks.labels[indices]
        done += 1
        if done == count:
            break
    return done / (time.perf_counter() - start)


def main() -> None:
    """Measure, print and write ``results/bench/criteo-reader.csv``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=5_000_000)
    parser.add_argument("--out", type=Path, default=Path("results/bench/criteo-reader.csv"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        frame = pd.DataFrame([measure(arguments.lines, Path(folder))])
    print(frame.round(1).T.to_string(header=False))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(arguments.out, index=False)


if __name__ == "__main__":
    main()
