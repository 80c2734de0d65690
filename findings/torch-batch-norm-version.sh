#!/usr/bin/env bash
# torch 2.14.1: a batch norm in training mode changes its running statistics in place without raising their version
# counters, by which autograd (and whoever else wants to know whether a tensor has changed) tells. Where a graph has
# saved running_mean, a forward pass before its backward is not noticed: the gradient is made with the new statistics
# and no error is raised. Instance norm, which goes the same way, raises its counter, and the same use is an error.
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
cd "$dir"
venv/bin/pip install --quiet torch==2.14.1 numpy==2.3.5 >pip.log 2>&1 || { cat pip.log; exit 2; }

cat >check.py <<'EOF'
import torch
from torch import nn

torch.manual_seed(0)
inputs = torch.randn(8, 3, 5) + 1


def gradient(norm):
    """Of a scale of the running mean, where the norm is used once more between forward and backward."""
    scale = torch.ones(3, requires_grad=True)
    norm(inputs)
    loss = (norm.running_mean * scale).sum()
    wanted, version = norm.running_mean.clone(), norm.running_mean._version
    norm(inputs)
    raised = norm.running_mean._version - version
    loss.backward()
    return raised, (scale.grad - wanted).abs().max().item()


print("torch", torch.__version__)
raised, error = gradient(nn.BatchNorm1d(3))
print(f"BatchNorm1d: version counter up by {raised}, no error, gradient off by {error:.2f}")
assert raised == 0
assert error > 0.05
try:
    gradient(nn.InstanceNorm1d(3, track_running_stats=True))
except RuntimeError as caught:
    print("InstanceNorm1d:", str(caught).partition("[")[0])
    assert "modified by an inplace operation" in str(caught)
else:
    raise AssertionError("InstanceNorm1d raised no error")
print("expected: the same error from both")
EOF
venv/bin/python check.py
