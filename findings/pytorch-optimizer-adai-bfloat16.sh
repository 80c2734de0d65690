#!/usr/bin/env bash
# pytorch-optimizer 4.1.0: Adai bounds its momentum coefficient by 1 - eps, by default 0.999, so that the bias
# correction 1 - (product of the coefficients) is never zero. In bfloat16 0.999 rounds to 1: an entry whose gradient is
# small compared with the others gets a correction of exactly zero, and its weight is NaN after the first step. One
# step later every weight is, because the coefficients are scaled by a mean over all of them. Its documentation
# mentions bfloat16 and names no restriction.
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
runs = {}
for dtype in (torch.float32, torch.bfloat16):
    weight = nn.Parameter(torch.tensor([1.0, 0.01], dtype=dtype))
    optimizer = pytorch_optimizer.Adai([weight], lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        (weight.square().sum() / 2).backward()
        optimizer.step()
        runs[dtype, step] = weight.detach().clone()
        product = optimizer.state[weight]["beta1_prod"].tolist()
        print(f"{dtype}, step {step + 1}: weights {weight.tolist()}, products of the coefficients {product}")
assert all(runs[torch.float32, step].isfinite().all() for step in range(2))
assert runs[torch.bfloat16, 0].isnan().tolist() == [False, True]
assert runs[torch.bfloat16, 1].isnan().all()
print("expected: in bfloat16 the weights of float32, rounded")
EOF
venv/bin/python -W ignore check.py
