#!/usr/bin/env bash
# pytorch-optimizer 4.1.0: `maximize=True` is carried out by changing the sign of `p.grad` in place, in most of its
# optimizers. After a step the gradient that the program sees has the other sign, so a second step on the same
# gradient, or one to which a further backward pass was added, goes down again. torch.optim's optimizers leave `p.grad`
# alone.
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
print("maximize=True, gradient 1, two steps without zero_grad():")


def two_steps(make):
    weight = nn.Parameter(torch.zeros(1))
    weight.grad = torch.ones(1)
    optimizer = make([weight], lr=0.1, maximize=True)
    positions = []
    for _ in range(2):
        optimizer.step()
        positions.append((round(weight.item(), 3), weight.grad.item()))
    return positions


for module, name in ((torch.optim, "SGD"), (torch.optim, "AdamW")):
    (w1, g1), (w2, g2) = two_steps(getattr(module, name))
    print(f"  torch.optim.{name:12} weight {w1:.3f}, then {w2:.3f}; gradient {g1:+.0f}, {g2:+.0f}")
    assert g1 == g2 == 1 and w2 > w1 > 0
for name in ("SGDW", "Lion", "AdaBelief", "AdamP"):
    (w1, g1), (w2, g2) = two_steps(getattr(pytorch_optimizer, name))
    print(f"  {name:24} weight {w1:.3f}, then {w2:.3f}; gradient {g1:+.0f}, {g2:+.0f}")
    assert g1 == -1 and g2 == 1 and w2 < w1
print("expected: both steps up, and the gradient as backward left it")
EOF
venv/bin/python -W ignore check.py
