#!/usr/bin/env bash
# pytorch-optimizer 4.1.0: while too few steps have been made to rectify the variance, the shared RAdam code gives a
# step size of -lr as a mark for "no update". RAdam checks for it and stays where it is; Ranger uses it as a step size,
# so that its first five steps, with default settings, go against the direction of descent.
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
cd "$dir"
venv/bin/pip install --quiet pytorch-optimizer==4.1.0 torch==2.14.1 numpy==2.3.5 >pip.log 2>&1 ||
  { cat pip.log; exit 2; }

cat >check.py <<'EOF'
from importlib.metadata import version

import pytorch_optimizer
import torch
from torch import nn

print("pytorch-optimizer", version("pytorch-optimizer"), "torch", torch.__version__)
print("minimizing w**2 / 2 from w = 1 with lr=0.1:")


def path(make, steps=5):
    weight = nn.Parameter(torch.ones(1))
    optimizer = make([weight], lr=0.1)
    positions = [1.0]
    for _ in range(steps):
        optimizer.zero_grad()
        (weight.square().sum() / 2).backward()
        optimizer.step()
        positions.append(round(weight.item(), 3))
    return positions


ranger, radam, torch_radam = map(path, (pytorch_optimizer.Ranger, pytorch_optimizer.RAdam, torch.optim.RAdam))
print("  Ranger:           ", ranger)
print("  RAdam:            ", radam)
print("  torch.optim.RAdam:", torch_radam)
assert all(b > a for a, b in zip(ranger, ranger[1:])) and ranger[-1] > 1.5
assert radam == [1.0] * 6
assert all(b < a for a, b in zip(torch_radam, torch_radam[1:]))
print("expected: w that falls, or that stays until the variance can be rectified")
EOF
venv/bin/python -W ignore check.py
