#!/usr/bin/env bash
# torch 2.14.1, DistributedDataParallel.join: at its end the model of the process that had the most batches is sent to
# all, so that every process has the same weights. The optimizer's state is not: a process that ran out of batches
# keeps the momentum of its last own step. The first ordinary step afterwards takes the processes apart, though they
# average their gradients, and nothing brings them together again before the next `join`. Its documentation names
# nothing else that a training loop has to do.
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
cd "$dir"
venv/bin/pip install --quiet torch==2.14.1 numpy==2.3.5 >pip.log 2>&1 ||
  { cat pip.log; exit 2; }

cat >check.py <<'EOF'
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def worker(rank, store, queue):
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(x):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    with model.join():
        for _ in range(3 + 2 * rank):  # three batches here, five there
            step(torch.randn(4, 3))
    values = [model.module.weight.tolist(), optimizer.state[model.module.weight]["momentum_buffer"].tolist()]
    for _ in range(2):
        step(torch.ones(4, 3))
        values.append(model.module.weight.tolist())
    queue.put((rank, values))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    print("torch", torch.__version__)
    context = mp.get_context("spawn")
    queue = context.Queue()
    store = Path("store").resolve()
    processes = [context.Process(target=worker, args=(rank, store, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    results = dict(queue.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    equal = []
    labels = ("weights, end of join", "momentum, end of join", "weights, 1 step later", "weights, 2 steps later")
    for label, one, two in zip(labels, results[0], results[1], strict=True):
        equal.append(one == two)
        shown = [[round(v, 4) for v in value[0]] for value in (one, two)]
        print(f"{label:22} equal: {equal[-1]!s:5} {shown[0]} {shown[1]}")
    assert equal == [True, False, False, False]
    print("expected: equal in all four lines, as in training without join")
    sys.exit(any(process.exitcode for process in processes))
EOF
venv/bin/python -W ignore check.py
