#!/usr/bin/env bash
# bayesian-torch 0.5.0: a layer draws its noise in place, through .data, into a buffer that the graph of the draw before
# still needs. A loss of several draws, as an average over Monte Carlo samples is, so has the gradient of each standard
# deviation times the last draw's noise, and no error, where one backward pass a draw gives the right one.
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
cd "$dir"
venv/bin/pip install --quiet bayesian-torch==0.5.0 torch==2.14.1 numpy==2.3.5 >pip.log 2>&1 || { cat pip.log; exit 2; }

cat >check.py <<'EOF'
from importlib.metadata import version

import torch
from bayesian_torch.layers import LinearReparameterization

print("bayesian-torch", version("bayesian-torch"), "torch", torch.__version__)
torch.manual_seed(0)
layer = LinearReparameterization(3, 2).double()
inputs = torch.randn(4, 3, dtype=torch.float64)
deviations = layer.rho_weight


def loss_of_draw(seed):
    torch.manual_seed(seed)
    return layer(inputs)[0].square().mean()


def gradient(*losses):
    layer.zero_grad()
    for loss in losses:
        loss.backward()
    return deviations.grad.clone()


apart = gradient(loss_of_draw(1)) + gradient(loss_of_draw(2))
together = gradient(loss_of_draw(1) + loss_of_draw(2))

differences = torch.zeros_like(deviations)
with torch.no_grad():
    for place in range(deviations.numel()):
        values = []
        for step in (1e-6, -1e-6):
            deviations.view(-1)[place] += step
            values.append(loss_of_draw(1) + loss_of_draw(2))
            deviations.view(-1)[place] -= step
        differences.view(-1)[place] = (values[0] - values[1]) / 2e-6


def error(found):
    return float((found - differences).norm() / differences.norm())


print(f"gradient of the standard deviations, a backward pass a draw: {error(apart):.1e} off finite differences")
print(f"one backward pass of the sum of both draws:                 {error(together):.1e} off")
print("expected: the same gradient")
assert error(apart) < 1e-6
assert error(together) > 0.1
EOF
venv/bin/python check.py
