#!/usr/bin/env bash
# pytorch-optimizer 4.1.0: BSAM climbs. Its three parts add noise, add the step of sharpness-aware minimization towards
# a larger loss, and subtract the update; neither of the first two is taken back, so each step leaves the weights
# further up the slope. The update itself accumulates `weight_decay * gradient` where the method adds the decay to the
# gradient: with `weight_decay=0` the gradient has no part in it at all. On a linear regression its defaults raise the
# loss a hundredfold; with `weight_decay=0` and `rho=0` nothing but noise moves the weights.
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


def regression(make, steps=100):
    torch.manual_seed(0)
    x, true = torch.randn(100, 5), torch.randn(5)
    target = x @ true
    model = nn.Linear(5, 1)
    start = model.weight.detach().clone()
    optimizer = make(model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = (model(x).squeeze(1) - target).square().mean()
        loss.backward()
        return loss

    first = closure().item()  # BSAM needs gradients before its first step
    for _ in range(steps):
        optimizer.step(closure)
    return first, closure().item(), (model.weight - start).abs().max().item(), model.weight.grad.norm().item()


data = 1_000_000
runs = {
    "torch.optim.SGD, lr=0.05": lambda p: torch.optim.SGD(p, lr=0.05),
    "BSAM, defaults": lambda p: pytorch_optimizer.BSAM(p, num_data=data),
    "BSAM, weight_decay=0, rho=0": lambda p: pytorch_optimizer.BSAM(p, num_data=data, weight_decay=0.0, rho=0.0),
}
results = {}
for name, make in runs.items():
    results[name] = first, last, moved, gradient = regression(make)
    print(f"{name:28} loss {first:.3f} -> {last:8.3f}, weights moved {moved:.1e}, gradient's norm now {gradient:.2f}")
sgd, defaults, plain = results.values()
assert sgd[1] < 0.1 * sgd[0]
assert defaults[1] > 100 * defaults[0]
assert plain[2] < 1e-3 and plain[3] > 1.0
print("expected: a smaller loss after 100 steps, whatever the weight decay")
EOF
venv/bin/python -W ignore check.py
