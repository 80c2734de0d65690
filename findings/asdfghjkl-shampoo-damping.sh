#!/usr/bin/env bash
# asdfghjkl 0.1a5 (imported as asdl): Shampoo adds its damping to the statistics in place each time it computes the
# inverse root, so that the damping of all earlier updates stays in them. With statistics gathered once, a model that
# does not change and always the same batch, every preconditioned gradient should be the same. It shrinks at each
# update, since the largest eigenvalue grows by the factor 1 + damping.
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
cd "$dir"
venv/bin/pip install --quiet asdfghjkl==0.1a5 torch==2.14.1 numpy==2.3.5 >pip.log 2>&1 ||
  { cat pip.log; exit 2; }

cat >check.py <<'EOF'
import warnings
from importlib.metadata import version

import torch
import torch.nn.functional as F
from asdl.precondition import PreconditioningConfig, ShampooGradientMaker
from torch import nn

warnings.simplefilter("ignore")
print("asdfghjkl", version("asdfghjkl"), "torch", torch.__version__)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(5, 3))
x, target = torch.randn(8, 5), torch.randint(3, (8,))
config = PreconditioningConfig(damping=0.1, preconditioner_upd_interval=1, curvature_upd_interval=1000)
maker = ShampooGradientMaker(model, config)
traces, norms = [], []
for step in range(41):
    model.zero_grad()
    output = maker.setup_model_call(model, x)
    maker.setup_loss_call(F.cross_entropy, output, target)
    maker.forward_and_backward()  # no optimizer: the weights stay as they are
    traces.append(maker.preconditioners[0].statistics[0].trace().item())
    norms.append(model[0].weight.grad.norm().item())
    if step % 10 == 0:
        print(f"update {step:2}: trace of the statistics {traces[-1]:7.3f}, norm of the direction {norms[-1]:.3f}")
assert traces[-1] > 50 * traces[0] and norms[-1] < norms[0] / 5
print("expected: the same trace and norm at every update, damping=0.1 applied once")
EOF
venv/bin/python -W ignore check.py
