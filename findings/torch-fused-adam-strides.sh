#!/usr/bin/env bash
# torch 2.14.1: on a CPU the fused step of Adam pairs a parameter with its gradient and its moments by their places in
# memory and not by their indices. Where a moment has the same shape and other strides than the parameter, every entry
# is updated with another entry's moment, without an error or a warning. `load_state_dict` keeps the strides that a
# saved state had, and a model may be moved to channels_last, or back, between saving and loading. The step with
# foreach=False, fused=False is right in the same place.
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
cd "$dir"
venv/bin/pip install --quiet torch==2.14.1 numpy==2.3.5 >pip.log 2>&1 || { cat pip.log; exit 2; }

cat >check.py <<'EOF'
import copy

import torch
from torch import nn

torch.manual_seed(0)
gradients = [torch.randn(4, 3, 3, 3) for _ in range(3)]


def step(layer, optimizer, gradient):
    layer.weight.grad = torch.empty_like(layer.weight).copy_(gradient)
    optimizer.step()


def resumed(fused):
    """Two steps in one memory format, one more in the other, from a state dict."""
    first = nn.Conv2d(3, 4, 3, bias=False)
    nn.init.zeros_(first.weight)
    before = torch.optim.Adam(first.parameters(), lr=0.1, fused=fused, foreach=False)
    for gradient in gradients[:2]:
        step(first, before, gradient)
    second = nn.Conv2d(3, 4, 3, bias=False).to(memory_format=torch.channels_last)
    second.load_state_dict(first.state_dict())
    after = torch.optim.Adam(second.parameters(), lr=0.1, fused=fused, foreach=False)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    step(second, after, gradients[2])
    return second.weight.detach().contiguous()


def straight():
    layer = nn.Conv2d(3, 4, 3, bias=False)
    nn.init.zeros_(layer.weight)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1, foreach=False)
    for gradient in gradients:
        step(layer, optimizer, gradient)
    return layer.weight.detach()


print("torch", torch.__version__)
right = straight()
plain, fused = ((resumed(fused) - right).abs().max().item() for fused in (False, True))
print(f"largest difference to three steps in one format: fused=False {plain:.1e}, fused=True {fused:.1e}")
assert plain < 1e-6
assert fused > 0.01
print("expected: the same step from both, or an error that names the strides")
EOF
venv/bin/python check.py
