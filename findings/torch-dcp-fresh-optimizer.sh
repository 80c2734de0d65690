#!/usr/bin/env bash
# torch 2.14.1, torch.distributed.checkpoint.state_dict: `get_optimizer_state_dict` of an optimizer that has not
# stepped yet makes a step with zero gradients and a learning rate of zero, and leaves what that step did. For Rprop
# that is its step size, set from the learning rate: it becomes the smallest one allowed, 1e-6, and training stands
# still. ASGD loses its first step; SGD with dampening and Adam take different steps. The weights do not move during
# the call, and nothing is said.
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
cd "$dir"
venv/bin/pip install --quiet torch==2.14.1 numpy==2.3.5 >pip.log 2>&1 ||
  { cat pip.log; exit 2; }

cat >check.py <<'EOF'
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

print("torch", torch.__version__)


def losses(make, ask, steps=20):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = make(model.parameters())
    if ask:
        get_optimizer_state_dict(model, optimizer)
    values = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(torch.ones(1, 3)) - 1).square().sum()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values


optimizers = {
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1),
    "SGD, dampening": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
}
changed = {}
for name, make in optimizers.items():
    plain, asked = losses(make, ask=False), losses(make, ask=True)
    changed[name] = plain != asked
    print(f"{name:15} loss of steps 1, 2, 20:", *(f"{plain[i]:.4f}" for i in (0, 1, -1)), end="; ")
    print("after its state was asked for:", *(f"{asked[i]:.4f}" for i in (0, 1, -1)))
    if name == "Rprop":
        assert plain[-1] < 0.01 * plain[0] and asked[-1] > 0.99 * asked[0]
assert changed == {"Rprop": True, "ASGD": True, "SGD, dampening": True, "Adam": True, "SGD": False}
print("expected: the same losses; to read a state should not change it")
EOF
venv/bin/python -W ignore check.py
